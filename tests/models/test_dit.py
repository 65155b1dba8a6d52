"""`DiT` against what its papers define."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.errors import UserError
from latentflow.models import BLOCKS, DIT_PRESETS, Condition, DiT, dit_config
from latentflow.models.dit import SwiGluMlp, rms_norm
from latentflow.models.inputs import rope_table, rotate, sincos_table
from latentflow.models.norms import normalised_and_turned

from .tiny import build, latents, perturb

CPU = torch.device("cpu")


def on_meta(config: dict[str, object]) -> DiT:
    with torch.device("meta"):
        return DiT(**config)


def test_preset_b_has_the_parameters_of_sit() -> None:
    """Names and shapes are those that `sit` below reads."""
    model = on_meta(DIT_PRESETS["B"])
    assert sum(p.numel() for p in model.parameters()) == 130_512_416  # the fixed table among them, as in SiT
    assert len(model.state_dict()) == 132


def sit(s: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor, heads: int) -> Tensor:
    """SiT's forward pass, from its weights alone, with loops where a formula has indices."""
    width = s["pos_embed"].shape[-1]
    tokens = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=2)
    h, w = tokens.shape[2:]
    tokens = tokens.flatten(2).transpose(1, 2) + s["pos_embed"]
    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(F.linear(features, s["t_embedder.mlp.0.weight"], s["t_embedder.mlp.0.bias"]))
    c = F.linear(hidden, s["t_embedder.mlp.2.weight"], s["t_embedder.mlp.2.bias"])
    c = c + s["y_embedder.embedding_table.weight"][labels]

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(value, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i in range(2):
        block = f"blocks.{i}"
        m = linear(f"{block}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        qkv = linear(f"{block}.attn.qkv", norm(tokens, m[0], m[1]))
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        tokens = tokens + m[2][:, None] * linear(
            f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2)
        )
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(tokens, m[3], m[4])), approximate="tanh")
        tokens = tokens + m[5][:, None] * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    out = linear("final_layer.linear", norm(tokens, shift, scale))
    image = torch.empty(len(x), 4, 2 * h, 2 * w)
    for p in range(2):
        for q_ in range(2):
            for channel in range(4):
                image[:, channel, p::2, q_::2] = out[..., (p * 2 + q_) * 8 + channel].view(-1, h, w)
    return image


def test_the_sit_configuration_computes_what_sit_computes() -> None:
    torch.manual_seed(0)
    small = {"width": 16, "depth": 2, "heads": 2, "num_classes": 3, "sample_size": (8, 12)}
    model = DiT(**DIT_PRESETS["B"] | small)
    perturb(model.eval())
    x, t, labels = latents(2, 8, 12), torch.tensor([0.2, 0.9]), torch.tensor([0, 3])
    cond = Condition(class_labels=torch.tensor([0, 1]), drop=labels == 3)
    torch.testing.assert_close(
        model(x, t, cond), sit(model.state_dict(), x, t, labels, 2), rtol=1e-4, atol=1e-5
    )


def test_sincos_table_encodes_column_then_row() -> None:
    table = sincos_table(2, 3, 8, CPU)
    column, row = 2.0, 1.0
    expected = [
        *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
        *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
    ]
    torch.testing.assert_close(table[1 * 3 + 2], torch.tensor(expected))


def test_rotary_positions_depend_on_differences_only() -> None:
    height, width = 4, 5
    cos, sin = rope_table(height, width, 8, 0, CPU, torch.float32)
    q, k = torch.randn(2, 8).unbind()
    rows = height * width
    turned_q, turned_k = (rotate(z.expand(rows, 1, 8), cos, sin).squeeze(1) for z in (q, k))
    products = (turned_q @ turned_k.T).view(height, width, height, width)
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2])
    torch.testing.assert_close(products[2, 3, 2, 3], q @ k)
    assert not torch.isclose(products[0, 0, 0, 1], products[0, 0, 1, 0])  # rows and columns are told apart


def test_registers_are_not_rotated() -> None:
    cos, sin = rope_table(2, 2, 8, 3, CPU, torch.float32)
    x = torch.randn(7, 1, 8)
    out = rotate(x, cos, sin)
    assert torch.equal(out[:3], x[:3])
    assert not torch.allclose(out[4:], x[4:])


def test_positions_matter() -> None:
    """Without positions, a network of tokens would commute with any permutation of them."""
    for position in ("rope", "sincos"):
        model, x = build("dit", position=position), latents(1, 4, 4)
        assert not torch.allclose(model(x.flip(3), 0.5).flip(3), model(x, 0.5), atol=1e-3)


def test_the_stored_table_is_used_at_its_own_size_and_computed_at_others() -> None:
    fixed, free = (build("dit", position="sincos", sample_size=size) for size in ((6, 4), None))
    assert fixed.pos_embed.requires_grad is False
    free.load_state_dict({k: v for k, v in fixed.state_dict().items() if k != "pos_embed"})
    for height, width in ((6, 4), (4, 6), (8, 2)):
        x = latents(1, height, width)
        assert torch.equal(fixed(x, 0.5), free(x, 0.5))


def test_queries_in_one_pass_are_norm_scale_and_rotation_with_their_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(32, generator=generator, dtype=torch.float64, requires_grad=True)
    rope = rope_table(2, 3, 8, 0, CPU, torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        y, table = x.to(dtype), rope_table(2, 3, 8, 0, CPU, dtype)
        plain = rotate(rms_norm(y) * scale.view(4, 8).to(dtype), *table)
        assert torch.equal(normalised_and_turned(y, scale, *table), plain)

    def turned(x: Tensor, scale: Tensor) -> Tensor:
        return normalised_and_turned(x, scale, *rope)

    assert torch.autograd.gradcheck(turned, (x, scale), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(turned, (x, scale))


def test_rms_norm_is_torchs_with_its_derivatives() -> None:
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (8,), eps=1e-12), rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(rms_norm, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rms_norm, (x,))
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros).sum().backward()
    assert torch.equal(rms_norm(zeros), torch.zeros(2, 8)) and zeros.grad.isfinite().all()


def test_swiglu_has_about_as_many_parameters_as_gelu() -> None:
    assert SwiGluMlp(192, 4.0).fc2.in_features == 512  # 192 * 4 * 2 / 3
    assert SwiGluMlp(256, 4.0).fc2.in_features == 704  # 682.7, rounded up to a multiple of 32


@pytest.mark.parametrize("preset", list(DIT_PRESETS))
def test_presets_fit_other_data_and_changes_of_them_win(preset: str) -> None:
    model = on_meta(dit_config(preset, in_channels=16, num_classes=None, text_dim=8, sample_size=8))
    assert model.config.out_channels is None
    assert model.final_layer.linear.out_features == 16 * model.config.patch_size**2
    changes = {"depth": 3, "in_channels": 16, "out_channels": 32}
    assert dit_config(preset, **changes) == DIT_PRESETS[preset] | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30, "heads": 2}, "width 30 .* 24 or 32"),
        ({"norm": "rmss"}, "did you mean 'rms'"),
        ({"activation": "gleu"}, "did you mean 'gelu'"),
        ({"position": "ropes"}, "did you mean 'rope'"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        build("dit", **arguments)
    with pytest.raises(ValueError, match="5x4 does not divide into patches of 2"):
        build("dit", patch_size=2)(latents(1, 5, 4), 0.5)
    with pytest.raises(ValueError, match="no interval_conditioning"):
        build("dit")(latents(), 0.5, end=1.0)


def test_the_plain_block_is_sits_and_the_modern_one_is_the_default() -> None:
    assert DIT_PRESETS["S"].items() >= BLOCKS["plain"].items()
    assert dit_config("small", "plain") == DIT_PRESETS["small"] | BLOCKS["plain"]
    assert dict(on_meta(DIT_PRESETS["small"]).config).items() >= BLOCKS["modern"].items()
    assert dit_config("S", "modern") == DIT_PRESETS["S"] | BLOCKS["modern"]
    assert dit_config("S", "modern", norm="layer")["norm"] == "layer"
    for arguments, nearest in ((("S", "plan"), "'plain'"), (("tinny",), "'tiny'")):
        with pytest.raises(UserError, match=f"did you mean {nearest}"):
            dit_config(*arguments)
