"""Adapters of pretrained models: trained on a few images, saved, and opened by the stock pipeline."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "name", ["PixArtAlphaPipeline", "PRXPipeline"]
)  # the second inherits another's loader
def test_a_pipeline_without_a_loader_is_named(name: str) -> None:
    model = FAMILIES[name](checkpoint(name))
    with pytest.raises(UserError, match=f"diffusers loads no adapters into a {name}"):
        PretrainedAdapter(model, AdapterConfig(lora_rank=2))
