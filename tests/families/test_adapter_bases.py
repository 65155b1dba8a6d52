"""The fingerprint of a pretrained network, and adapters that are refused on another base than theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latentflow import FlowModel, LatentFlowPipeline
from latentflow.config import AdapterConfig, FlowConfig
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.pipeline.adapter_bases import fingerprint, is_other_base, shared_name
from latentflow.pipeline.adapter_conversion import Layout, write_in_layout
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_family_programs import flags, size
from .test_memory import OFFLOADING
from .test_pretrained import seeded
from .tiny import TINY, checkpoint

pytest.importorskip("peft", reason="peft is not installed")
#: plain biases and norms, norms alone, a U-Net
NAMES = ("FluxPipeline", "Flux2KleinPipeline", "StableDiffusionXLPipeline")
each = pytest.mark.parametrize("name", NAMES)
FILE = "pytorch_lora_weights.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- the fingerprint


def network(seed: int = 0) -> nn.Module:
    """Return a network whose biases range from what float16 cannot hold to what it rounds to zero."""
    made = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 8, bias=False))
    scales = torch.logspace(-9, 5.5, 64)
    with torch.no_grad():
        made[0].bias.copy_(scales * torch.randn(64, generator=seeded(seed)))
        made[1].weight.add_(0.1 * torch.randn(64, generator=seeded(seed + 100)))
    return made


@pytest.mark.parametrize(("stored", "trained", "read"), [*product(DTYPES, repeat=3)])
def test_the_fingerprint_holds_in_every_precision(
    stored: torch.dtype, trained: torch.dtype, read: torch.dtype
) -> None:
    """Of a checkpoint that is stored in one, trained on in another and read in a third."""
    base = network().to(stored)
    made_for, here = (fingerprint(deepcopy(base).to(dtype)) for dtype in (trained, read))
    assert made_for and here and not is_other_base(made_for, here)
    other = fingerprint(network(1).to(stored).to(read))
    assert is_other_base(made_for, other) == bool(known_in(stored, trained) & known_in(stored, read))


def known_in(stored: torch.dtype, opened_in: torch.dtype) -> set[torch.dtype]:
    """Return the precisions to which the original numbers can be rounded, by what is left of them."""
    if stored == opened_in == torch.float32:
        return {*DTYPES}
    return {torch.bfloat16 if torch.bfloat16 in (stored, opened_in) else torch.float16}


def test_small_changes_are_another_base() -> None:
    """One number by the least that its precision has; also the names and the shapes count."""
    for dtype in DTYPES:
        base, changed = network().to(dtype), network().to(dtype)
        with torch.no_grad():
            changed[1].weight[5] = torch.nextafter(changed[1].weight[5], torch.tensor(9.0, dtype=dtype))
        assert is_other_base(fingerprint(base), fingerprint(changed))
    base, renamed = nn.ModuleDict({"one": nn.LayerNorm(4)}), nn.ModuleDict({"two": nn.LayerNorm(4)})
    longer = nn.ModuleDict({"one": nn.LayerNorm(5)})
    assert len({str(fingerprint(made)) for made in (base, renamed, longer)}) == 3


def test_networks_without_a_fingerprint() -> None:
    nothing = (
        nn.Linear(3, 3, bias=False),
        nn.Linear(3, 3, device="meta"),
        nn.LayerNorm(3).to(torch.float8_e5m2),
    )
    for made in nothing:
        assert fingerprint(made) == {} and not is_other_base({}, fingerprint(network()))


@each
def test_the_fingerprint_is_of_the_base_alone(name: str) -> None:
    """An adapter in it, other precisions and compiling leave it as it is; one step of full fine-tuning does not."""
    model = FAMILIES[name](deepcopy(checkpoint(name)), **TINY[name].call)
    with torch.no_grad():  # the norms of one that was never trained are 1 and 0
        for weight in model.network.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(2)))
    base = fingerprint(model.network)
    assert set(base) == {"float32", "bfloat16", "float16"}
    adapted = deepcopy(model)
    PretrainedAdapter(adapted, AdapterConfig(lora_rank=2, lora_dora=True, lora_layers=("all",)))
    assert fingerprint(adapted.network) == base
    assert fingerprint(torch.compile(model.network)) == base
    mixed = deepcopy(model.network).to(torch.bfloat16)
    next(part for part in mixed.modules() if isinstance(part, nn.Linear)).float()  # as diffusers keeps some
    assert not is_other_base(base, fingerprint(mixed))

    side = TINY[name].side
    with torch.no_grad():
        latents = model.encode(torch.rand(2, 3, side, side, generator=seeded(3)) * 2 - 1)
        rows = model.encode_prompt(["a", "b c"])
    loss = PretrainedLoss(model, FlowConfig(), seed=1)
    optimizer = torch.optim.AdamW(model.network.requires_grad_(True).parameters(), lr=1e-5)
    loss({"latents": latents, **in_batch(rows), "sample_ids": [0, 1]})["loss"].backward()
    optimizer.step()
    assert is_other_base(base, fingerprint(model.network))


def test_quantisation_leaves_the_fingerprint(folders: Callable[[str], Path]) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = fingerprint(FlowModel.from_pretrained(folders("FluxPipeline")).network)
    for kind in (quantization.Int8WeightOnlyConfig, quantization.Float8WeightOnlyConfig):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(kind())})
        model = FlowModel.from_pretrained(folders("FluxPipeline"), quantization_config=config)
        found = fingerprint(model.network)
        assert found and found.keys() <= base.keys() and not is_other_base(base, found)


# ---------------------------------------------------------------- adapters on their base and on another


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make the adapter of a base in ``somewhere/models/base``, and beside it ``other``, of the same architecture."""
    root = tmp_path_factory.mktemp("somewhere")

    def saved(name: str) -> Path:
        folder = root / name / "models"
        if folder.exists():
            return folder
        checkpoint(name).save_pretrained(folder / "base")
        model = FlowModel.from_pretrained(folder / "base", family_options=dict(TINY[name].call))
        adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2))
        with torch.no_grad():
            for key, weight in model.network.named_parameters():
                if "lora_" in key:
                    weight.copy_(torch.randn(weight.shape, generator=seeded(1)))
        adapter.save(folder / "adapter")
        other = deepcopy(checkpoint(name))
        with torch.no_grad():
            for weight in _network(other).parameters():
                if weight.ndim == 1:
                    weight.mul_(1.01)
        other.save_pretrained(folder / "other")
        return folder

    return saved


def _network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@each
def test_an_adapter_for_another_base_is_refused(
    name: str, made: Callable[[str], Path], load_program: Callable[[str], Any], tmp_path: Path
) -> None:
    """By pipelines and by the program, with the name of the base; any_base loads it all the same."""
    models = made(name)
    adapter, said = (
        models / "adapter",
        r"was made for a base with other weights \(models/base\)\n.*any_base=True",
    )
    pipes = {
        which: LatentFlowPipeline.from_pretrained(models / which, family_options=dict(TINY[name].call))
        for which in ("base", "other")
    }
    pipes["base"].load_lora_weights(adapter)
    file = adapter / FILE
    for source, more in ((adapter, {}), (file, {}), (str(adapter), {"weight_name": file.name})):
        with pytest.raises(UserError, match=said):
            pipes["other"].load_lora_weights(source, adapter_name="one", **more)
        assert not any(pipes["other"].get_list_adapters().values())
    pipes["other"].load_lora_weights(adapter, adapter_name="one", any_base=True)
    assert any(pipes["other"].get_list_adapters().values())
    pipes["other"].load_lora_weights(
        load_file(file), adapter_name="two"
    )  # tensors alone do not know their base

    for which, more, refused in (
        ("base", [], False),
        ("other", [], True),
        ("other", ["--lora-any-base"], False),
    ):
        out = tmp_path / f"{which}{len(more)}.png"
        line = ["red apple", *size(name), *flags(name, models / which), "--lora", str(adapter), *more]
        if refused:
            with pytest.raises(UserError, match=said):
                load_program("generate").main([*line, "-o", str(out)])
        else:
            load_program("generate").main([*line, "-o", str(out)])
        assert out.exists() != refused


@pytest.mark.parametrize("how", ["model", "sequential", "leaves"])
def test_a_base_whose_weights_wait_elsewhere(
    how: str, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read all the same, and wait again afterwards."""
    models = made("FluxPipeline")
    pipe = LatentFlowPipeline.from_pretrained(models / "other")
    OFFLOADING[how](pipe, monkeypatch)
    with pytest.raises(UserError, match="other weights"):
        pipe.load_lora_weights(models / "adapter")
    assert hasattr(pipe.transformer, "_diffusers_hook" if how == "leaves" else "_hf_hook")


@each
def test_the_file_names_its_base_and_not_its_author(name: str, made: Callable[[str], Path]) -> None:
    """Beside what diffusers writes: it opens in the stock pipeline, and its layers are the same."""
    models = made(name)
    file = models / "adapter" / FILE
    with safe_open(file, "pt") as read:
        metadata = read.metadata()
    facts = json.loads(metadata["latentflow"])
    assert facts["base_name"] == "models/base" and metadata["format"] == "pt"
    assert facts["base"] == fingerprint(_network(checkpoint(name)))
    assert set(metadata) == {"format", "latentflow", "lora_adapter_metadata"}
    assert str(models.parent).encode() not in file.read_bytes()
    stock = deepcopy(checkpoint(name))
    stock.load_lora_weights(models / "adapter")
    loaded = [key for key, _ in _network(stock).named_parameters() if "lora_A" in key]
    assert len(loaded) == sum(".lora_A." in key for key in load_file(file))


def test_names_of_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jane"))
    names = {
        "black-forest-labs/FLUX.1-dev": "black-forest-labs/FLUX.1-dev", "/home/jane/flux": "flux",
        "/data/models/flux/": "models/flux", "/home/jane/models/flux": "models/flux", "flux": "flux", "": "",
    }  # fmt: skip
    assert {given: shared_name(given) for given in names} == names


def test_metadata_that_are_damaged(made: Callable[[str], Path], tmp_path: Path) -> None:
    file = made("FluxPipeline") / "adapter" / FILE
    pipe = LatentFlowPipeline.from_pretrained(made("FluxPipeline") / "base")
    for metadata in ("no json", "[]", json.dumps({"base": 3}), json.dumps({"unknown": 3})):
        save_file(load_file(file), tmp_path / "damaged.safetensors", {"format": "pt", "latentflow": metadata})
        with pytest.raises(UserError, match=r"damaged\.safetensors.*its metadata 'latentflow'"):
            pipe.load_lora_weights(tmp_path / "damaged.safetensors")
    assert not any(pipe.get_list_adapters().values())


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_the_base_is_known_in_every_layout(
    layout: Layout, made: Callable[[str], Path], tmp_path: Path
) -> None:
    models = made("Flux2KleinPipeline")
    write_in_layout(
        models / "adapter" / FILE, tmp_path / "other.safetensors", layout, diffusers.Flux2KleinPipeline
    )
    pipe = LatentFlowPipeline.from_pretrained(models / "base")
    pipe.load_lora_weights(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other weights \(models/base\)"):
        LatentFlowPipeline.from_pretrained(models / "other").load_lora_weights(tmp_path / "other.safetensors")
