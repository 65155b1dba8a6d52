"""Which tokens a training run spares the middle blocks, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.config import FlowConfig, RoutingConfig
from latentflow.errors import UserError
from latentflow.models import DiT, UNet
from latentflow.models.routing import Route
from latentflow.training.loop.random_numbers import CounterRandom
from latentflow.training.losses import flow_loss
from latentflow.training.losses.alignment import Routing
from latentflow.training.losses.flow import FlowLoss

ROWS, SIDE = 6, 4
RUN = (1000, 10)  # samples of the run, and of a step


class Seeing(DiT):
    """Remembers what it was called with."""

    def forward(self, x: Tensor, t: Any, cond: Any = None, return_dict: bool = False, **asked: Any) -> Any:
        self.seen = {"x": x, "t": t, **asked}
        return super().forward(x, t, cond, return_dict, **asked)


def network() -> Seeing:
    torch.manual_seed(0)
    return Seeing(in_channels=2, width=16, depth=4, heads=2)


def stage(share: float = 0.5, **config: Any) -> FlowLoss:
    one = network()
    routing = Routing(RoutingConfig(route_share=share, **config), one, RUN) if share else None
    return flow_loss(one, FlowConfig(), 3, routing=routing)


def batch(start: int = 0, rows: int = ROWS) -> dict[str, Any]:
    numbers = list(range(start, start + rows))
    latents = torch.randn(1, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"latents": latents.expand(rows, -1, -1, -1), "sample_ids": numbers}


def route_of(one: FlowLoss, **given: Any) -> Route | None:
    one(batch(**given))
    return one.network.seen.get("route")


def test_which_tokens_skip_depends_on_the_running_number_alone() -> None:
    one = stage()
    together, alone = route_of(one), route_of(one, start=4, rows=1)
    assert together is not None and alone is not None
    assert together.kept.shape == (ROWS, SIDE * SIDE // 2)
    assert torch.equal(together.kept[4:5], alone.kept)
    assert (together.kept.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in together.kept.tolist()}) == ROWS


def test_every_token_is_as_likely_as_any_other() -> None:
    routing = Routing(RoutingConfig(route_share=0.75), network(), RUN)
    route = routing((4000, 2, SIDE, SIDE), CounterRandom(0, list(range(4000))), 0)
    assert route is not None
    counts = route.kept.flatten().bincount(minlength=16)
    assert counts.sum() == 4000 * 4
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_routing_changes_neither_noise_nor_time() -> None:
    routed, plain = stage(), stage(0.0)
    for one in (routed, plain):
        one(batch())
    for name in ("x", "t"):
        assert torch.equal(routed.network.seen[name], plain.network.seen[name])


def test_validation_does_not_route() -> None:
    routed, plain = stage().eval(), stage(0.0).eval()
    assert torch.equal(routed(batch())["loss"], plain(batch())["loss"])
    assert "route" not in routed.network.seen


@pytest.mark.parametrize(("until", "last"), [(0.9, 90), (0.5, 50), (0.555, 55), (1.0, 10**6), (0.0, 0)])
def test_routing_ends_with_a_whole_step(until: float, last: int) -> None:
    one = stage(route_until=until)
    steps = [step for step in (0, last - 1, last, 99) if 0 <= step < 100]
    for step in steps:
        for start in (step * 10, step * 10 + 4):  # both passes of the step
            assert (route_of(one, start=start) is not None) == (step < last)


@pytest.mark.parametrize(("blocks", "expected"), [((1, -1), (1, 3)), ((0, 4), (0, 4)), ((-3, 2), (1, 2))])
def test_blocks_count_from_either_end(blocks: tuple[int, int], expected: tuple[int, int]) -> None:
    route = route_of(stage(route_blocks=blocks))
    assert route is not None and (route.first, route.last) == expected


@pytest.mark.parametrize("blocks", [(2, 2), (3, 1), (0, 5), (-5, 2), (1, -3)])
def test_blocks_that_leave_none_to_skip_are_refused(blocks: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"(?s)--route-blocks.*of 4 blocks.*first < last <= 4"):
        stage(route_blocks=blocks)


@pytest.mark.parametrize("choice", [{"route_share": 1.0}, {"route_share": -0.1}, {"route_until": 1.5}])
def test_shares_outside_their_bounds_are_refused(choice: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(choice))):
        RoutingConfig(**choice)


def test_a_unet_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"(?s)a DiT.*--network dit"):
        Routing(RoutingConfig(route_share=0.5), UNet(channels=(16, 32), head_dim=16), RUN)
