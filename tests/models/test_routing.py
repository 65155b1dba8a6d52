"""Tokens that are spared the middle blocks of `DiT`, and features taken from within it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentflow.models import DiT
from latentflow.models.dit import WithFeatures
from latentflow.models.routing import Route

from .tiny import FULL, build, full_condition, latents

DEPTH = 4
HEIGHT, WIDTH = 6, 4
COLUMNS = (
    torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH)[:, :2].flatten()
)  # the tokens of the two on the left


def network(**arguments: object) -> DiT:
    return build("dit", **{"depth": DEPTH, **FULL, **arguments})


def left_columns(first: int = 0, last: int = DEPTH, rows: int = 3) -> Route:
    return Route(COLUMNS.expand(rows, -1), first, last)


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_tokens_that_pass_see_one_another_at_their_own_places_and_nothing_else(position: str) -> None:
    """Routed from the first block to the last, they say what they would if the latent ended there."""
    model, x, cond = network(position=position, registers=2), latents(), full_condition()
    routed = model(x, 0.5, cond, route=left_columns())
    alone = model(x[..., :2], 0.5, replace(cond, channels=cond.channels[..., :2]))
    torch.testing.assert_close(routed[..., :2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(routed[..., :2], model(x, 0.5, cond)[..., :2], atol=1e-3)


def test_tokens_that_are_spared_come_back_as_they_left() -> None:
    model, x, cond = network(), latents(), full_condition()
    other = x.clone()
    other[..., :2] += 1.0  # where tokens pass
    routed, changed = (model(latent, 0.5, cond, route=left_columns()) for latent in (x, other))
    assert torch.equal(routed[..., 2:], changed[..., 2:])
    # Behind the route all see one another again.
    before_last = left_columns(last=DEPTH - 1)
    routed, changed = (model(latent, 0.5, cond, route=before_last) for latent in (x, other))
    assert not torch.allclose(routed[..., 2:], changed[..., 2:], atol=1e-4)


def test_a_route_that_all_take_is_none() -> None:
    model, x, cond = network(), latents(), full_condition()
    every = Route(torch.arange(HEIGHT * WIDTH).expand(3, -1), 1, DEPTH - 1)
    assert torch.equal(model(x, 0.5, cond, route=every), model(x, 0.5, cond))


def test_every_row_has_its_own_tokens() -> None:
    model, x, cond = network(), latents(), full_condition()
    kept = torch.stack([torch.randperm(24)[:9].sort().values for _ in range(3)])
    together = model(x, 0.5, cond, route=Route(kept, 1, 3))
    for row in range(3):
        here = slice(row, row + 1)
        alone = model(x[here], 0.5, cond.rows(torch.tensor([row])), route=Route(kept[here], 1, 3))
        torch.testing.assert_close(together[here], alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_compilers_take_a_route() -> None:
    model, x, cond = network(), latents(), full_condition()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x, 0.5, cond, route=left_columns(1, 3)).square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    expected = gradients()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, torch.tensor(0.5), cond, route=left_columns(1, 3)),
        model(x, 0.5, cond, route=left_columns(1, 3)),
        rtol=1e-4,
        atol=1e-5,
    )
    model.enable_gradient_checkpointing()
    model.train()
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize("after", [1, 2, DEPTH])
def test_features_are_the_tokens_behind_that_many_blocks(after: int) -> None:
    model, x, cond = network(registers=2), latents(), full_condition()
    calls: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: calls.append(out))
    velocity, features = model(x, 0.5, cond, features=after)
    assert torch.equal(features, calls[after - 1][:, 2:])
    calls.clear()
    assert torch.equal(velocity, model(x, 0.5, cond))
    calls.clear()
    only = model(x, 0.5, cond, features=after, only_features=True)
    assert isinstance(only, WithFeatures) and only.velocity is None
    assert torch.equal(only.features, features) and len(calls) == after


def test_features_on_a_route_are_those_of_the_tokens_that_pass() -> None:
    model, x, cond = network(), latents(), full_condition()
    route = left_columns(1, 3)
    for after in range(1, DEPTH + 1):
        features = model(x, 0.5, cond, route=route, features=after).features
        assert route.spares(after) == (after == 2)
        assert features.shape[1] == (12 if route.spares(after) else 24)
    values = torch.arange(3 * 24 * 2).view(3, 24, 2)
    assert torch.equal(route.of(values), values[:, COLUMNS])
