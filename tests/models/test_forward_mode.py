"""Derivatives in forward mode through the networks: against finite differences and plain products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.models import dit
from latentflow.models.dit import attention, has_tangent

from .tiny import FULL, build, full_condition, latents

KEYS = [7, 300]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def difference(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    h = 1e-5
    up, down = ([a + sign * h * b for a, b in zip(at, along, strict=True)] for sign in (1, -1))
    return (function(*up) - function(*down)) / (2 * h)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + torch.where(mask[:, None, None], 0.0, -torch.inf).to(scores)
    return scores.softmax(-1) @ v


def problem(keys: int, masked: bool, dtype: torch.dtype = torch.float64):
    shapes = [(2, 3, 5, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    at = tuple(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    along = tuple(normal(*shape, seed=9 + i, dtype=dtype) for i, shape in enumerate(shapes))
    mask = torch.arange(keys)[None] < torch.tensor([keys, 4])[:, None] if masked else None
    return at, along, mask


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", KEYS)
def test_attention_and_its_derivative_are_those_of_plain_products(
    keys: int, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    at, along, mask = problem(keys, masked, dtype)
    value, tangent = torch.func.jvp(lambda q, k, v: attention(q, k, v, mask), at, along)
    wide = [[tensor.double() for tensor in tensors] for tensors in (at, along)]
    expected = torch.func.jvp(lambda q, k, v: plain(q, k, v, mask), *map(tuple, wide))
    for found, exact in zip((value, tangent, attention(*at, mask)), (*expected, expected[0]), strict=True):
        assert found.dtype == dtype
        assert float((found.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(
    ("dtype", "keys", "fused"),
    [
        (torch.float32, 7, True),
        (torch.float32, 300, True),
        (torch.bfloat16, 7, False),  # where that is slower on the CPU
        (torch.bfloat16, 300, True),
    ],
)
def test_the_fused_kernel_is_left_where_a_forward_derivative_is_taken_and_where_it_is_slower(
    dtype: torch.dtype, keys: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        dit.F, "scaled_dot_product_attention", lambda *given: calls.append(1) or kernel(*given)
    )
    at, along, _ = problem(keys, False, dtype)
    attention(*at)
    attention(at[0].requires_grad_(), *at[1:]).sum().backward()
    assert len(calls) == 2 * fused
    torch.func.jvp(lambda q: attention(q, *at[1:]), (at[0].detach(),), (along[0],))
    assert len(calls) == 2 * fused
    assert not has_tangent(*at)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": "layer", "activation": "gelu", "position": "sincos", "qk_norm": False},
        FULL,
        {"interval_conditioning": True, **FULL},
    ],
)
def test_the_network_agrees_with_finite_differences(arguments: dict) -> None:
    """It does in x, and in t, which is float32 inside, so that its finite difference is coarse."""
    model = build("dit", time_scale=1.0, **arguments).double()
    x, v, t = latents().double(), normal(3, 4, 6, 4, seed=5), torch.tensor([0.25, 0.5, 0.75])
    cond = full_condition() if "num_classes" in arguments else None
    end = {"end": torch.ones(3)} if "interval_conditioning" in arguments else {}
    with torch.no_grad():
        in_x = torch.func.jvp(lambda y: model(y, t, cond, **end), (x,), (v,))[1]
        measured = difference(lambda y: model(y, t, cond, **end), (x,), (v,))
        assert float((in_x - measured).norm() / measured.norm()) < 1e-5
        in_t = torch.func.jvp(lambda s: model(x, s, cond, **end), (t,), (torch.ones(3),))[1]
        h = 2.0**-8
        measured = (model(x, t + h, cond, **end) - model(x, t - h, cond, **end)) / (2 * h)
        assert float((in_t - measured).norm() / measured.norm()) < 1e-2


def test_a_derivative_leaves_no_graph_and_can_be_taken_under_checkpointing() -> None:
    model = build("dit")
    model.enable_gradient_checkpointing()
    model.train()
    with torch.no_grad():
        tangent = torch.func.jvp(lambda y: model(y, 0.5), (latents(),), (latents(seed=3),))[1]
    assert tangent.grad_fn is None
    assert float(tangent.abs().max()) > 0
