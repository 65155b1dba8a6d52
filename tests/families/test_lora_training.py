"""Adapters of pretrained models: trained on a few images, saved, and opened by the stock pipeline."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentflow import LatentFlowPipeline
from latentflow.config import AdapterConfig, FlowConfig
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.pipeline.adapter_bases import fingerprint
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_pretrained import seeded
from .tiny import TINY, checkpoint

#: three that differ in layout; the others are slow
LAYOUTS = ("StableDiffusionPipeline", "FluxPipeline-dev", "Flux2KleinPipeline")
LOADED = [
    name
    for name in TINY
    if hasattr(getattr(diffusers, name.partition("-")[0]), "save_lora_weights") and name != "PRXPipeline"
]
STEPS = 30


@pytest.mark.parametrize(
    "name", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in LOADED]
)
def test_a_trained_adapter_opens_in_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    tiny, pipe = TINY[name], deepcopy(checkpoint(name))
    model: Any = FAMILIES[name.partition("-")[0]](pipe, **tiny.call)
    size = {"height": tiny.side, "width": tiny.side}
    with torch.no_grad():
        images = torch.rand(8, 3, tiny.side, tiny.side, generator=seeded(3)) * 2 - 1
        latents = model.encode(images)
        rows = model.encode_prompt([f"a red apple {number}" for number in range(8)])
    loss = PretrainedLoss(model, FlowConfig(), seed=1)
    adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2, lora_alpha=3.0))
    assert adapter.fingerprint
    batch = {"latents": latents, **in_batch(rows), "sample_ids": [*range(8)]}

    def fixed() -> float:
        loss.eval()
        with torch.no_grad():
            value = float(loss(batch)["loss"])
        loss.train()
        return value

    before = fixed()
    learned = [weight for weight in model.network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    for step in range(STEPS):
        made = loss({**batch, "sample_ids": [8 * step + number for number in range(8)]})
        optimizer.zero_grad()
        made["loss"].backward()
        optimizer.step()
    assert fixed() < before
    adapter.save(tmp_path)

    ours = LatentFlowPipeline(model)
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt", **size}
    drawn = ours("a red apple", generator=seeded(), **call).images
    stock = deepcopy(checkpoint(name))
    opened = LatentFlowPipeline(FAMILIES[name.partition("-")[0]](stock, **tiny.call))
    plain = opened("a red apple", generator=seeded(), **call).images
    stock.load_lora_weights(tmp_path)  # by diffusers' own loader
    again = opened("a red apple", generator=seeded(), **call).images
    assert float((drawn - plain).abs().max()) > 1e-3
    torch.testing.assert_close(again, drawn, rtol=0.0, atol=1e-5)
    stock.fuse_lora()
    stock.unload_lora_weights()
    torch.testing.assert_close(
        opened("a red apple", generator=seeded(), **call).images, drawn, rtol=0.0, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_is_in_float32_whatever_its_base_is_in(name: str, dora: bool, dtype: torch.dtype) -> None:
    tiny = TINY[name]
    model: Any = FAMILIES[name.partition("-")[0]](deepcopy(checkpoint(name)), **tiny.call)
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, tiny.side, tiny.side, generator=seeded(3)) * 2 - 1)
        rows = model.encode_prompt(["a red apple", "a pear"])
    model.network.to(dtype)
    PretrainedAdapter(model, AdapterConfig(lora_rank=2, lora_dora=dora, lora_dropout=0.1))
    learned = [weight for weight in model.network.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in learned} == {torch.float32} and model.network.dtype == dtype
    with torch.no_grad():
        for weight in learned:
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(1)))
    loss = PretrainedLoss(model, FlowConfig(), seed=1)
    before = [weight.detach().clone() for weight in learned]
    optimizer = torch.optim.AdamW(learned, lr=1e-6)  # in 16 bits such a step changes no weight
    made = loss({"latents": latents, **in_batch(rows), "sample_ids": [0, 1]})["loss"]
    made.backward()
    optimizer.step()
    gradients = [weight.grad for weight in learned]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    changed = [bool((weight != old).any()) for weight, old in zip(learned, before, strict=True)]
    assert all(changed) and made.isfinite()


def test_what_the_plan_and_a_resumed_run_are_given() -> None:
    """Counted by hand: the layers of a block are (inputs + outputs) x rank parameters each."""
    model: Any = FAMILIES["FluxPipeline"](deepcopy(checkpoint("FluxPipeline")), **TINY["FluxPipeline"].call)
    whole = sum(weight.numel() for weight in model.network.parameters())
    config = AdapterConfig(lora_rank=4, lora_layers=("to_q", "to_k"), lora_dropout=0.25)
    adapter = PretrainedAdapter(model, config)
    count = 4 * (32 + 32) * 4
    assert adapter.layers == 4 and adapter.lines() == [
        f"adapter: LoRA of rank 4 in 4 layers: {count:,} trained parameters, {count / whole:.1%} of {whole / 1e6:.1f} M"
    ]
    description = adapter.description()
    assert description == {
        "lora_rank": 4, "lora_alpha": None, "lora_dora": False, "lora_layers": ("to_q", "to_k"),
        "lora_text_encoder": False, "lora_dropout": 0.25, "base": adapter.fingerprint,
    }  # fmt: skip
    json.dumps(description)
    assert adapter.fingerprint == fingerprint(model.network) != {}


def test_dropout_is_for_training_alone(tmp_path: Path) -> None:
    """Two losses of the same batch differ; images do not, ours nor those of the saved adapter in the stock pipeline."""
    name = "FluxPipeline"
    tiny, model = TINY[name], FAMILIES[name](deepcopy(checkpoint(name)), **TINY[name].call)
    adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2, lora_dropout=0.5))
    with torch.no_grad():
        for key, weight in model.network.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=seeded(1)))
        latents = model.encode(torch.rand(2, 3, 16, 16, generator=seeded(3)) * 2 - 1)
        batch = {
            "latents": latents, **in_batch(model.encode_prompt(["a", "b"])), "sample_ids": [0, 1],
        }  # fmt: skip
        loss = PretrainedLoss(model, FlowConfig(), seed=1)
        assert float(loss(batch)["loss"]) != float(loss(batch)["loss"])
        loss.eval()
        assert float(loss(batch)["loss"]) == float(loss(batch)["loss"])

        adapter.save(tmp_path)
        call: dict[str, Any] = {
            "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt", **tiny.call
        }  # fmt: skip
        stock = deepcopy(checkpoint(name))
        stock.load_lora_weights(tmp_path)
        images = [stock("a", generator=seeded(), **call).images for _ in range(2)]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    "name", ["PixArtAlphaPipeline", "PRXPipeline"]
)  # the second inherits another's loader
def test_a_pipeline_without_a_loader_is_named(name: str) -> None:
    model = FAMILIES[name](checkpoint(name))
    with pytest.raises(UserError, match=f"diffusers loads no adapters into a {name}"):
        PretrainedAdapter(model, AdapterConfig(lora_rank=2))
