"""Solvers at an end of time where a prediction does not determine the velocity.

Data says nothing of the noise at t = 1, noise and score nothing of the data at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentflow.flow import (
    INPAINTING,
    SOLVERS,
    CondOT,
    Counted,
    VariancePreserving,
    Velocity,
    as_velocity,
    change_path,
    flow_edit,
    guide,
    integrate,
    time_grid,
)
from latentflow.flow.solvers import BY_ROW

from .closed_forms import Watched, seeded

#: Euler-Maruyama adds noise in its last step too, whatever is predicted, velocities included.
ENDS_CLEAN = [name for name in SOLVERS if name != "euler-maruyama"]
FIXED = [name for name, solver in SOLVERS.items() if not solver.stochastic and solver.evaluations is not None]


def point(value: float) -> Velocity:
    """Return the exact prediction of an end of the path that is always ``value``."""
    return lambda x, t: torch.full_like(x, value)


def exact(mixture, source: str) -> Velocity:
    """Return the exact ``source`` prediction of a mixture on the straight path."""
    end = {"data": 0, "noise": 1}[source]
    return lambda x, t: mixture.ends(CondOT(), x, t)[end]


@pytest.mark.parametrize("solver", ENDS_CLEAN)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_step_into_the_end_lands_on_the_prediction(draw, solver, steps) -> None:
    """Of data that are one point no noise is left, backward no data where all the noise is one."""
    x, times = draw(5, 2), time_grid(steps)
    network = Watched(point(1.5))
    ended = integrate(as_velocity(network, CondOT(), "data"), x, times, solver, generator=seeded())
    torch.testing.assert_close(ended, torch.full_like(x, 1.5), atol=1e-12, rtol=0)
    assert max(network.times) < 0.996
    if not SOLVERS[solver].stochastic:
        network = Watched(point(-0.5))
        velocity = as_velocity(network, CondOT(), "noise")
        ended = integrate(velocity, x, times.flip(0), solver)
        torch.testing.assert_close(ended, torch.full_like(x, -0.5), atol=1e-12, rtol=0)
        assert min(network.times) > 0.004


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("source", ["data", "noise"])
@pytest.mark.parametrize("solver", [name for name in FIXED if name != "dpm-solver++2m"])
def test_the_order_is_kept_up_to_the_second(mixture, draw, solver, source, backward) -> None:
    """DPM-Solver++ is left out, whose steps in log-SNR are not small at the ends."""
    x = draw(64, 2)
    exactly = integrate(mixture.on(CondOT()), x, time_grid(800), "rk4")
    start, end = (exactly, x) if backward else (x, exactly)
    velocity = as_velocity(exact(mixture, source), CondOT(), source)

    def error(steps: int) -> float:
        times = time_grid(steps)
        ended = integrate(velocity, start, times.flip(0) if backward else times, solver)
        return float((ended - end).square().mean().sqrt())

    assert math.log2(error(24) / error(48)) > min(SOLVERS[solver].order, 2) - 0.25


@pytest.mark.parametrize("solver", ["dopri5", BY_ROW["dopri5"]])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("source", ["data", "noise"])
def test_steps_that_adapt_end_within_a_small_error(gaussian, draw, solver, source, backward) -> None:
    x = draw(8, 2)
    start, end = (1.5 + 0.4 * x, x) if backward else (x, 1.5 + 0.4 * x)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return exact(gaussian, source)(x, t.reshape(-1, 1) if t.ndim else t)

    counted = Counted(as_velocity(network, CondOT(), source))
    times = [1.0, 0.0] if backward else [0.0, 1.0]
    ended = integrate(counted, start, times, solver, rtol=1e-6, atol=1e-6)
    assert (ended - end).abs().max() < 1e-3
    assert counted.evaluations < 300


@pytest.mark.parametrize(("source", "backward"), [("data", True), ("noise", False)])
@pytest.mark.parametrize("solver", ["euler", "heun", "exponential-adams"])
def test_a_step_out_of_the_end_does_not_magnify_the_networks_error(
    gaussian, draw, source, backward, solver
) -> None:
    """An error of 0.03 beside that of the exact prediction: evaluated at t = 0.995 it came to 0.6 to 1.2 from data."""
    x = draw(640, 2)
    start, end = (1.5 + 0.4 * x, x) if backward else (x, 1.5 + 0.4 * x)
    times = time_grid(8).flip(0) if backward else time_grid(8)

    def ended(error: float) -> Tensor:
        network: Callable[..., Tensor] = lambda x, t: (  # noqa: E731
            exact(gaussian, source)(x, t) + error * torch.sin(20 * x)
        )
        return integrate(as_velocity(network, CondOT(), source), start, times, solver)

    assert (ended(0.03) - ended(0.0)).square().mean().sqrt() < 0.15
    assert (ended(0.0) - end).square().mean().sqrt() < 0.2


def test_what_wraps_the_velocity_does_not_hide_the_end(draw) -> None:
    """Guided, on another path than trained on, while inpainting and while editing."""
    x, path = draw(3, 1, 2, 2), VariancePreserving()
    velocities = [
        change_path(as_velocity(point(value), path, "data"), path, CondOT()) for value in (1.0, 0.5)
    ]
    guided = guide(*velocities, 2.0)
    torch.testing.assert_close(integrate(guided, x, time_grid(5), "heun"), torch.full_like(x, 1.5))
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).expand(3, 1, 2, 2)
    filled = INPAINTING["replacement"](
        guided, x, torch.zeros_like(x), mask, time_grid(5), solver="heun", generator=seeded()
    )
    torch.testing.assert_close(filled, 1.5 * mask.double())
    edited = flow_edit(
        velocities[1], velocities[0], torch.full_like(x, 0.5), time_grid(5), "heun", generator=seeded()
    )
    torch.testing.assert_close(edited, torch.ones_like(x))
