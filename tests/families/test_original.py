"""Weights as their authors publish them: imported strictly, they give what the original's formula gives."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.errors import UserError
from latentflow.families.original import ORIGINALS, import_network, kind_of, read_weights
from latentflow.models import DIT_PRESETS, Condition
from latentflow.utils.single_files import ORIGINAL_WEIGHT

SIZES = {name: preset for name, preset in DIT_PRESETS.items() if "num_classes" in preset}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def original_weights(kind: str, width: int, depth: int, heads: int, **options: Any) -> dict[str, Tensor]:
    """Return random weights by the original's names and shapes, as written down in its code."""
    channels, patch, side, modern = 4, 2, 32, kind == "lightningdit"
    if modern:
        channels, patch, side = 32, 1, 16
    out = 2 * channels if kind in ("sit", "dit") else channels
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (side // patch) ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (patch**2 * out, width),
        "final_layer.linear.bias": (patch**2 * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    hidden = int(2 / 3 * 4 * width) if modern else 4 * width
    first, second = ("mlp.w12", "mlp.w3") if modern else ("mlp.fc1", "mlp.fc2")
    rows = {"adaLN_modulation.1": 4 if options.get("no_shift") else 6, "attn.qkv": 3, "attn.proj": 1}
    for block in (f"blocks.{number}" for number in range(depth)):
        for layer, count in rows.items():
            shapes[f"{block}.{layer}.weight"] = (count * width, width)
            shapes[f"{block}.{layer}.bias"] = (count * width,)
        shapes[f"{block}.{first}.weight"] = (hidden * (2 if modern else 1), width)
        shapes[f"{block}.{first}.bias"] = (hidden * (2 if modern else 1),)
        shapes[f"{block}.{second}.weight"] = (width, hidden)
        shapes[f"{block}.{second}.bias"] = (width,)
        if modern:
            shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
            if options.get("qk_norm"):
                shapes |= {f"{block}.attn.{name}_norm.weight": (width // heads,) for name in "qk"}
    if modern:
        shapes["final_layer.norm_final.weight"] = (width,)
    if kind == "repa":
        shapes |= {"projectors.0.0.weight": (64, width), "projectors.0.0.bias": (64,)}
    generator, weights = seeded(), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator) * 0.7 / math.sqrt(shape[-1])
        weights[name] = 1.0 + values if "norm" in name else values
    weights["pos_embed"] = sincos(width, side // patch)[None]
    return weights


def sincos(width: int, side: int) -> Tensor:
    """Return DiT's table: the column first, then the row, each as sines and cosines."""
    frequencies = 1e4 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    each = torch.cat([places.sin(), places.cos()], dim=1)  # (side, width / 2)
    column, row = each.repeat(side, 1), each.repeat_interleave(side, 0)
    return torch.cat([column, row], dim=1).float()


def original_output(weights: dict[str, Tensor], x: Tensor, time: Tensor, label: Tensor, heads: int) -> Tensor:
    """Return what the original network returns, all channels, at its own time; in float64."""
    w = {name: value.double() for name, value in weights.items()}
    modern, x = "blocks.0.norm1.weight" in w, x.double()

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: Tensor) -> Tensor:
        if f"{name}.weight" in w:
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) if "attn" not in name else value

    patch = w["x_embedder.proj.weight"].shape[-1]
    grid = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    side, tokens = grid.shape[-1], grid.flatten(2).transpose(1, 2) + w["pos_embed"]
    angles = time.double()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128) / 128).double()
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][label])[:, None]
    depth, width = 1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks.")), tokens.shape[-1]
    for block in (f"blocks.{number}" for number in range(depth)):
        vectors = linear(f"{block}.adaLN_modulation.1", c).split(width, dim=-1)
        if len(vectors) == 4:
            none = torch.zeros_like(vectors[0])
            vectors = none, *vectors[:2], none, *vectors[2:]
        shift, scale, gate, shift2, scale2, gate2 = vectors
        h = norm(f"{block}.norm1", tokens) * (1 + scale) + shift
        q, k, v = linear(f"{block}.attn.qkv", h).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = norm(f"{block}.attn.q_norm", q), norm(f"{block}.attn.k_norm", k)
        if modern:
            q, k = turned(q, side), turned(k, side)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate * linear(f"{block}.attn.proj", seen)
        h = norm(f"{block}.norm2", tokens) * (1 + scale2) + shift2
        if modern:
            first, second = linear(f"{block}.mlp.w12", h).chunk(2, dim=-1)
            h = linear(f"{block}.mlp.w3", F.silu(first) * second)
        else:
            h = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", h), approximate="tanh"))
        tokens = tokens + gate2 * h
    shift, scale = linear("final_layer.adaLN_modulation.1", c).split(width, dim=-1)
    patches = linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    squares = patches.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def turned(x: Tensor, side: int) -> Tensor:
    """Turn neighbouring channels by positions with the base 10000, those of the row first."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angle.repeat_interleave(side, 0), angle.repeat(side, 1)], dim=1)
    even, odd = x[..., ::2], x[..., 1::2]
    pair = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
    return torch.stack(pair, dim=-1).flatten(-2)


def agrees(kind: str, weights: dict[str, Tensor], heads: int) -> None:
    network = import_network(weights, kind)
    assert network.config["heads"] == heads
    original = ORIGINALS[kind]
    channels, side = network.config["in_channels"], network.config["sample_size"]
    x = torch.randn(2, channels, side, side, generator=seeded(1))
    t, labels = torch.tensor([0.25, 0.9]), torch.tensor([7, 1000])
    theirs = original_output(weights, x, original.time[0] + original.time[1] * t.double(), labels, heads)
    drop = labels == 1000
    with torch.no_grad():
        ours = network(x, t, Condition(class_labels=labels.clamp(max=999), drop=drop))
    expected = original.sign * theirs[:, :channels]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.double(), expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[pytest.mark.slow] if s in "L XL B" else []) for s in SIZES]
)
@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_published_sizes(kind: str, size: str) -> None:
    width, depth, heads = (SIZES[size][name] for name in ("width", "depth", "heads"))
    weights = original_weights(kind, width, depth, heads)
    assert len(weights) == 12 + 10 * depth  # 132 of the small and the base size
    agrees(kind, weights, heads)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sit", {}), ("dit", {}), ("repa", {}), ("lightningdit", {}),
        ("lightningdit", {"qk_norm": True}), ("lightningdit", {"no_shift": True}),
    ],
)  # fmt: skip
def test_every_kind(kind: str, options: dict[str, Any]) -> None:
    agrees(kind, original_weights(kind, 128, 3, 2, **options), 2)


def test_a_wrong_convention_is_seen() -> None:
    """Imported as another kind, the same weights give something else."""
    weights = original_weights("sit", 128, 2, 2)
    x, t = torch.randn(1, 4, 32, 32, generator=seeded()), torch.tensor([0.3])
    with torch.no_grad():
        sit, dit = (import_network(weights, kind)(x, t) for kind in ("sit", "dit"))
    assert (sit - dit).abs().max() > 0.01


def test_files(tmp_path: Path) -> None:
    """The averaged weights are taken, from files in which flags lie beside them, and nothing is executed."""
    weights = original_weights("sit", 64, 1, 1)
    ema = {name: value + 1.0 for name, value in weights.items()}
    file = tmp_path / "SiT-XL-2-256.pt"
    torch.save({"model": weights, "ema": ema, "args": argparse.Namespace(lr=1e-4)}, file)
    found = read_weights(file)
    assert torch.equal(found["x_embedder.proj.bias"], ema["x_embedder.proj.bias"])
    assert kind_of(found, file.name) == "sit"

    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("trapped").mkdir, ())

    torch.save({"ema": weights, "other": Trap()}, file)
    with pytest.raises(UserError):
        read_weights(file)
    assert not (tmp_path / "trapped").exists()


def test_kinds_are_recognised_or_asked_for() -> None:
    for kind in ("repa", "lightningdit"):
        assert kind_of(original_weights(kind, 64, 1, 1), "last.pt") == kind
    assert kind_of(original_weights("dit", 64, 1, 1), "DiT-XL-2-256x256.pt") == "dit"
    with pytest.raises(UserError, match=r"may be of SiT or of DiT(.|\n)*--kind sit"):
        kind_of(original_weights("sit", 64, 1, 1), "last.pt")


def test_other_weights_are_refused() -> None:
    weights = original_weights("sit", 64, 1, 1)
    with pytest.raises(UserError, match="not the weights of a sit network"):
        import_network({"conv.weight": torch.zeros(3)}, "sit")
    with pytest.raises(UserError, match="not the weights of a sit network"):
        import_network({**weights, "extra.weight": torch.zeros(3)}, "sit")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("SiT-XL-2-256.pt", "sit"),
        ("dit_b.pt", "dit"),
        ("LightningDiT.pt", "lightningdit"),
        ("repa-b2.pt", "repa"),
    ],
)
def test_a_file_name_says_the_kind(file: str, kind: str) -> None:
    assert kind_of({ORIGINAL_WEIGHT: torch.zeros(1)}, file) == kind


@pytest.mark.parametrize("file", ["transit.pt", "edit.pt", "sit-or-dit.pt", "last.pt"])
def test_parts_of_words_say_no_kind(file: str) -> None:
    with pytest.raises(UserError, match="--kind"):
        kind_of({ORIGINAL_WEIGHT: torch.zeros(1)}, file)


def test_files_of_an_older_torch_are_read(tmp_path: Path) -> None:
    weights = original_weights("sit", 64, 1, 1)
    torch.save(weights, tmp_path / "sit.pt", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "sit.pt").keys() == weights.keys()


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = original_weights("sit", 64, 1, 1)
    weights["x_embedder.proj.bias"][0] = float("nan")
    with pytest.raises(UserError, match=r"not finite: x_embedder\.proj\.bias"):
        import_network(weights, "sit")
