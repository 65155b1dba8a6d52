from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import SOLVERS, CondOT, Counted, NonStationary, integrate, time_grid
from latentflow.flow.tuning import FINE, Ends, cost, rms, starts, tune

from .closed_forms import Watched


def exact(velocity, x: Tensor) -> Ends:
    return Ends(velocity, x, integrate(velocity, x, [0.0, 1.0], "dopri5", rtol=1e-9, atol=1e-9))


@pytest.fixture
def problem(mixture, draw) -> tuple[Ends, Ends]:
    """Noises to fit to, and others, of a mixture in eight dimensions, with their exact ends."""
    velocity = mixture.on(CondOT())
    return exact(velocity, draw(48, 8)), exact(velocity, draw(200, 8))


def test_at_8_evaluations_a_tuned_solver_is_nearer_than_heun_at_40(problem) -> None:
    batch, other = problem
    tuned = tune([batch], time_grid(8), rounds=8)
    counted = Counted(other.velocity)
    ends = integrate(counted, other.start, tuned.times, tuned.solver())
    heun = rms(integrate(other.velocity, other.start, time_grid(20), "heun") - other.end)
    found = rms(ends - other.end)
    assert counted.evaluations == 8
    assert found.mean() < heun.mean() and found.median() < heun.median()


def test_tuning_helps_at_every_number_of_steps_and_more_steps_help(problem) -> None:
    batch, other = problem
    errors = []
    for steps in (1, 2, 4, 8):
        untuned, tuned = (tune([batch], time_grid(steps), rounds=rounds) for rounds in (0, 3))
        errors.append(float(other.errors(tuned).mean()))
        assert steps == 1 or errors[-1] < 0.95 * float(other.errors(untuned).mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]


def test_without_rounds_it_converges_as_its_start_does(problem) -> None:
    batch, other = problem
    coarse, fine = (float(other.errors(tune([batch], time_grid(n), rounds=0)).mean()) for n in (20, 40))
    assert fine < coarse / 3


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_a_constant_velocity_is_integrated_exactly(problem, draw, steps) -> None:
    tuned = tune([problem[0]], time_grid(steps), rounds=1)
    assert (tuned.times[0], tuned.times[-1]) == (0.0, 1.0)
    for numbers in (tuned, *starts(time_grid(steps).tolist())):
        x, way = draw(3, 2), draw(3, 2)
        moved = integrate(lambda x, t, way=way: way, x, numbers.times, numbers.solver())
        torch.testing.assert_close(moved, x + way, atol=1e-13, rtol=0)


def test_tuning_costs_as_many_evaluations_as_it_says_and_stays_within_the_times(mixture, draw) -> None:
    watched, times = Watched(mixture.on(CondOT())), [0.1, 0.4, 0.6, 0.9]
    batch = Ends.of(watched, draw(6, 3), times)
    assert len(watched.calls) == FINE
    tune([batch], times, rounds=1)
    assert min(watched.times) == 0.1 and max(watched.times) < 0.9
    assert 6 * (len(watched.calls) - FINE) == cost(3, [6])


@pytest.mark.parametrize("name", ["euler", "adams-bashforth-2", "adams-bashforth-3", "dpm-solver++2m"])
def test_multistep_methods_are_such_numbers(mixture, draw, name) -> None:
    velocity, x, times = mixture.on(CondOT()), draw(5, 2), time_grid(6, 1.5)
    numbers = NonStationary.of(SOLVERS[name], times.tolist())
    expected = integrate(velocity, x, times, name)
    torch.testing.assert_close(integrate(velocity, x, times, numbers.solver()), expected)


def test_where_steps_are_too_long_for_extrapolation_each_row_falls_back_on_its_own() -> None:
    """x follows cos(t): in one row at a rate for which the steps are too long, in another at a slow one."""
    rates = torch.tensor([[34.0], [1.0]], dtype=torch.float64)

    def velocity(rates: Tensor):
        return lambda x, t: -rates * (x - torch.cos(t)) - torch.sin(t)

    x = torch.tensor([[1.5], [0.0]], dtype=torch.float64)
    times = time_grid(24)
    together = integrate(velocity(rates), x, times, "exponential-adams")
    assert abs(float(together[0]) - math.cos(1.0)) < 0.05
    assert abs(float(integrate(velocity(rates[:1]), x[:1], times, "adams-bashforth-2")) - math.cos(1.0)) > 1.0
    for row in range(2):
        part = slice(row, row + 1)
        alone = integrate(velocity(rates[part]), x[part], times, "exponential-adams")
        assert torch.equal(together[part], alone)


@pytest.mark.parametrize(
    ("times", "increments", "message"),
    [
        ((0.0, 0.5, 1.0), ((0.5,), (0.1, 0.5)), "step 2 of a stored solver goes 0.6 far, not 0.5"),
        ((0.0, 0.5, 1.0), ((math.nan,), (0.1, 0.4)), "step 1 of a stored solver goes nan far"),
        ((0.0, 0.5, 1.0), ((0.5,), (0.5,)), r"2 steps has rows of \[1, 1\] numbers"),
        ((0.0, 0.5, 0.5), ((0.5,), (0.0, 0.0)), "the times of a stored solver"),
        ((0.0, math.nan), ((1.0,),), "the times of a stored solver"),
        ((0.0,), (), "the times of a stored solver"),
    ],
)
def test_numbers_that_are_no_solver_are_refused(times, increments, message) -> None:
    with pytest.raises(UserError, match=message):
        NonStationary(times, increments)


def test_it_goes_along_its_own_times_only(draw) -> None:
    numbers = NonStationary((0.0, 0.5, 1.0), ((0.5,), (-0.25, 0.75)))
    for times in ([0.0, 0.4, 1.0], [1.0, 0.5, 0.0], [0.0, 0.5, 0.9]):
        with pytest.raises(UserError, match="which is none of its 2"):
            integrate(lambda x, t: x, draw(1, 2), times, numbers.solver())
    with pytest.raises(UserError, match="nothing to tune"):
        tune([], time_grid(2))
