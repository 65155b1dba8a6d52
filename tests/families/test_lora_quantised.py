"""Adapters beside layers that are quantised: gradients, what the backward pass keeps, and settings of the libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torch import Tensor, nn

from latentflow import FlowModel
from latentflow.config import AdapterConfig, FlowConfig
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.families.quantization import quantization
from latentflow.training.fine_tune.adapters import inject
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_pretrained import seeded
from .tiny import TINY, checkpoint

pytest.importorskip("peft", reason="peft is not installed")
NAME = "FluxPipeline-dev"
KINDS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")


def open_quantised(folder: Path, kind: str | None) -> FlowModel:
    options: dict[str, Any] = {"dtype": torch.float32}
    if kind is not None:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = TorchAoConfig(getattr(torchao, kind)())
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    return FlowModel.from_pretrained(folder, family_options=dict(TINY[NAME].call), **options)


def dequantise(model: FlowModel) -> None:
    for layer in model.network.modules():
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "dequantize"):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)


def step(model: FlowModel, dora: bool = False, checkpointing: bool = False) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of an adapter that is not at its start, and the bytes that are kept for the backward pass
    beyond the network's parameters."""
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, 16, 16, generator=seeded(3)) * 2 - 1)
        rows = model.encode_prompt(["a", "b c"])
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(4)
        warnings.simplefilter("error")  # of peft, about layers that it does not know
        PretrainedAdapter(model, AdapterConfig(lora_rank=2, lora_dora=dora))
    generator = seeded(5)
    learned = {name: weight for name, weight in model.network.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in learned.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    loss = PretrainedLoss(model, FlowConfig(), seed=1)
    if checkpointing:
        model.network.enable_gradient_checkpointing()
        model.network.train()
    kept: dict[int, Tensor] = {}

    def place(value: Tensor) -> int:
        return value.untyped_storage().data_ptr()

    own = {place(weight.data) for weight in model.network.parameters() if type(weight.data) is Tensor}

    def keep(value: Tensor) -> Tensor:
        if type(value) is Tensor and place(value) not in own:
            kept[place(value)] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        made = loss({"latents": latents, **in_batch(rows), "sample_ids": [0, 1]})["loss"]
    count = sum(value.untyped_storage().nbytes() for value in kept.values())
    made.backward()
    return {name: weight.grad for name, weight in learned.items() if weight.grad is not None}, count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_beside_quantised_layers(kind: str, dora: bool, folders: Callable[[str], Path]) -> None:
    """They are those beside the rounded weights; the dequantised weights are kept for the backward pass, unless the
    blocks are computed again."""
    quantised, rounded, plain = (open_quantised(folders(NAME), which) for which in (kind, kind, None))
    dequantise(rounded)
    found, kept = step(quantised, dora)
    expected, kept_rounded = step(rounded, dora)
    unquantised, _ = step(plain, dora)
    again, kept_less = step(open_quantised(folders(NAME), kind), dora, checkpointing=True)
    assert found and found.keys() == expected.keys() == unquantised.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)
    # Of all together: in a layer whose gradient nearly cancels, rounding alone is half of it.
    rounding = sum(float((found[name] - unquantised[name]).square().sum()) for name in found)
    size = sum(float(gradient.square().sum()) for gradient in unquantised.values())
    assert (rounding / size) ** 0.5 < (0.1 if kind == KINDS[0] else 0.3)
    adapted = [layer.weight for layer in plain.network.modules() if hasattr(layer, "lora_A")]
    weights = sum(weight.nbytes for weight in adapted)  # of the first layers no gradient is needed
    assert 0.8 * weights < kept - kept_rounded < weights
    assert kept_less < 0.2 * kept_rounded


def test_the_rank_beside_packed_weights() -> None:
    """nf4 packs a matrix into a column, which says nothing about the rank that fits."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def network() -> nn.Module:
        packed = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
        packed.weight = bitsandbytes.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
        return nn.ModuleDict({"attn": nn.ModuleDict({"to_q": packed.to("cpu")})})

    assert network()["attn"]["to_q"].weight.shape == (1024, 1)
    assert inject(network(), AdapterConfig(lora_rank=32)) == 1
    with pytest.raises(
        UserError, match=r"--lora-rank 33 is above what the layer attn.to_q \(64 to 32\) can have"
    ):
        inject(network(), AdapterConfig(lora_rank=33))


def in_four_bits(name: str, dtype: torch.dtype, *, dequantised: bool = False) -> FlowModel:
    """Return a tiny model whose linear layers are bitsandbytes' of 4 bits, as diffusers makes them on a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = FAMILIES[name](deepcopy(checkpoint(name)), **TINY[name].call)
    network = model.network.to(dtype)
    for where, layer in [*network.named_modules()]:
        if not isinstance(layer, nn.Linear):
            continue
        weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        if dequantised:
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            continue
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=dtype
        )
        packed.weight, packed.bias = weight, layer.bias
        parent, _, leaf = where.rpartition(".")
        setattr(network.get_submodule(parent), leaf, packed)
    network.is_loaded_in_4bit = not dequantised
    return model


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2KleinPipeline"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_beside_layers_of_four_bits(name: str, dora: bool) -> None:
    """bitsandbytes unpacks a weight again for the backward pass, and keeps no more than layers that are not quantised;
    the plan counts the parameters before they were packed."""
    model, rounded = (in_four_bits(name, torch.float32, dequantised=which) for which in (False, True))
    found, kept = step(model, dora)
    expected, kept_rounded = step(rounded, dora)
    assert found and found.keys() == expected.keys() and kept == kept_rounded
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)
    lines = [
        PretrainedAdapter(
            in_four_bits(name, torch.float32, dequantised=which), AdapterConfig(lora_rank=2)
        ).lines()
        for which in (False, True)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2KleinPipeline", "QwenImagePipeline"])
def test_an_adapter_leaves_the_precision_of_the_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are float32; the network in 4 bits computes in bfloat16, also where an adapter's are the first
    floating-point numbers in it, as in FLUX.2."""
    model = in_four_bits(name, torch.bfloat16)
    seen: set[torch.dtype] = set()
    forward = type(model.network).forward

    def watched(network: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        seen.add(hidden_states.dtype)
        return forward(network, hidden_states, *args, **named)

    monkeypatch.setattr(type(model.network), "forward", watched)
    found, _ = step(model)
    assert seen == {torch.bfloat16} and model.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())
    widened: Any = in_four_bits(name, torch.bfloat16)
    widened.add_inputs({"masks": None})
    assert widened.dtype == torch.bfloat16


def test_the_settings_of_nf4(folders: Callable[[str], Path]) -> None:
    """QLoRA's: 4-bit NormalFloat, quantised scales, bfloat16 to compute; for both libraries."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    mapping = quantization("nf4", str(folders(NAME))).quant_mapping
    assert {type(config).__module__.partition(".")[0] for config in mapping.values()} == {
        "diffusers", "transformers"
    }  # fmt: skip
    for config in mapping.values():
        assert (
            config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        )
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
