"""Trainings in two dimensions: a velocity model, and from its weights models for few steps, by every objective."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from latentflow.flow import (
    CONSISTENCY_STEPS,
    AlphaFlow,
    AverageObjective,
    CondOT,
    Consistency,
    Draws,
    Interval,
    MeanFlow,
    Progressive,
    Shortcut,
    Velocity,
    average_as_velocity,
    average_velocity_loss,
    flow_matching_loss,
    integrate,
    reflow_pairs,
    straightness,
    time_grid,
)

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
        r, t = (one.expand(len(x))[:, None] for one in (r, t))
        out: Tensor = self.rest(self.first(torch.cat([x, r], 1)) + self.length(t - r))
        return out


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two interleaved half circles, about as wide as the noise."""
    angle = torch.pi * torch.rand(count, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    sign = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)
    return 1.5 * sign * upper + 0.1 * torch.randn(count, 2, generator=generator)


def train(
    network: Perceptron, steps: int, rate: float, generator: torch.Generator, settings: MeanFlow | None
) -> None:
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        x0, x1 = torch.randn(BATCH, 2, generator=generator), moons(BATCH, generator)
        u, second, coin = torch.rand(3, BATCH, generator=generator)
        if settings is None:
            sample = PATH.sample(x0, x1, u)
            loss = flow_matching_loss(network(sample.xt, sample.t, sample.t), sample)
        else:
            r, t = settings.interval(Draws(lambda one: one, u, second, coin))
            sample = PATH.sample(x0, x1, r)
            with torch.no_grad():
                along = network(sample.xt, r, r)  # as improved MeanFlow does: far less noise
            target = settings.target(network, Interval(sample.xt, r, t, sample.velocity, along=along))
            loss = average_velocity_loss(network(sample.xt, r, t), target, settings.power)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()


def w2(a: Tensor, b: Tensor) -> float:
    cost = torch.cdist(a, b).square().numpy()
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


@pytest.fixture(scope="module")
def teacher() -> Perceptron:
    torch.manual_seed(0)
    network = Perceptron()
    train(network, 1000, 5e-3, torch.Generator().manual_seed(0), None)
    return network


@pytest.fixture(scope="module")
def noise_and_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(1000, 2, generator=generator), moons(1000, generator)


def velocity_of(network: Perceptron) -> Velocity:
    return lambda x, t: network(x, t, t)


@torch.no_grad()
def sampled(network: Perceptron, noise: Tensor, steps: int, settings: AverageObjective) -> Tensor:
    if settings.sampler == "consistency":
        generator = torch.Generator().manual_seed(4)
        ends = average_as_velocity(network, time_grid(1))
        return integrate(ends, noise, time_grid(steps), CONSISTENCY_STEPS, generator=generator)
    return integrate(average_as_velocity(network, time_grid(steps)), noise, time_grid(steps), "euler")


def test_one_step_of_the_student_is_nearly_fifty_of_the_teacher(
    teacher: Perceptron, noise_and_data: tuple[Tensor, Tensor]
) -> None:
    """Learned from data, with the network's own velocity to follow."""
    noise, data = noise_and_data
    student, settings = copy.deepcopy(teacher), MeanFlow(share=0.75, power=0.5)
    train(student, 1000, 5e-3, torch.Generator().manual_seed(1), settings)
    with torch.no_grad():
        fifty, euler = (integrate(velocity_of(teacher), noise, time_grid(n), "euler") for n in (50, 1))
    best = w2(fifty, data)
    assert w2(euler, data) > 3 * best  # one step of the teacher is nothing
    for steps in (1, 4):
        assert w2(sampled(student, noise, steps, settings), data) < 1.5 * best


def distilled(teacher: Perceptron, settings: AverageObjective, steps: int, rate: float) -> Perceptron:
    """As `AverageVelocityLoss` does it: the teacher's velocity, and targets of the average or of an earlier self."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(2)
    asked, stage = copy.deepcopy(teacher), 0
    optimizer = torch.optim.Adam(student.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        progress = torch.full((BATCH,), step / steps)
        if isinstance(settings, Progressive) and int(settings.stage(progress[0])) != stage:
            stage += 1
            asked.load_state_dict(student.state_dict())
        uniform = torch.rand(3, BATCH, generator=generator)
        r, t = settings.interval(Draws(lambda one: one, *uniform, progress))
        x = PATH.sample(torch.randn(BATCH, 2, generator=generator), moons(BATCH, generator), r).xt
        with torch.no_grad():
            velocity = teacher(x, r, r)

        def average(y: Tensor, start: Tensor, end: Tensor, velocity: Tensor = velocity) -> Tensor:
            network = asked if settings.averaged or isinstance(settings, Progressive) else student
            still = (start == end)[:, None]
            exact = teacher(y, start, start) if not settings.differentiates else velocity
            return torch.where(still, exact, network(y, start, end))

        target = torch.where(
            (t > r)[:, None], settings.target(average, Interval(x, r, t, velocity, progress)), velocity
        )
        loss = average_velocity_loss(student(x, r, t), target, settings.power, settings.floor).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if settings.averaged:
            with torch.no_grad():
                for one, new in zip(asked.parameters(), student.parameters(), strict=True):
                    one.lerp_(new, 0.05)
    return student


@pytest.mark.parametrize(
    "settings",
    [
        MeanFlow(share=0.75, power=0.5),
        AlphaFlow(share=0.75, power=0.5, end=0.8),
        AlphaFlow(share=0.75, power=0.5, least=0.1),
        Shortcut(share=0.75, finest=8),
        Progressive(finest=8),
        Consistency(),
    ],
    ids=lambda one: f"{one.name}{' without derivative' if getattr(one, 'least', 0) else ''}",
)
def test_a_student_of_every_objective_draws_in_one_and_two_steps(
    settings: AverageObjective, teacher: Perceptron, noise_and_data: tuple[Tensor, Tensor]
) -> None:
    noise, data = noise_and_data
    with torch.no_grad():
        best = w2(integrate(velocity_of(teacher), noise, time_grid(50), "euler"), data)
    student = distilled(teacher, settings, 800, 5e-3)
    for steps in (1, 2):
        assert w2(sampled(student, noise, steps, settings), data) < 1.5 * best


def test_each_rectification_is_straighter(teacher: Perceptron, noise_and_data: tuple[Tensor, Tensor]) -> None:
    noise, data = noise_and_data
    with torch.no_grad():
        best = w2(integrate(velocity_of(teacher), noise, time_grid(50), "euler"), data)
    generator = torch.Generator().manual_seed(5)
    found, network = [], teacher
    for _ in range(3):
        found.append(float(straightness(velocity_of(network), noise, time_grid(20)).mean()))
        x0, x1 = reflow_pairs(
            velocity_of(network), torch.randn(4096, 2, generator=generator), time_grid(20), "heun"
        )
        network = copy.deepcopy(network)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=600)
        for _ in range(600):
            rows = torch.randint(4096, (BATCH,), generator=generator)
            sample = PATH.sample(x0[rows], x1[rows], torch.rand(BATCH, generator=generator))
            optimizer.zero_grad()
            flow_matching_loss(network(sample.xt, sample.t, sample.t), sample).mean().backward()
            optimizer.step()
            schedule.step()
    assert found[0] > 2 * found[1] > 2 * found[2]
    with torch.no_grad():  # and the last draws in one step
        assert w2(integrate(velocity_of(network), noise, time_grid(1), "euler"), data) < 1.5 * best
