"""A network is handed to every function of the flow as it is, and so is any other callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentflow.flow import (
    EDITING,
    INPAINTING,
    SOLVERS,
    CondOT,
    Counted,
    VariancePreserving,
    as_velocity,
    change_path,
    guide,
    guide_batched,
    integrate,
    log_likelihood,
    reflow_pairs,
    straightness,
)

ROWS = 5  # as many as x is wide: a t of shape (B,) that broadcasts along the width would be silently wrong


class Network(nn.Module):
    """What a user trains on ``path.sample(x0, x1, t)`` with t of shape (B,)."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1] and t.dtype == x.dtype
        return self.slope * x * (1 - t[:, None])


def plain(slope: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: slope * x * (1 - (t[:, None].to(x) if t.ndim else t.to(x)))


def x() -> Tensor:
    return torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(0))


def sampled(velocity: Any, solver: str = "heun") -> Tensor:
    return integrate(
        velocity, x(), torch.linspace(0, 1, 4), solver, generator=torch.Generator().manual_seed(1)
    )


def edited(name: str) -> Callable[[Any], Tensor]:
    def made(make: Any) -> Tensor:
        settings = {"generator": torch.Generator().manual_seed(1)} if name == "flowedit" else {}
        return EDITING[name](make(-0.4), make(0.3), x(), torch.linspace(0.2, 1, 4), **settings)

    return made


def filled(name: str) -> Callable[[Any], Tensor]:
    mask = torch.zeros(ROWS, 1)
    mask[::2] = 1.0
    return lambda make: INPAINTING[name](
        make(-0.4),
        x(),
        x().flip(0),
        mask,
        torch.linspace(0, 1, 4),
        generator=torch.Generator().manual_seed(1),
    )


# name -> (slope -> velocity) -> what comes out of it
FUNCTIONS: dict[str, Callable[[Any], Tensor]] = {
    **{f"integrate {solver}": lambda make, s=solver: sampled(make(-0.4), s) for solver in SOLVERS},  # type: ignore[misc]
    **{f"edit {name}": edited(name) for name in EDITING},
    **{f"inpaint {name}": filled(name) for name in INPAINTING},
    "a score": lambda make: integrate(
        make(-0.4),
        x(),
        [0.1, 0.5, 0.9],
        "euler-maruyama",
        score=make(-1.0),
        generator=torch.Generator().manual_seed(1),
    ),
    "counted": lambda make: sampled(Counted(make(-0.4))),
    "guide": lambda make: sampled(guide(make(-0.4), make(0.3), 2.0)),
    "guide_batched": lambda make: sampled(guide_batched(make(-0.4), make(-0.4), 2.0)),
    "change_path": lambda make: sampled(change_path(make(-0.4), CondOT(), VariancePreserving())),
    "as_velocity": lambda make: sampled(as_velocity(make(-0.4), CondOT(), "data")),
    "as_velocity of a velocity": lambda make: sampled(as_velocity(make(-0.4), CondOT(), "velocity")),
    "log_likelihood": lambda make: log_likelihood(make(-0.4), x()),
    "reflow_pairs": lambda make: reflow_pairs(make(-0.4), x(), [0, 0.5, 1])[1],
    "straightness": lambda make: straightness(make(-0.4), x(), [0, 0.5, 1]),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_network_gets_a_time_for_each_row_and_is_followed_as_its_formula_is(function: str) -> None:
    of_network, of_formula = FUNCTIONS[function](Network), FUNCTIONS[function](plain)
    assert torch.isfinite(of_network).all()
    torch.testing.assert_close(of_network, of_formula, rtol=1e-5, atol=1e-6)


def test_any_other_callable_gets_a_scalar_so_that_a_formula_is_right_for_every_shape() -> None:
    shapes = []

    def velocity(y: Tensor, t: Tensor) -> Tensor:
        shapes.append(t.shape)
        return (1 - y) * t

    for shape in [(ROWS, ROWS), (2, 3, 4, 4)]:
        integrate(velocity, torch.zeros(shape), [0, 0.5, 1])
    assert set(shapes) == {()}


def test_in_half_precision_a_network_gets_times_that_half_precision_could_not_tell_apart() -> None:
    seen = []

    class Half(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return torch.zeros_like(y)

    integrate(Half(), torch.zeros(2, 3, dtype=torch.bfloat16), [0.9, 0.9001, 0.9002], "euler")
    assert [t.dtype for t in seen] == [torch.float32] * 2
    assert float(seen[1][0] - seen[0][0]) == pytest.approx(1e-4, rel=1e-2)
