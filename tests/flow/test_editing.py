"""Editing on Gaussians, where every method has a closed form; slerp by the geometry of the sphere; float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import EDITING, SOLVERS, flow_edit, slerp

from .closed_forms import Watched, gaussian_velocity, seeded

Draw = Callable[..., Tensor]
SPREAD, SOURCE, TARGET = 0.5, -1.0, 2.0
source_velocity, target_velocity = (gaussian_velocity(mean, SPREAD) for mean in (SOURCE, TARGET))


def grid(start: float, steps: int) -> Tensor:
    return torch.linspace(start, 1.0, steps + 1, dtype=torch.float64)


def shift(start: float) -> float:
    """Return how far an edit from t = start on moves the data: the closed form in the module's docstring."""
    ratio = SPREAD / math.sqrt((start * SPREAD) ** 2 + (1 - start) ** 2)
    return (TARGET - SOURCE) * (1 - start * ratio)


def assert_normal(noise: Tensor) -> None:
    error = noise.numel() ** -0.5
    assert abs(float(noise.mean())) < 4 * error and abs(float(noise.var()) - 1) < 4 * 2**0.5 * error


@pytest.mark.parametrize("start", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("method", EDITING)
def test_an_edit_of_gaussians_moves_by_the_closed_form(method: str, start: float, draw: Draw) -> None:
    x1 = SOURCE + SPREAD * draw(3, 2, 4)
    edited = EDITING[method](source_velocity, target_velocity, x1, grid(start, 16), "rk4")
    torch.testing.assert_close(edited, x1 + shift(start), atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("method", [*EDITING, "there and back"])
def test_an_edit_has_its_solver_s_order(method: str, solver: str, draw: Draw) -> None:
    x1 = SOURCE + SPREAD * draw(8, 3)
    if method == "there and back":  # an inversion whose velocities are the same
        edit, target, exact, start = EDITING["inversion"], source_velocity, x1, 0.0
    else:
        edit, target, exact, start = EDITING[method], target_velocity, x1 + shift(0.3), 0.3
    errors = [
        float((edit(source_velocity, target, x1, grid(start, steps), solver) - exact).norm())
        for steps in (16, 32)
    ]
    slope = math.log2(errors[0] / errors[1])
    assert slope > SOLVERS[solver].order - 0.25
    assert method == "there and back" or slope < SOLVERS[solver].order + 0.25


@pytest.mark.parametrize("method", EDITING)
def test_the_callback_sees_every_step_and_may_replace_x(method: str, draw: Draw) -> None:
    seen: list[tuple[int, float]] = []

    def callback(index: int, t: Tensor, x: Tensor) -> Tensor | None:
        seen.append((index, round(float(t), 6)))
        return torch.full_like(x, 7.0) if t == 1 and index > 0 else None

    out = EDITING[method](
        source_velocity, target_velocity, draw(2, 3), [0.2, 0.6, 1.0], "euler", callback=callback
    )
    there, back = [0.6, 0.2], [0.6, 1.0]
    assert seen == list(enumerate(back if method == "flowedit" else there + back))
    assert bool((out == 7.0).all())


@pytest.mark.parametrize("solver", ["euler", "rk4", "adams-bashforth-3", "dopri5"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("flowedit", {}), ("flowedit", {"plain_from": 0.7, "generator": 3}), ("inversion", {}), ("direct", {})],
)
def test_a_mask_keeps_the_rest_and_edits_as_without(
    method: str, settings: dict[str, Any], solver: str, draw: Draw
) -> None:
    """These velocities move every number by itself: within the mask nothing is otherwise, outside nothing moves."""
    x1, mask = SOURCE + SPREAD * draw(3, 2, 4), torch.tensor([1.0, 0.0, 0.0, 1.0])
    settings = {**settings, "generator": seeded(3)} if "generator" in settings else settings
    again = {**settings, "generator": seeded(3)} if "generator" in settings else settings
    times = grid(0.3, 6)
    edited = EDITING[method](source_velocity, target_velocity, x1, times, solver, mask=mask, **settings)
    everywhere = EDITING[method](source_velocity, target_velocity, x1, times, solver, **again)
    assert torch.equal(edited[..., mask == 0], x1[..., mask == 0])
    torch.testing.assert_close(edited[..., mask == 1], everywhere[..., mask == 1], atol=1e-4, rtol=0)


def test_what_is_kept_takes_the_same_way_back_and_forth(draw: Draw) -> None:
    x1, mask, seen = SOURCE + SPREAD * draw(5), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]), []
    EDITING["inversion"](
        source_velocity, target_velocity, x1, grid(0.1, 3), mask=mask, callback=lambda i, t, x: seen.append(x)
    )
    there, forth = seen[:3], seen[3:]
    for before, after in zip([*there[1::-1], x1], forth, strict=True):
        assert torch.equal(before[mask == 0], after[mask == 0])


@pytest.mark.parametrize("solver", ["euler", "heun", "adams-bashforth-2"])
def test_a_direct_edit_to_the_same_is_exact(solver: str, draw: Draw) -> None:
    """On a mixture, in two steps; the inversion alone is far off."""
    means, x1 = torch.tensor([-1.0, 1.5], dtype=torch.float64), draw(50, 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:  # of the equal mixture of N(m, SPREAD^2)
        each = torch.stack([gaussian_velocity(float(mean), SPREAD)(x, t) for mean in means])
        time = t.reshape(-1, 1) if t.ndim else t
        variance = (time * SPREAD) ** 2 + (1 - time) ** 2
        weights = torch.stack([-((x - time * mean) ** 2) / (2 * variance) for mean in means]).softmax(0)
        return (weights * each).sum(0)

    back = EDITING["direct"](velocity, velocity, x1, grid(0.0, 2), solver)
    torch.testing.assert_close(back, x1, rtol=0, atol=1e-14)
    assert (EDITING["inversion"](velocity, velocity, x1, grid(0.0, 2), solver) - x1).abs().max() > 0.05


def test_a_direct_edit_costs_one_evaluation_more(draw: Draw) -> None:
    counts = []
    for method in ("inversion", "direct"):
        source, target = Watched(source_velocity), Watched(target_velocity)
        EDITING[method](source, target, draw(3, 2), grid(0.2, 5), "euler")
        counts.append((len(source.calls), len(target.calls)))
    assert counts == [(5, 5), (6, 5)]


@pytest.mark.parametrize("method", EDITING)
def test_what_cannot_be_edited_is_refused(method: str, draw: Draw) -> None:
    arguments = (source_velocity, target_velocity, draw(2, 3))
    for solver, message in (("euler-maruyama", "stochastic"), ("huen", "heun")):
        with pytest.raises(UserError, match=message):
            EDITING[method](*arguments, grid(0.2, 4), solver)
    for times in ([1.0, 0.5, 0.0], [0.5], [0.2, 0.2, 1.0]):
        with pytest.raises(ValueError, match="increase"):
            EDITING[method](*arguments, times)
    for setting in ({"draws": 0}, {"plain_from": 1.5}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            flow_edit(*arguments, grid(0.2, 3), **setting)


def test_each_step_has_new_normal_noise_and_both_sides_have_the_same(draw: Draw) -> None:
    x1, times = SOURCE + SPREAD * draw(50, 40), grid(0.2, 5)
    source, target = Watched(source_velocity), Watched(target_velocity)
    states = [x1]
    flow_edit(source, target, x1, times, generator=seeded(), callback=lambda i, t, z: states.append(z))
    noises = [(x - t * x1) / (1 - t) for x, t in source.calls]
    for noise in noises:
        assert_normal(noise)
    for before, after in pairwise(noises):
        assert abs(float((before * after).mean())) < 4 / 2000**0.5
    for (x_source, _), (x_target, _), z in zip(source.calls, target.calls, states, strict=False):
        torch.testing.assert_close(x_target - x_source, z - x1)
    assert len(source.calls) == len(target.calls) == 5


def test_a_step_averages_over_its_draws(draw: Draw) -> None:
    # v_target - v_source = x_source^2, whose mean over the noise is (t x1)^2 + (1 - t)^2.
    x1, t, rows = torch.full((1, 1), 2.0, dtype=torch.float64), 0.5, 400
    data = x1.expand(rows, 1)

    def once(draws: int) -> Tensor:
        change = flow_edit(
            lambda x, t: -(x**2), lambda x, t: 0 * x, data, [t, 1.0], draws=draws, generator=seeded()
        )
        return (change - data) / (1 - t)

    exact, variance = (t * 2) ** 2 + (1 - t) ** 2, 4 * (t * 2) ** 2 * (1 - t) ** 2 + 2 * (1 - t) ** 4
    for draws in (1, 16):
        error = (variance / draws / rows) ** 0.5
        assert abs(float(once(draws).mean()) - exact) < 4 * error
        # kurtosis of a square: the fourth moment is bounded by 15 variances^2 here
        assert float(once(draws).var()) == pytest.approx(variance / draws, rel=4 * (15 / rows) ** 0.5)


@pytest.mark.parametrize(("start", "edited"), [(0.0, 36), (0.3, 18), (0.6, 0)])
def test_the_plain_part_samples_under_the_target(start: float, edited: int, draw: Draw) -> None:
    x1, times = SOURCE + SPREAD * draw(50, 40), torch.linspace(start, 1.0, 25 + edited, dtype=torch.float64)
    source, target = Watched(source_velocity), Watched(target_velocity)
    out = flow_edit(source, target, x1, times, "rk4", plain_from=0.6 - 1e-9, generator=seeded())
    assert len(source.calls) == 4 * edited
    assert max((t for _, t in source.calls), default=0.6) == pytest.approx(0.6)
    # Up to t = u, z - x1 = m (u - start sqrt(V(u) / V(start))), m = TARGET - SOURCE; then noise is added.
    x, u = target.calls[4 * edited]
    variances = [(t * SPREAD) ** 2 + (1 - t) ** 2 for t in (start, u)]
    moved = (TARGET - SOURCE) * (u - start * math.sqrt(variances[1] / variances[0]))
    noise = (x - u * x1 - moved) / (1 - u)
    assert_normal(noise)
    exact = TARGET + (x - u * TARGET) * SPREAD / math.sqrt(variances[1])
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=0)


def test_slerp_has_its_closed_form_on_the_circle() -> None:
    angles = torch.tensor([0.3, 2.0, 3.0], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(3, 2)
    b = 2.0 * torch.stack([angles.cos(), angles.sin()], dim=1)
    share = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    exact = 2.0 * torch.stack([(share * angles).cos(), (share * angles).sin()], dim=1)
    torch.testing.assert_close(slerp(a, b, share), exact)


def test_slerp_keeps_the_norm_and_its_ends(draw: Draw) -> None:
    a, b = draw(5, 2, 3, 3), draw(5, 2, 3, 3)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for share in (0.1, 0.5, 0.77):
        torch.testing.assert_close(slerp(a, b, share).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(slerp(a.to(dtype), 3 * b.to(dtype), 0.0), a.to(dtype))
        assert torch.equal(slerp(a.to(dtype), 3 * b.to(dtype), 1.0), 3 * b.to(dtype))


def test_slerp_of_orthogonal_noise_keeps_its_variance() -> None:
    a, b = torch.randn(2, 1, 20_000, generator=seeded(), dtype=torch.float64)
    assert_normal(slerp(a, b, 0.5))  # a straight line would have the variance 1/2


@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-9, 2.0, -1.0])
def test_slerp_of_parallel_rows_is_the_straight_line(factor: float, draw: Draw) -> None:
    a = draw(3, 4)
    b = factor * a + 1e-10 * draw(3, 4)
    torch.testing.assert_close(slerp(a, b, 0.25), torch.lerp(a, b, 0.25))
    assert bool((slerp(torch.zeros(2, 3), torch.zeros(2, 3), 0.5) == 0).all())
    b = a + 1.1e-3 * a.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(draw(3, 4))  # just beside it
    torch.testing.assert_close(slerp(a, b, 0.3), torch.lerp(a, b, 0.3), atol=1e-5, rtol=0)


def test_slerp_refuses_what_does_not_fit(draw: Draw) -> None:
    for rows, share, message in (
        (3, 0.5, "shape"),
        (2, torch.rand(3), "share has shape"),
        (2, 1.5, r"\[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            slerp(draw(2, 3), draw(rows, 3), share)
