from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import (
    SOLVERS,
    CondOT,
    Counted,
    Polynomial,
    Trigonometric,
    VariancePreserving,
    integrate,
    time_grid,
)
from latentflow.flow.solvers import BY_ROW, adams_bashforth
from latentflow.flow.solvers.exponential import exponential_adams

from .closed_forms import Watched, gaussian_velocity, seeded

DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]
FIXED = [name for name in DETERMINISTIC if SOLVERS[name].evaluations is not None]
MULTISTEP = ["adams-bashforth-2", "adams-bashforth-3", "dpm-solver++2m", "exponential-adams"]
ONE_STEP = [name for name in FIXED if name not in MULTISTEP]
#: `exponential-adams` that never falls back
WHOLE = replace(SOLVERS["exponential-adams"], start=partial(exponential_adams, limited=False))


@pytest.fixture
def velocity(gaussian):
    """The exact velocity from N(0, 1) to N(1.5, 0.4^2), whose flow maps x0 to 1.5 + 0.4 x0."""
    return gaussian.on(CondOT())


def cosine_grid(steps: int) -> Tensor:
    return torch.sin(time_grid(steps) * math.pi / 2) ** 2


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grid", [time_grid, cosine_grid])
def test_order_of_convergence(mixture, draw, solver, backward, grid) -> None:
    """A mixture, since on a Gaussian the errors of the first steps and of the others may cancel. A path that is not
    straight, since there the leading error of the midpoint rule vanishes for every Gaussian. The ends are left out for
    the exponential solver: its steps in log-SNR do not become small there."""
    x, (low, high) = draw(32, 2), (0.05, 0.95) if solver == "dpm-solver++2m" else (0.0, 1.0)
    velocity = mixture.on(Trigonometric())

    def times(steps: int) -> Tensor:
        t = low + (high - low) * grid(steps)
        return t.flip(0) if backward else t

    exact = integrate(velocity, x, times(400), "rk4")

    def error(evaluations: int) -> float:
        steps = evaluations // SOLVERS[solver].evaluations
        end = integrate(velocity, x, times(steps), solver, path=Trigonometric())
        return float((end - exact).square().mean().sqrt())

    slope = math.log2(error(200) / error(400))
    assert abs(slope - SOLVERS[solver].order) <= 0.25


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_a_polynomial_below_the_order_is_exact(solver) -> None:
    """dx/dt = (k + 1) t^k ends at 1 exactly for k < order (the quadrature conditions of a tableau), k = 0 for all."""
    for k in range(SOLVERS[solver].order if solver in ONE_STEP else 1):
        x0 = torch.zeros(1, dtype=torch.float64)
        end = integrate(lambda x, t, k=k: (k + 1) * t**k * torch.ones_like(x), x0, [0, 0.3, 1], solver)
        assert abs(float(end) - 1) < 1e-14


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "times", [(0.0, 1.0), (1.0, 0.0), (0.1, 0.7), (0.7, 0.3, 0.1), tuple(time_grid(7, 3.0).tolist())]
)
def test_evaluations_are_as_declared_and_within_the_times(velocity, draw, solver, times) -> None:
    watched, entry = Watched(velocity), SOLVERS[solver]
    integrate(watched, 3 * draw(3, 2), times, solver, generator=seeded())
    assert min(times) <= min(watched.times) and max(watched.times) <= max(times)
    assert entry.stochastic or watched.times[0] == times[0]
    assert entry.evaluations is None or len(watched.times) == (len(times) - 1) * entry.evaluations


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.2, 0.9, 1.0]])
def test_adaptive_keeps_its_tolerance_and_pays_for_it(velocity, draw, times) -> None:
    x0, cost = draw(16, 2), []
    for tolerance in (1e-3, 1e-6, 1e-9):
        watched = Watched(velocity)
        x1 = integrate(watched, x0, times, "dopri5", rtol=tolerance, atol=tolerance)
        assert (x1 - (1.5 + 0.4 * x0)).abs().max() < 30 * tolerance
        cost.append(len(watched.times))
    assert cost == sorted(cost) and cost[0] < 30 * (len(times) - 1) and cost[0] < cost[-1] < 600
    # A velocity that is tiny at the start invites a huge first step: never out of the interval.
    watched = Watched(lambda x, t: 1e4 * t**4 * torch.cos(20 * t) + 1e-9 * x)
    integrate(watched, torch.ones(2, 2).double(), [0.0, 1.0], "dopri5")
    assert min(watched.times) >= 0 and max(watched.times) <= 1


@pytest.mark.parametrize(("times", "turn"), [([0.0, 1.0], 1.5), ([1.0, 0.3, 0.0], -1.5)])
@pytest.mark.parametrize("name", BY_ROW)
def test_rows_that_step_on_their_own_do_not_depend_on_one_another(name, times, turn, draw) -> None:
    """One row turns fast and needs short steps, another is still: beside one another they are as they are alone."""
    speeds = torch.tensor([0.0, 1.0, 40.0], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor, speeds: Tensor = speeds) -> Tensor:
        turned = torch.stack([-x[:, 1], x[:, 0]], 1)
        return (speeds * (1.0 + t))[:, None] * turned  # by speed * (t + t^2 / 2) in all

    x0 = draw(3, 2)
    together = integrate(velocity, x0, times, BY_ROW[name], rtol=1e-6, atol=1e-6)
    cost = []
    for row in range(3):
        counted = Counted(lambda x, t, row=row: velocity(x, t, speeds[row : row + 1]))
        alone = integrate(counted, x0[row : row + 1], times, BY_ROW[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(together[row : row + 1], alone)
        cost.append(counted.evaluations)
    assert 4 * cost[0] < cost[2]
    exact = torch.view_as_complex(x0) * torch.polar(torch.ones(3).double(), speeds * turn)
    assert (together - torch.view_as_real(exact)).abs().max() < 1e-3


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_the_flow_of_a_gaussian_is_affine_and_runs_back(velocity, draw, solver) -> None:
    x0, order, tight = draw(16, 2), SOLVERS[solver].order, {"rtol": 1e-9, "atol": 1e-9}
    times = time_grid({1: 1000, 5: 4}.get(order, 200))
    x1 = integrate(velocity, x0, times, solver, **tight)
    assert (x1 - (1.5 + 0.4 * x0)).abs().max() < {1: 5e-3, 2: 1e-3, 3: 1e-5, 4: 1e-7, 5: 1e-7}[order]
    back = integrate(velocity, x1, times.flip(0), solver, **tight)
    assert (back - x0).abs().max() < {1: 1e-2, 2: 1e-3, 3: 1e-4, 4: 1e-6, 5: 1e-7}[order]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("times", [[0.0, 0.1, 0.3, 0.35, 0.8, 1.0], [0.9, 0.5, 0.4, 0.2, 0.0]])
def test_adams_bashforth_integrates_polynomials_below_its_order_exactly(order, times) -> None:
    """Exactly from the start on, once there are as many slopes as the order: the first steps are made good."""
    for degree in range(order):
        seen: list[float] = []
        integrate(
            lambda x, t, k=degree: (k + 1) * t**k * torch.ones_like(x),
            torch.full((1,), times[0] ** (degree + 1), dtype=torch.float64),
            times,
            f"adams-bashforth-{order}",
            callback=lambda i, t, x, seen=seen: seen.append(x.item()),
        )
        exact = [t ** (degree + 1) for t in times[1:]]
        assert seen[order - 1 :] == pytest.approx(exact[order - 1 :], abs=1e-14)
        assert seen[0] == pytest.approx(exact[0]) or degree > 0


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_callback_that_keeps_a_part_of_x_on_its_path_leaves_the_order(mixture, draw, solver) -> None:
    """Inpainting: half of x is replaced after every step, by where the flow would have taken it."""
    x0, known = draw(32, 2), {}
    velocity = mixture.on(CondOT())
    fine = time_grid(400)
    integrate(velocity, x0, fine, "rk4", callback=lambda i, t, x: known.__setitem__(round(t.item() * 400), x))

    def inpaint(index: int, t: Tensor, x: Tensor) -> Tensor:
        return torch.cat([known[round(t.item() * 400)][:, :1], x[:, 1:]], dim=1)

    def error(n: int) -> float:
        end = integrate(velocity, x0, fine[:: 400 // n], solver, callback=inpaint)
        return float((end - known[400]).abs().max())

    assert math.log(error(50) / error(200), 4) > 1.5


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_callback_that_moves_x_far_still_converges(velocity, draw, solver) -> None:
    """The slopes from before the jump are wrong for one step: an error of first order."""
    x0, elsewhere = draw(16, 2), draw(16, 2) + 2.0
    rest = [i / 400 for i in range(200, 401)]
    expected = integrate(velocity, elsewhere, rest, "rk4")

    def jump(index: int, t: Tensor, x: Tensor) -> Tensor | None:
        return elsewhere if t == 0.5 else None

    def error(n: int) -> float:
        return float((integrate(velocity, x0, time_grid(n), solver, callback=jump) - expected).abs().max())

    assert error(400) < 0.3 * error(100)
    assert error(400) < 0.02


@pytest.mark.parametrize("solver", ["dpm-solver++2m", "exponential-adams"])
@pytest.mark.parametrize("path", [Trigonometric(), CondOT(), CondOT(1e-4)])
def test_exponential_solvers_stay_finite_and_close_at_both_ends(mixture, draw, solver, path) -> None:
    x0 = draw(32, 2)
    velocity = mixture.on(path)
    there = integrate(velocity, x0, time_grid(200), solver, path=path)
    exact = integrate(velocity, x0, time_grid(200), "rk4")
    assert (there - exact).abs().max() < 5e-3
    back = integrate(velocity, exact, time_grid(200).flip(0), solver, path=path)
    assert (back - x0).abs().max() < 5e-3


def test_the_first_step_of_dpm_solver_is_ddim_and_the_second_is_the_papers(mixture, draw) -> None:
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2, in the paper's own lambda = log(alpha / sigma) and h."""
    path, times = Trigonometric(), torch.tensor([0.2, 0.45, 0.6], dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    h = (alpha / sigma).log().diff()
    x = draw(16, 2)
    ours: list[Tensor] = []
    velocity = mixture.on(path)
    integrate(velocity, x, times, "dpm-solver++2m", path=path, callback=lambda i, t, y: ours.append(y))
    first = mixture.ends(path, x, times[0])[0]
    x = sigma[1] / sigma[0] * x - alpha[1] * torch.expm1(-h[0]) * first
    torch.testing.assert_close(ours[0], x)
    second, r = mixture.ends(path, x, times[1])[0], h[0] / h[1]
    extrapolated = (1 + 1 / (2 * r)) * second - 1 / (2 * r) * first
    expected = sigma[2] / sigma[1] * x - alpha[2] * torch.expm1(-h[1]) * extrapolated
    torch.testing.assert_close(ours[1], expected)


def test_half_precision_adds_up_in_float32(draw) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, v = draw(32).to(dtype)[:, None], draw(32).to(dtype)[:, None]
        once = integrate(lambda x, t, v=v: v, x, [0.0, 1.0], "euler")
        assert torch.equal(once, (x.float() + v.float()).to(dtype))
    # 1000 steps of 0.001: summed in bfloat16 the sum would stall far from 1.
    end = integrate(lambda x, t: torch.ones_like(x), torch.zeros(1, 1).bfloat16(), time_grid(1000), "euler")
    assert abs(end.item() - 1) < 1e-2
    # 60000 is finite in float16, and stays so although the sum of 64 of them is not.
    huge = torch.full((64, 1), 60000.0, dtype=torch.float16)
    assert torch.equal(integrate(lambda x, t: huge, torch.zeros_like(huge), [0, 1], "euler"), huge)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_gradients_flow_through(solver) -> None:
    """d/dx0 of x0 e^(w t) is e^w, and d/dw is x0 e^w."""
    x0 = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    times = time_grid(400 if solver in FIXED else 4)
    w = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    integrate(lambda x, t: w * x, x0, times, solver, rtol=1e-9, atol=1e-9).sum().backward()
    tolerance = 2e-3 if SOLVERS[solver].order == 1 else 1e-5
    assert abs(float(x0.grad) - math.exp(-0.5)) < tolerance
    assert abs(float(w.grad) - 0.7 * math.exp(-0.5)) < tolerance


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_callback_sees_every_time_and_may_replace_x(velocity, draw, solver) -> None:
    x0, times, seen = draw(3, 2), [0.0, 0.3, 0.6, 1.0], []

    def watch(step: int, t: Tensor, x: Tensor) -> None:
        seen.append((step, t.item(), x))

    end = integrate(velocity, x0, times, solver, callback=watch)
    assert [(step, t) for step, t, _ in seen] == [(0, 0.3), (1, 0.6), (2, 1.0)]
    assert torch.equal(seen[-1][2], end)
    assert torch.equal(integrate(velocity, x0, times, solver), end)  # watching changes nothing
    torch.testing.assert_close(integrate(velocity, x0, times[:3], solver), seen[1][2])

    swapped = integrate(velocity, x0, times, solver, callback=lambda i, t, x: seen[1][2] if i == 1 else None)
    torch.testing.assert_close(swapped, end)
    assert torch.equal(integrate(velocity, x0, times, solver, callback=lambda i, t, x: x0), x0)


def test_progress_wraps_the_steps_and_shows_the_evaluations(velocity, draw, capfd, monkeypatch) -> None:
    wrapped: list[int] = []

    def progress(steps):
        for step in steps:
            wrapped.append(step)
            yield step

    counted, x = Counted(velocity), draw(3, 2)
    expected = integrate(counted, x, time_grid(4))
    assert torch.equal(integrate(counted, x, time_grid(4), progress=progress), expected)
    assert wrapped == [0, 1, 2, 3] and counted.evaluations == 16
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # elsewhere only long work shows lines
    assert torch.equal(integrate(velocity, x, time_grid(4), progress=True), expected)
    shown = capfd.readouterr().err
    assert "4/4" in shown and "evaluations=8" in shown


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_step_and_t(draw, solver, bad) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t >= 0.5, bad, 0.0) + 0 * x

    with pytest.raises(
        UserError, match=r"the velocity at t = 0\.5 in step [23] of 4 is not finite: 6 of 6 values"
    ):
        integrate(velocity, draw(3, 2), time_grid(4), solver)


def test_tolerances_that_cannot_be_met_are_named() -> None:
    """The velocity is noise at every scale from t = 0.5 on: the step size underflows."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t < 0.5, 0.0, 1e30) * torch.sin(1e30 * (x + t))

    x0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(UserError, match=r"(?s)dopri5 cannot meet rtol 1e-12.*on \[0, 1\].*larger tolerances"):
        integrate(velocity, x0, [0, 1], "dopri5", rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.5], "N \\+ 1 times"),
        (torch.tensor([[0.0, 1.0]]), "N \\+ 1 times"),
        (0.5, "N \\+ 1 times"),
        ([-0.1, 1.0], "must lie in \\[0, 1\\]"),
        (torch.tensor([0.0, 1.0 + 1e-9], dtype=torch.float64), "must lie in \\[0, 1\\]"),
        ([0.0, float("nan"), 1.0], "must lie in \\[0, 1\\].*nan"),
        ([0.0, 0.5, 0.5, 1.0], "strictly increase"),
        ([0.0, 0.6, 0.4, 1.0], "strictly increase.*0.6, 0.4"),
        ("0 1", "times are '0 1'"),
        (None, "times are None"),
        ([[0.0], [0.5, 1.0]], "times are"),
    ],
)
def test_bad_times_are_refused(times, message) -> None:
    def forbidden(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(AssertionError, match="evaluated"):  # an assertion of the network is left alone
        integrate(forbidden, torch.ones(1, 1), [0, 1])
    with pytest.raises(UserError, match=message):
        integrate(forbidden, torch.ones(1, 1), times)


HUGE = torch.full((1, 1), 1e308, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "huen"}, r"(?s)unknown solver 'huen'.*did you mean 'heun'"),
        ({"x": torch.ones(1, 1, dtype=torch.int64)}, "int64"),
        (
            {"velocity": lambda x, t: torch.ones(1, 2)},
            r"the velocity returned shape \(1, 2\), but must keep .* \(1, 1\)",
        ),
        ({"callback": lambda i, t, x: x[0]}, r"the callback returned shape \(1,\)"),
        ({"callback": lambda i, t, x: x * math.nan}, "the callback's x after step 1 is not finite"),
        # A start that is not finite is not blamed on the network.
        ({"x": torch.tensor([[1.0], [math.nan]])}, "the starting x at t = 0 is not finite: 1 of 2"),
        (
            {"x": HUGE, "velocity": lambda x, t: HUGE, "solver": "euler"},
            "x at t = 1 is not finite: 1 of 1",
        ),
    ],
)
def test_other_mistakes_are_named(velocity, change, message) -> None:
    with pytest.raises(UserError, match=message):
        integrate(**{"velocity": velocity, "x": torch.ones(1, 1), "times": [0, 1]} | change)
    for order in (0, 5):
        with pytest.raises(ValueError, match=f"order {order}: pass 1, 2, 3 or 4"):
            adams_bashforth(order)


@pytest.mark.parametrize(
    ("path", "times", "tolerance"),
    [
        (CondOT(), [0.0, 0.5, 1 - 1e-9, 1 - 1e-10, 1.0], 0.6),
        (CondOT(), time_grid(50), 0.01),
        (Polynomial(8.0), time_grid(50), 0.1),
        (Polynomial(8.0), time_grid(50).flip(0), 0.1),
    ],
)
def test_exponential_adams_does_not_divide_by_steps_that_rounding_hides(
    gaussian, draw, path, times, tolerance
) -> None:
    start = draw(4, 2)
    exact = 1.5 + 0.4 * start if times[0] == 0 else (start - 1.5) / 0.4
    shipped = 1.0 if times[0] == 1 else tolerance  # of the first slope there, which is exact, a half is taken
    for solver, most in ((WHOLE, tolerance), ("exponential-adams", shipped)):
        end = integrate(gaussian.on(path), start, times, solver, path=path)
        assert (end - exact).abs().max() < most


def test_exponential_adams_falls_back_in_steps_too_long_for_its_order(draw) -> None:
    """Where guidance is strong, few steps end nearer than those of either order; in short steps nothing changes."""
    mean, x = draw(16), draw(8, 16)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        unguided = gaussian_velocity(0.0, 1.0)(x, t)
        return unguided + 4.0 * (gaussian_velocity(mean, 0.6)(x, t) - unguided)

    exact = integrate(velocity, x, time_grid(400), "rk4")

    def end(steps: int, solver: Any) -> Tensor:
        return integrate(velocity, x, time_grid(steps, kind="sine"), solver)

    def error(steps: int, solver: Any) -> float:
        return float((end(steps, solver) - exact).square().mean().sqrt())

    for steps in (6, 8):
        assert error(steps, "exponential-adams") < 0.7 * min(error(steps, "euler"), error(steps, WHOLE))
    assert torch.equal(end(40, "exponential-adams"), end(40, WHOLE))


def test_exponential_adams_does_not_fall_back_where_the_data_prediction_starts_at_0(mixture, draw) -> None:
    """On a path that leaves the noise slowly, where the first-order part of the first steps nearly vanishes."""
    velocity, x, path = mixture.on(VariancePreserving()), draw(32, 2), VariancePreserving()
    exact = integrate(velocity, x, time_grid(400), "rk4")
    errors = [
        float((integrate(velocity, x, time_grid(80), solver, path=path) - exact).square().mean().sqrt())
        for solver in ("exponential-adams", WHOLE)
    ]
    assert errors[0] < 1.5 * errors[1]
