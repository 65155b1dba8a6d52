"""Trainings in two dimensions: a velocity model, and from its weights models for few steps, by every objective."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from latentflow.flow import (
    CONSISTENCY_STEPS,
    OBJECTIVES,
    AverageObjective,
    CondOT,
    Draws,
    Interval,
    Progressive,
    Velocity,
    average_as_velocity,
    average_velocity_loss,
    flow_matching_loss,
    integrate,
    time_grid,
)

from .closed_forms import seeded

PATH, BATCH = CondOT(), 256


class Perceptron(nn.Module):
    """u(x, r, t); the weights of the length start at zero, so that it starts as a velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.length = nn.Linear(3, 96), nn.Linear(1, 96, bias=False)
        self.rest = nn.Sequential(
            nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )
        nn.init.zeros_(self.length.weight)

    def forward(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        r, t = (time.expand(len(x))[:, None] for time in (r, t))
        out: Tensor = self.rest(self.first(torch.cat([x, r], 1)) + self.length(t - r))
        return out


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles, about as wide as the noise."""
    angle = torch.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    sign = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)
    return 1.5 * sign * upper + 0.1 * torch.randn(count, 2, generator=generator)


def fit(
    network: Perceptron, steps: int, loss: Callable[[int], Tensor], after: Callable[[], None] | None = None
) -> None:
    """Minimise the mean of ``loss(step)``, by row; ``after`` is called behind every step."""
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).mean().backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            after()


def ends(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 2, generator=generator), moons(BATCH, generator)


def w2(a: Tensor, b: Tensor) -> float:
    cost = torch.cdist(a, b).square().numpy()
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


@pytest.fixture(scope="module")
def teacher() -> Perceptron:
    torch.manual_seed(0)
    network, generator = Perceptron(), seeded()

    def loss(step: int) -> Tensor:
        x0, x1, t = *ends(generator), torch.rand(BATCH, generator=generator)
        sample = PATH.sample(x0, x1, t)
        return flow_matching_loss(network(sample.xt, t, t), sample)

    fit(network, 1000, loss)
    return network


@pytest.fixture(scope="module")
def noise_and_data(teacher: Perceptron) -> tuple[Tensor, Tensor, float]:
    """Noise, data, and the distance from the data at which 50 steps of the teacher end."""
    generator = seeded(9)
    noise, data = torch.randn(1000, 2, generator=generator), moons(1000, generator)
    with torch.no_grad():
        return noise, data, w2(integrate(velocity_of(teacher), noise, time_grid(50), "euler"), data)


def velocity_of(network: Perceptron) -> Velocity:
    return lambda x, t: network(x, t, t)


@torch.no_grad()
def sampled(network: Perceptron, noise: Tensor, steps: int, settings: AverageObjective) -> Tensor:
    if settings.sampler == "consistency":
        to_data = average_as_velocity(network, time_grid(1))
        return integrate(to_data, noise, time_grid(steps), CONSISTENCY_STEPS, generator=seeded(4))
    return integrate(average_as_velocity(network, time_grid(steps)), noise, time_grid(steps), "euler")


def distilled(teacher: Perceptron, settings: AverageObjective, steps: int) -> Perceptron:
    """Train a student as a run does: on the teacher's velocity, and on targets of the average or an earlier self."""
    student, asked, generator = copy.deepcopy(teacher), copy.deepcopy(teacher), seeded(2)
    stages = isinstance(settings, Progressive)
    stage = 0

    def average(y: Tensor, start: Tensor, end: Tensor, velocity: Tensor) -> Tensor:
        network = asked if settings.averaged or stages else student
        exact = velocity if settings.differentiates else teacher(y, start, start)
        return torch.where((start == end)[:, None], exact, network(y, start, end))

    def loss(step: int) -> Tensor:
        nonlocal stage
        progress = torch.full((BATCH,), step / steps)
        if stages and int(settings.stage(progress[0])) != stage:
            stage += 1
            asked.load_state_dict(student.state_dict())
        r, t = settings.interval(Draws(lambda u: u, *torch.rand(3, BATCH, generator=generator), progress))
        x = PATH.sample(*ends(generator), r).xt
        with torch.no_grad():
            velocity = teacher(x, r, r)
            along = student(x, r, r) if settings.own_velocity else None  # as improved MeanFlow does
        over = Interval(x, r, t, velocity, progress, along)
        target = settings.target(lambda *given: average(*given, velocity), over)
        target = torch.where((t > r)[:, None], target, velocity)
        return average_velocity_loss(student(x, r, t), target, settings.power, settings.floor)

    @torch.no_grad()
    def follow() -> None:
        for mean, new in zip(asked.parameters(), student.parameters(), strict=True):
            mean.lerp_(new, 0.05)

    fit(student, steps, loss, after=follow if settings.averaged else None)
    return student


#: objective -> settings that learn fast; below are those of any other objective
SETTINGS: dict[str, list[dict[str, float]]] = {
    "mean-flow": [{"share": 0.75, "power": 0.5, "improved": improved} for improved in (0, 1)],
    "alpha-flow": [{"share": 0.75, "power": 0.5, "end": 0.8}, {"share": 0.75, "power": 0.5, "least": 0.1}],
    "shortcut": [{"share": 0.75, "finest": 8}],
    "progressive": [{"finest": 8}],
    "consistency": [{}],
}
#: the second settings of an objective are slow, and objectives between two others
BETWEEN = ("alpha-flow", "progressive")
CASES = [
    pytest.param(
        OBJECTIVES[name].settings(**settings), marks=[pytest.mark.slow] * (number > 0 or name in BETWEEN)
    )
    for name, objective in OBJECTIVES.items()
    if objective.average
    for number, settings in enumerate(SETTINGS.get(name, [{"share": 0.75, "power": 0.0}]))
]


@pytest.mark.parametrize("settings", CASES, ids=repr)
def test_a_student_of_every_objective_draws_in_one_and_two_steps(
    settings: AverageObjective, teacher: Perceptron, noise_and_data
) -> None:
    noise, data, best = noise_and_data
    student = distilled(teacher, settings, 800)
    with torch.no_grad():  # one step of the teacher is nothing
        assert w2(integrate(velocity_of(teacher), noise, time_grid(1), "euler"), data) > 3 * best
    for steps in (1, 2):
        assert w2(sampled(student, noise, steps, settings), data) < 1.5 * best
