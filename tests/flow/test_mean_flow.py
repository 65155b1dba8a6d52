"""Average velocities: the identity, the loss and the sampler against flows that are known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from latentflow.errors import UserError
from latentflow.flow import (
    OBJECTIVES,
    CondOT,
    Counted,
    MeanFlow,
    adaptive,
    chords,
    flow_matching_loss,
    folded_velocity,
    integrate,
    mean_flow_loss,
    next_time,
    slope,
    time_grid,
)

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
    """The exact average velocity of a mixture, by 100 Runge-Kutta steps over the interval."""

    def average(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        start, h = column(r, x), column(t - r, x) / 100
        y = x
        for k in range(100):
            s = start + k * h
            one = mixture.velocity(PATH, y, s)
            two = mixture.velocity(PATH, y + h / 2 * one, s + h / 2)
            three = mixture.velocity(PATH, y + h / 2 * two, s + h / 2)
            four = mixture.velocity(PATH, y + h * three, s + h)
            y = y + h / 6 * (one + 2 * two + 2 * three + four)
        return (y - x) / (100 * h)

    return average


def intervals(rows: int) -> tuple[Tensor, Tensor]:
    first, second = torch.rand(2, rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.minimum(first, second), torch.maximum(first, second)


@pytest.mark.parametrize("target", ["gaussian", "mixture"])
def test_the_exact_average_velocity_satisfies_the_identity(target: str, gaussian, mixture, draw) -> None:
    """u = v + (t - r) du/dr, to 1e-6."""
    exact = gaussian if target == "gaussian" else mixture
    average = GaussianAverage() if target == "gaussian" else mixture_average(mixture)
    r, t = intervals(24)
    x = 2.0 * draw(24, 3)
    velocity = exact.velocity(PATH, x, r[:, None])
    du = slope(average, x, r, t, velocity)
    right = velocity + (t - r)[:, None] * du
    torch.testing.assert_close(average(x, r, t).detach(), right, rtol=1e-6, atol=1e-6)
    # Told apart from what is nearly right: the sign of the second term, and a derivative with x left where it is.
    assert (average(x, r, t) - (velocity - (t - r)[:, None] * du)).abs().max() > 0.1
    still = slope(average, x, r, t, torch.zeros_like(x))
    assert (average(x, r, t) - (velocity + (t - r)[:, None] * still)).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_the_exact_average_velocity_are_exact(steps: int, mixture, draw) -> None:
    """However few: the quantiles of the mixture, one evaluation a step."""
    x0 = draw(16, 2)
    counted = Counted(chords(mixture_average(mixture), time_grid(steps)))
    x1 = integrate(counted, x0, time_grid(steps), "euler")
    cdf = sum(
        w * scipy.stats.norm.cdf(x1.numpy(), m, s)
        for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True)
    )
    np.testing.assert_allclose(cdf, scipy.stats.norm.cdf(x0.numpy()), atol=1e-6)
    assert counted.evaluations == steps


def test_times_of_a_grid_are_met_in_any_precision() -> None:
    grid = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor([0.0, 1 / 3, 0.5, 2 / 3, 1.0], dtype=dtype)
        expected = torch.tensor([1 / 3, 2 / 3, 2 / 3, 1.0, 1.0], dtype=dtype)
        assert torch.equal(next_time(grid, given), expected)
        assert torch.equal(next_time(grid, given[1]), expected[1])
    with pytest.raises(ValueError, match="strictly increase"):
        chords(GaussianAverage(), grid.flip(0))


def exact_sample(gaussian, x: Tensor, r: Tensor):
    """A sample at (x, r) whose velocity is that of the flow itself, not of one pair."""
    sample = PATH.sample(x, x, r)
    return sample._replace(xt=x, velocity=gaussian.velocity(PATH, x, r[:, None]))


def test_the_exact_solution_has_no_loss_and_no_gradient(gaussian, draw) -> None:
    r, t = intervals(24)
    sample = exact_sample(gaussian, draw(24, 3), r)

    def loss_and_gradient(network: GaussianAverage) -> tuple[float, float]:
        du = slope(network, sample.xt, r, t, sample.velocity)
        loss = mean_flow_loss(network(sample.xt, r, t), sample, end=t, slope=du, power=0.0).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        return float(loss), max(float(one.abs()) for one in gradients)

    assert max(loss_and_gradient(GaussianAverage())) < 1e-12
    assert min(loss_and_gradient(GaussianAverage(mean=MEAN - 0.1))) > 1e-3


def test_over_the_pairs_through_a_point_the_target_is_exact_on_average(draw) -> None:
    """The sample's velocity is random given x, and enters twice: linearly, so that the mean is the exact target."""
    network = GaussianAverage()
    r, t = torch.tensor(0.35, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    nodes, weights = (torch.tensor(one) for one in np.polynomial.hermite_e.hermegauss(20))
    weights = weights / weights.sum()
    for x in draw(4, 1):
        gain = r * STD**2 / network.variance(r)
        data = MEAN + gain * (x - r * MEAN) + (STD**2 - gain * r * STD**2).sqrt() * nodes  # x1 given x_r = x
        velocities = ((data - x) / (1 - r))[:, None].detach()
        points = x.expand(20, 1)
        du = slope(network, points, r.expand(20), t.expand(20), velocities)
        mean = (weights[:, None] * (velocities + (t - r) * du)).sum(0)
        torch.testing.assert_close(mean, network(x[None], r, t)[0].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_gradient_is_that_of_the_loss_with_its_target_stopped(power: float, gaussian, draw) -> None:
    network = GaussianAverage(1.1, 0.7)
    r, t = intervals(12)
    sample = PATH.sample(draw(12, 2), MEAN + STD * draw(12, 2), r)
    du = slope(network, sample.xt, r, t, sample.velocity)
    target = sample.velocity + (t - r)[:, None] * du

    def error() -> Tensor:
        return (network(sample.xt, r, t) - target).square().mean(1)

    weight = (error().detach() + 1e-3) ** -power
    loss = mean_flow_loss(network(sample.xt, r, t), sample, end=t, slope=du, power=power).mean()
    loss.backward()
    for parameter in network.parameters():
        values = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += change
                values.append((weight * error()).mean())
                parameter -= change
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_without_length_it_is_flow_matching(draw) -> None:
    sample = PATH.sample(draw(5, 2, 3, 3), draw(5, 2, 3, 3), torch.rand(5, dtype=torch.float64))
    output = draw(5, 2, 3, 3)
    plain = flow_matching_loss(output, sample)
    same = OBJECTIVES["mean-flow"](output, sample, end=sample.t, slope=draw(5, 2, 3, 3), power=0.0)
    torch.testing.assert_close(same, plain, rtol=0, atol=0)
    weighted = mean_flow_loss(output, sample, end=sample.t, slope=output)
    torch.testing.assert_close(weighted, plain / (plain + 1e-3))
    torch.testing.assert_close(adaptive(plain, 0.5), plain / (plain + 1e-3).sqrt())


def test_guidance_is_learned_where_it_settles(draw) -> None:
    """At the network's own fixed point the target is u + guidance (v - u), whatever the mixing."""
    conditional_truth, unconditional = draw(3, 4), draw(3, 4)
    guided = unconditional + 3.0 * (conditional_truth - unconditional)
    for mixing in (0.0, 0.5, 0.9):
        settings = MeanFlow(guidance=3.0, mixing=mixing)
        target = folded_velocity(conditional_truth, guided, unconditional, settings)
        torch.testing.assert_close(target, guided)
    plain = MeanFlow()
    assert not plain.guided
    assert torch.equal(folded_velocity(guided, guided, unconditional, plain), guided)


def test_intervals_are_in_order_and_a_share_has_a_length() -> None:
    first, second, coin = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, end = MeanFlow(share=0.25).interval(first, second, coin)
    assert bool((start <= end).all())
    assert float((end > start).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(start, torch.minimum(first, second))
    assert torch.equal(end[coin < 0.25], torch.maximum(first, second)[coin < 0.25])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("share", 0.0), ("share", 1.5), ("power", -1.0), ("guidance", 0.0), ("mixing", 1.0), ("improved", 2)],
)
def test_settings_out_of_bounds_are_refused(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"mean-flow's {setting} is {value}"):
        MeanFlow(**{setting: value})


def test_what_cannot_be_an_interval_is_refused(draw) -> None:
    sample = PATH.sample(draw(2, 3), draw(2, 3), torch.tensor([0.5, 0.5]))
    output = draw(2, 3)
    with pytest.raises(ValueError, match="ends before it starts"):
        mean_flow_loss(output, sample, end=torch.tensor([0.6, 0.4]), slope=output)
    with pytest.raises(ValueError, match=r"returned shape \(2, 4\)"):
        mean_flow_loss(draw(2, 4), sample, end=sample.t, slope=output)
