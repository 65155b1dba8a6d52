"""Average velocities: the identity, the loss and the sampler against flows that are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latentflow.errors import UserError
from latentflow.flow import (
    CONSISTENCY_STEPS,
    OBJECTIVES,
    AlphaFlow,
    CondOT,
    Consistency,
    Counted,
    Draws,
    Interval,
    MeanFlow,
    Progressive,
    Shortcut,
    adaptive,
    average_as_velocity,
    average_velocity_loss,
    flow_matching_loss,
    folded_velocity,
    integrate,
    next_time,
    time_grid,
    total_derivative,
)

from .closed_forms import seeded

PATH = CondOT()
MEAN, STD = 1.5, 0.4  # of the fixture `gaussian`


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else t


class GaussianAverage(nn.Module):
    """The exact average velocity of x1 ~ N(mean, std^2): phi(x) = t m + sqrt(V(t) / V(r)) (x - r m)."""

    def __init__(self, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def variance(self, t: Tensor) -> Tensor:
        return (t * self.std) ** 2 + (1 - t) ** 2

    def forward(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        r, t = column(r, x), column(t, x)
        ratio = (self.variance(t) / self.variance(r)).sqrt()
        moved = t * self.mean + ratio * (x - r * self.mean)
        velocity = self.mean + (r * self.std**2 - (1 - r)) / self.variance(r) * (x - r * self.mean)
        length = t - r
        return torch.where(length > 0, (moved - x) / length.clamp(min=1e-12), velocity)


def mixture_average(mixture) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The exact average velocity of a mixture, by 50 Runge-Kutta steps over the interval."""

    def average(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        start, length = column(r, x), column(t - r, x)
        end = integrate(
            lambda y, s: length * mixture.velocity(PATH, y, start + s * length), x, time_grid(50), "rk4"
        )
        return (end - x) / length

    return average


def intervals(rows: int) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, rows, generator=seeded(1), dtype=torch.float64)
    return torch.minimum(first, second), torch.maximum(first, second)


@pytest.mark.parametrize("target", ["gaussian", "mixture"])
def test_the_exact_average_velocity_satisfies_the_identity(target: str, gaussian, mixture, draw) -> None:
    """u = v + (t - r) du/dr, to 1e-6."""
    exact = gaussian if target == "gaussian" else mixture
    average = GaussianAverage() if target == "gaussian" else mixture_average(mixture)
    r, t = intervals(24)
    x = 2.0 * draw(24, 3)
    velocity = exact.velocity(PATH, x, r[:, None])
    right = velocity + (t - r)[:, None] * total_derivative(average, x, r, t, velocity)
    torch.testing.assert_close(average(x, r, t).detach(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_the_exact_average_velocity_are_exact(steps: int, mixture, draw) -> None:
    """However few: the quantiles of the mixture, one evaluation a step."""
    x0 = draw(16, 2)
    counted = Counted(average_as_velocity(mixture_average(mixture), time_grid(steps)))
    x1 = integrate(counted, x0, time_grid(steps), "euler")
    cdf = mixture.cdf(PATH, x1, torch.ones(()).double())
    torch.testing.assert_close(cdf, torch.special.ndtr(x0), atol=1e-6, rtol=0)
    assert counted.evaluations == steps


def test_times_of_a_grid_are_met_in_any_precision() -> None:
    grid = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor([0.0, 1 / 3, 0.5, 2 / 3, 1.0], dtype=dtype)
        expected = torch.tensor([1 / 3, 2 / 3, 2 / 3, 1.0, 1.0], dtype=dtype)
        assert torch.equal(next_time(grid, given), expected)
        assert torch.equal(next_time(grid, given[1]), expected[1])
    with pytest.raises(ValueError, match="strictly increase"):
        average_as_velocity(GaussianAverage(), grid.flip(0))


AVERAGES = [name for name, objective in OBJECTIVES.items() if objective.average]


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in AVERAGES), ("mean-flow", {"improved": 1})]
)
def test_the_exact_solution_has_no_loss_and_no_gradient(name, settings, gaussian, draw) -> None:
    """The velocity is that of the flow itself, not of one pair."""
    objective = OBJECTIVES[name].settings(**settings | {"share": 1.0})
    r, t = intervals(24)
    if bool((objective.interval(draws(24))[1] == 1).all()):
        t = torch.ones_like(r)  # it knows no other end
    x = draw(24, 3)
    velocity = gaussian.velocity(PATH, x, r[:, None])

    def loss_and_gradient(network: GaussianAverage) -> tuple[float, float]:
        target = objective.target(network, Interval(x, r, t, velocity))
        loss = average_velocity_loss(network(x, r, t), target).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        return loss.item(), max(gradient.abs().item() for gradient in gradients)

    assert max(loss_and_gradient(GaussianAverage())) < 1e-12
    wrong = loss_and_gradient(GaussianAverage(mean=MEAN - 0.1))
    if objective.follows_velocity:
        assert min(wrong) > 1e-3
    else:  # any flow agrees with itself: what tells flows apart are the samples without a length
        assert max(wrong) < 1e-12


@pytest.mark.parametrize("name", AVERAGES)
def test_without_length_it_is_flow_matching_under_the_adaptive_weight(name: str, draw) -> None:
    sample = PATH.sample(draw(5, 2, 3, 3), draw(5, 2, 3, 3), torch.rand(5, dtype=torch.float64))
    output = draw(5, 2, 3, 3).requires_grad_()
    plain = flow_matching_loss(output, sample)
    assert torch.equal(OBJECTIVES[name](output, sample, target=sample.velocity), plain)
    for power, weight in ((1.0, 1 / (plain + 1e-3)), (0.5, (plain + 1e-3) ** -0.5)):
        weighted = average_velocity_loss(output, sample.velocity.requires_grad_(), power)
        torch.testing.assert_close(weighted, plain * weight)
        torch.testing.assert_close(adaptive(plain, power), plain * weight)
        # No gradient flows into the target or the weight.
        found = torch.autograd.grad(weighted.sum(), (output, sample.velocity), allow_unused=True)
        assert found[1] is None
        (expected,) = torch.autograd.grad((plain * weight.detach()).sum(), output, retain_graph=True)
        torch.testing.assert_close(found[0], expected)


def test_guidance_is_learned_where_it_settles(draw) -> None:
    """At the network's own fixed point the target is u + guidance (v - u), whatever the mixing."""
    conditional_truth, unconditional = draw(3, 4), draw(3, 4)
    guided = unconditional + 3.0 * (conditional_truth - unconditional)
    for mixing in (0.0, 0.5, 0.9):
        settings = MeanFlow(guidance=3.0, mixing=mixing)
        target = folded_velocity(conditional_truth, guided, unconditional, settings.guidance, settings.mixing)
        torch.testing.assert_close(target, guided)
    assert settings.guided and not MeanFlow().guided
    assert torch.equal(folded_velocity(guided, guided, unconditional, 1.0), guided)


def draws(rows: int) -> Draws:
    return Draws(torch.sqrt, *torch.rand(3, rows, generator=seeded(), dtype=torch.float64))


@pytest.mark.parametrize("name", AVERAGES)
def test_intervals_are_in_order_and_a_share_has_a_length(name: str) -> None:
    given = draws(4000)
    start, end = OBJECTIVES[name].settings(share=0.25).interval(given)
    assert bool(((start >= 0) & (start <= end) & (end <= 1)).all())
    assert float((end > start).double().mean()) == pytest.approx(0.25, abs=0.03)
    short = start[end == start]  # the velocity is learned at times of the density, or at the earlier of two
    assert set(short.tolist()) <= {*given.first.sqrt().tolist(), *given.second.sqrt().tolist()}


def test_intervals_of_each_objective() -> None:
    given = draws(4000)
    first, second = given.first.sqrt(), given.second.sqrt()
    start, end = MeanFlow(share=0.25).interval(given)
    assert torch.equal(start, torch.minimum(first, second))
    assert torch.equal(end[given.coin < 0.25], torch.maximum(first, second)[given.coin < 0.25])
    start, end = Consistency(share=1.0).interval(given)
    assert torch.equal(start, first) and bool((end == 1).all())
    start, end = Shortcut(share=1.0, finest=8).interval(given)
    length = end - start
    for level in (1, 2, 4, 8):  # each length as often, from each of its multiples as often
        rows = length == 1 / level
        assert float(rows.double().mean()) == pytest.approx(0.25, abs=0.03)
        assert torch.equal((start[rows] * level).round(), start[rows] * level)
        assert torch.bincount((start[rows] * level).long()).min() > 0.7 * rows.sum() / level


def test_alpha_flow_goes_from_the_velocity_to_the_derivative(gaussian, draw) -> None:
    network = GaussianAverage(1.1, 0.7)
    r, t = intervals(12)
    x, velocity = draw(12, 2), draw(12, 2)
    objective = AlphaFlow()

    def at(progress: float) -> Tensor:
        return objective.target(network, Interval(x, r, t, velocity, torch.full((12,), progress))).detach()

    assert torch.equal(at(0.0), velocity)
    exact = MeanFlow().target(network, Interval(x, r, t, velocity)).detach()
    assert torch.equal(at(1.0), exact)
    errors = [float((at(progress) - exact).square().mean()) for progress in (0.0, 0.5, 0.65, 0.7)]
    assert errors == sorted(errors, reverse=True)
    # Of first order in alpha: a finite difference along the step.
    alphas = objective.alpha(torch.tensor([0.65, 0.7]))
    assert errors[3] / errors[2] == pytest.approx(float(alphas[1] / alphas[0]) ** 2, rel=0.1)
    # Rows of one batch may stand on both sides of the change.
    both = Interval(x, r, t, velocity, torch.tensor([0.5] * 6 + [1.0] * 6))
    assert torch.equal(objective.target(network, both), torch.cat([at(0.5)[:6], at(1.0)[6:]]))
    # The paper's own form of it has the same gradient.
    alpha = float(objective.alpha(torch.tensor(0.5)))
    step = alpha * (t - r)
    reached = x + step[:, None] * velocity
    theirs = alpha * velocity + (1 - alpha) * network(reached, r + step, t).detach()
    u = network(x, r, t)
    ours = torch.autograd.grad((u - at(0.5)).square().mean(), list(network.parameters()), retain_graph=True)
    paper = torch.autograd.grad((u - theirs).square().mean() / alpha, list(network.parameters()))
    torch.testing.assert_close(ours, paper, rtol=1e-5, atol=1e-8)


def test_the_halves_of_the_shortest_shortcuts_are_steps_of_the_velocity(draw) -> None:
    asked: list[Tensor] = []

    def spy(y: Tensor, start: Tensor, end: Tensor) -> Tensor:
        asked.append(end - start)
        return y

    x, r, t = draw(2, 2), torch.zeros(2).double(), torch.tensor([1.0, 0.25]).double()
    Shortcut(finest=4).target(spy, Interval(x, r, t, x))
    assert [lengths.tolist() for lengths in asked] == [[0.5, 0.0], [0.5, 0.0]]


def test_progressive_stages_have_steps_twice_as_long() -> None:
    given = draws(4000)
    objective = Progressive(share=1.0, finest=8)
    for progress, length in ((0.0, 1 / 8), (0.3, 1 / 4), (0.6, 1 / 2), (0.8, 1.0), (1.0, 1.0), (None, 1.0)):
        start, end = objective.interval(
            given._replace(progress=None if progress is None else torch.full((4000,), progress))
        )
        assert torch.equal(end - start, torch.full_like(start, length))
        assert len(start.unique()) == round(1 / length)
    stages = objective.middle(0), objective.middle(3)
    assert [float(objective.stage(share)) for share in stages] == [0.0, 3.0]


def test_consistency_steps_lead_to_the_data_and_back(draw) -> None:
    """Exact averages: each step's result has the data's distribution, whatever noise is added again."""
    average, ends = GaussianAverage(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0 = draw(200_000, 1)
    for steps in (1, 3):
        counted = Counted(average_as_velocity(average, ends))
        with torch.no_grad():
            x1 = integrate(counted, x0, time_grid(steps), CONSISTENCY_STEPS, generator=seeded(2))
        assert counted.evaluations == steps
        assert x1.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert x1.std().item() == pytest.approx(STD, abs=0.01)
        correlation = torch.corrcoef(torch.stack([x0[:, 0], x1[:, 0]]))[0, 1].item()
        assert (correlation > 0.999) == (steps == 1)


def test_the_tangent_of_consistency_is_normalised_and_warmed_up(draw) -> None:
    network, objective = GaussianAverage(1.1, 0.7), Consistency(warmup=0.5)
    r = torch.rand(12, dtype=torch.float64)
    x, velocity, t = draw(12, 3), draw(12, 3), torch.ones(12, dtype=torch.float64)
    cold = objective.target(network, Interval(x, r, t, velocity, torch.zeros(12)))
    assert torch.equal(cold, velocity)
    half = objective.target(network, Interval(x, r, t, velocity, torch.full((12,), 0.25)))
    full = objective.target(network, Interval(x, r, t, velocity))
    torch.testing.assert_close(half, (velocity + full) / 2)
    output = network(x, r, t).detach().requires_grad_()
    average_velocity_loss(output, full, objective.power, objective.floor).sum().backward()
    assert output.grad is not None
    tangent = (full - output).detach()
    size = (tangent.square().mean(1, keepdim=True) + 0.1**2).sqrt()
    torch.testing.assert_close(output.grad, -2 / 3 * tangent / size)


@pytest.mark.parametrize(
    ("objective", "setting", "value"),
    [
        *(
            (OBJECTIVES[name].settings, setting, value)
            for name in AVERAGES
            for setting, value in {"share": 0.0, "power": -1.0, "guidance": 0.0, "mixing": 1.0}.items()
        ),
        (MeanFlow, "improved", 2),
        (AlphaFlow, "begin", 1.0),
        (AlphaFlow, "end", 1.5),
        (AlphaFlow, "least", 1.0),
        (Shortcut, "finest", 6),
        (Consistency, "warmup", 2.0),
    ],
)
def test_settings_out_of_bounds_and_what_is_no_output_are_refused(objective, setting, value) -> None:
    with pytest.raises(UserError, match=f"{objective.name}'s {setting} is {value}"):
        objective(**{setting: value})
    with pytest.raises(ValueError, match=r"returned shape \(2, 4\)"):
        average_velocity_loss(torch.zeros(2, 4), torch.zeros(2, 3))
