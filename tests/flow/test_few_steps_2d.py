"""A training in two dimensions: a velocity model, and from its weights one of average velocities."""

from __future__ import annotations

import copy

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from latentflow.flow import (
    CondOT,
    Draws,
    MeanFlow,
    average_velocity_loss,
    chords,
    flow_matching_loss,
    integrate,
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
            target = settings.target(network, sample.xt, r, t, sample.velocity, along=along)
            loss = average_velocity_loss(network(sample.xt, r, t), target, settings.power)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()


def w2(a: Tensor, b: Tensor) -> float:
    cost = torch.cdist(a, b).square().numpy()
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def test_one_step_of_the_student_is_nearly_fifty_of_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    teacher = Perceptron()
    train(teacher, 1000, 5e-3, generator, None)
    student = copy.deepcopy(teacher)
    train(student, 1000, 5e-3, generator, MeanFlow(share=0.75, power=0.5))
    noise, data = torch.randn(1000, 2, generator=generator), moons(1000, generator)
    with torch.no_grad():
        fifty = integrate(lambda x, t: teacher(x, t, t), noise, time_grid(50), "euler")
        euler = integrate(lambda x, t: teacher(x, t, t), noise, time_grid(1), "euler")
        few = {
            steps: integrate(chords(student, time_grid(steps)), noise, time_grid(steps), "euler")
            for steps in (1, 4)
        }
    best = w2(fifty, data)
    assert w2(euler, data) > 3 * best  # one step of the teacher is nothing
    assert w2(few[1], data) < 1.5 * best
    assert w2(few[4], data) < 1.5 * best
