"""Inpainting without training: what every method keeps to, and what the single ones claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import INPAINTING, PATHS, SOLVERS, CondOT, Counted, integrate
from latentflow.flow.inpainting.base import KnownRegion
from latentflow.flow.inpainting.particles import look_ahead
from latentflow.flow.inpainting.replacement import _passages

from .closed_forms import gaussian_velocity, seeded

Method = Callable[..., Tensor]
METHODS = pytest.mark.parametrize("name", INPAINTING)
#: Those that take a solver.
STEPPED = [name for name in INPAINTING if name in ("replacement", "repaint")]
SHAPE = (3, 2, 2, 3)
velocity = gaussian_velocity(1.0, 0.5)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """x0, known, mask: float32, nothing but NaN where nothing is known, and a soft mask."""
    mask = torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.0, 1.0]]).expand(SHAPE[0], 1, 2, 3)
    known = torch.randn(SHAPE, generator=seeded(1)).masked_fill(mask > 0, math.nan)
    return torch.randn(SHAPE, generator=seeded(2)), known, mask


def times(steps: int, start: float = 0.0) -> Tensor:
    return torch.linspace(start, 1.0, steps + 1, dtype=torch.float64)


@METHODS
@pytest.mark.parametrize("start", [0.0, 0.6])
@pytest.mark.parametrize("path", PATHS)
def test_known_region_ends_exactly_known(
    name: str, start: float, path: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    x0, known, mask = problem
    x = INPAINTING[name](velocity, x0, known, mask, times(6, start), path=PATHS[path](), generator=seeded())
    kept = (mask == 0).expand(SHAPE)
    if float(PATHS[path]().sigma(torch.tensor(1.0))) == 0.0:  # else some noise is left at the end
        assert torch.equal(x[kept], known[kept])
    assert torch.isfinite(x).all()
    assert not torch.isclose(x[~kept], x0[~kept], atol=1e-3).any()


@METHODS
def test_nothing_known_is_sampling_and_all_known_is_known(
    name: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    x0, _, mask = problem
    known = torch.zeros(SHAPE)
    everything = INPAINTING[name](velocity, x0, known + 2, 0 * mask, times(5), generator=seeded())
    assert torch.equal(everything, known + 2)
    if name == "replacement":
        free = INPAINTING[name](velocity, x0, known, torch.ones(SHAPE), times(5), solver="heun")
        torch.testing.assert_close(free, integrate(velocity, x0, times(5), "heun"))


@METHODS
def test_cost_callback_and_progress(name: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """One evaluation a step; each step is reported once, in order, and the bar moves with them."""
    x0, known, mask = problem
    counted, seen, bar = Counted(velocity), [], []

    def callback(index: int, t: Tensor, x: Tensor) -> Tensor:
        seen.append((index, float(t)))
        return torch.full_like(x, 7.0) if index == 10 else x

    settings = {"solver": "euler"} if name == "replacement" else {}
    x = INPAINTING[name](
        counted, x0, known, mask, times(11), generator=seeded(), callback=callback,
        progress=lambda indices: (bar.append(i) or i for i in indices), **settings,
    )  # fmt: skip
    assert counted.evaluations == 11
    assert [index for index, _ in seen] == bar == list(range(11))
    assert seen[-1][1] == 1.0
    kept = (mask == 0).expand(SHAPE)
    assert bool((x[~kept] == 7.0).all())  # what the callback returns replaces x, but never what is known
    assert torch.equal(x[kept], known[kept])


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_solver_holds_the_known_region_on_its_way(
    name: str, solver: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    x0, known, mask = problem
    kept, on_way = (mask == 0).expand(SHAPE), []

    def callback(index: int, t: Tensor, x: Tensor) -> None:
        on_way.append((x[kept] - t * known[kept]) / (1 - t) if t < 1 else x0[kept])

    x = INPAINTING[name](
        velocity, x0, known, mask, times(6), solver=solver, generator=seeded(), callback=callback
    )
    assert torch.equal(x[kept], known[kept])
    if name != "repaint":  # its noise is drawn anew
        for noise in on_way:
            torch.testing.assert_close(noise, x0[kept], atol=1e-4, rtol=0.0)


@METHODS
def test_mistakes_are_named(name: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, known, mask = problem
    mistakes: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"known": torch.zeros(1, 2, 2, 3)}, ValueError, "known has shape"),
        ({"mask": torch.zeros(3, 1, 4, 4)}, ValueError, "mask has shape"),
        ({"mask": torch.zeros(2, 3, 1, 2, 3)}, ValueError, "mask has shape"),
        ({"times": [1.0, 0.5, 0.0]}, UserError, "times must increase"),
    ]
    if name != "replacement":  # which draws no noise
        mistakes += [({"generator": [seeded()]}, ValueError, "1 generators for 3 rows")]
    if name not in STEPPED:
        mistakes += [({"solver": "heun"}, UserError, f"'{name}' takes steps of its own.* solver 'heun'")]
    if name == "repaint":
        mistakes += [({setting: 0}, UserError, f"{setting} 0") for setting in ("jump", "resamplings")]
    if name == "twisted":
        mistakes += [
            ({"particles": 2}, UserError, "3 rows cannot be divided into runs of 2 particles"),
            ({"particles": 3}, UserError, "3 rows .* differ in their known values or masks"),
        ]
    for change, error, message in mistakes:
        with pytest.raises(error, match=message):
            INPAINTING[name](velocity, **{"x0": x0, "known": known, "mask": mask, "times": times(4)} | change)


def test_particles_of_one_image_are_drawn_by_their_first_generator_and_images_by_their_own(problem) -> None:
    """Rows of an image depend on its generators alone; which of them are drawn anew, on the first of these."""
    x0, known, mask = (value[:1].expand(6, -1, -1, -1).clone() for value in problem)
    x0 = torch.randn(x0.shape, generator=seeded(3))

    def filled(seeds: list[int], rows: slice = slice(None)) -> Tensor:
        generators = [seeded(seed) for seed in seeds]
        arguments = velocity, x0[rows], known[rows], mask[rows], times(8)
        return INPAINTING["twisted"](*arguments, generator=generators, particles=3)

    both = filled([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(filled([3, 4, 5], slice(3, 6)), both[3:])
    assert torch.equal(filled([0, 1, 2, 9, 4, 5])[:3], both[:3])
    assert not torch.allclose(filled([0, 1, 2, 9, 4, 5])[3:], both[3:])


@pytest.mark.parametrize("jump", [1, 2, 5])
@pytest.mark.parametrize("resamplings", [1, 3, 10])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 50])
def test_repaint_plans_as_many_steps_as_times(count: int, jump: int, resamplings: int) -> None:
    plan = _passages(count, jump, resamplings)
    assert sum(steps for _, _, steps, _ in plan) == count
    assert all(1 <= steps <= jump for _, _, steps, _ in plan)
    assert plan[0][0] == 0 and plan[-1][1] == pytest.approx(count)
    for (start, end, _, again), (next_start, _, _, _) in itertools.pairwise(plan):
        assert next_start == pytest.approx(start if again else end)
        assert not (again and start == 0)  # back to pure noise: all would be forgotten
    assert not plan[-1][3]
    passes = [sum(start == other[0] for other in plan) for start, *_ in plan]
    assert max(passes) <= resamplings


def test_repaint_without_repetition_is_replacement(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    plain = INPAINTING["replacement"](velocity, *problem, times(7), solver="heun")
    once = INPAINTING["repaint"](velocity, *problem, times(7), solver="heun", resamplings=1)
    torch.testing.assert_close(once, plain)


COVARIANCE = torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.5, 0.2], [0.3, 0.2, 0.5]], dtype=torch.float64)


def gaussian_data(x: Tensor, t: float) -> Tensor:
    """E[x1 | x_t = x] along the last dimension."""
    gain = t * COVARIANCE @ torch.linalg.inv(t * t * COVARIANCE + (1 - t) ** 2 * torch.eye(3))
    return x @ gain.T


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    time = min(float(t), 1.0 - 1e-9)
    return (gaussian_data(x, time) - x) / (1.0 - time)


def test_gradient_moves_the_data_by_the_covariance_that_the_flow_implies() -> None:
    """(sigma^2 / alpha) dD/dx is Cov(x1 | x_t), so the shift is Cov(x1, known | x_t) (known - D) / r^2."""
    t, x = 0.4, torch.randn(5, 1, 1, 3, generator=seeded(), dtype=torch.float64)
    hole = torch.tensor([False, True, True])
    known = KnownRegion(torch.tensor([1.3, 0.0, 0.0], dtype=torch.float64).expand(x.shape), hole, CondOT())
    ahead = look_ahead(lambda y: gaussian_velocity(y, torch.tensor(t)), known, x, t)
    precision = torch.linalg.inv(COVARIANCE) + (t / (1 - t)) ** 2 * torch.eye(3)
    covariance = torch.linalg.inv(precision)
    data, variance = gaussian_data(x, t), (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(ahead.data, data)
    torch.testing.assert_close(ahead.shift, covariance[:, 0] * (1.3 - data[..., :1]) / variance)
    torch.testing.assert_close(ahead.log_likelihood, -0.5 * (1.3 - data[:, 0, 0, 0]).square() / variance)


def test_a_velocity_without_a_graph_is_looked_through_only_where_it_does_not_depend_on_x() -> None:
    """For v = c the data are x + (1 - t) c, whose derivative is 1; a hidden derivative is refused."""
    t, x, c = 0.4, torch.randn(5, 3, generator=seeded(), dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    known = KnownRegion(torch.full_like(x, 1.3), torch.tensor([False, True, True]), CondOT())
    ahead = look_ahead(lambda y: c.expand_as(y), known, x, t)
    shift = ((1 - t) ** 2 + t**2) / t * (1.3 - x[:, 0] - (1 - t))
    torch.testing.assert_close(ahead.shift[:, 0], shift)
    assert not ahead.shift[:, 1:].any()
    with pytest.raises(UserError, match="no graph to x, so its gradient is unknown"):
        look_ahead(lambda y: -y.detach(), known, x, t)


def test_pnp_flow_ends_near_the_conditional_mean() -> None:
    """Against the standard error of iid conditional samples: the mean is right, the spread below theirs."""
    rows, y = 2000, 1.5
    x0 = torch.randn(rows, 1, 1, 3, generator=seeded(), dtype=torch.float64)
    known, mask = torch.full_like(x0, y), torch.tensor([0.0, 1.0, 1.0])
    x = INPAINTING["pnp-flow"](gaussian_velocity, x0, known, mask, times(200), generator=seeded(1))
    hole = x[:, 0, 0, 1:]
    mean = COVARIANCE[1:, 0] * y / COVARIANCE[0, 0]
    spread = (COVARIANCE[1:, 1:] - COVARIANCE[1:, :1] @ COVARIANCE[:1, 1:]).diagonal().sqrt()
    torch.testing.assert_close(hole.mean(0), mean, atol=0.1, rtol=0.0)
    assert bool((hole.std(0) < 0.8 * spread).all())
