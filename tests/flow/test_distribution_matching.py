"""The gradient of distribution matching against Gaussians, whose scores are known."""

from __future__ import annotations

import pytest
import torch

from latentflow.flow import CondOT, distribution_matching_target

from .closed_forms import gaussian_velocity, seeded

PATH = CondOT()
DATA, DRAWN = (1.5, 0.4), (0.7, 0.9)  # mean and standard deviation


def test_it_is_the_difference_of_the_scores(draw) -> None:
    generated = DRAWN[0] + DRAWN[1] * draw(40, 1)
    t = torch.rand(40, dtype=torch.float64, generator=seeded())
    xt = PATH.sample(draw(40, 1), generated, t).xt
    time = t[:, None]
    teacher, fake = (gaussian_velocity(*moments)(xt, time) for moments in (DATA, DRAWN))
    target = distribution_matching_target(generated, xt, t, teacher, fake)
    gradient = generated - target
    # Where the distributions agree nothing pulls.
    assert torch.equal(distribution_matching_target(generated, xt, t, teacher, teacher), generated)

    def score(mean: float, std: float) -> torch.Tensor:
        return -(xt - time * mean) / ((time * std) ** 2 + (1 - time) ** 2)

    # The data that a score predicts is (xt + (1 - t)^2 score) / t.
    expected = (1 - time) ** 2 / time * (score(*DRAWN) - score(*DATA))
    predicted = (xt + (1 - time) ** 2 * score(*DATA)) / time
    torch.testing.assert_close(gradient, expected / (generated - predicted).abs(), rtol=1e-6, atol=1e-9)


def test_a_generator_finds_the_data(draw) -> None:
    """x = mean + std z, its fake velocity exact: descending the gradient ends at the data's mean and deviation."""
    mean, std = (torch.tensor(moment, dtype=torch.float64, requires_grad=True) for moment in DRAWN)
    optimizer = torch.optim.Adam([mean, std], 0.01)
    generator = seeded(1)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 800)
        z, noise = torch.randn(2, 256, 1, dtype=torch.float64, generator=generator)
        t = torch.rand(256, dtype=torch.float64, generator=generator)
        generated = mean + std * z
        xt = PATH.sample(noise, generated.detach(), t).xt
        teacher = gaussian_velocity(*DATA)(xt, t[:, None])
        fake = gaussian_velocity(mean.item(), std.item())(xt, t[:, None])
        target = distribution_matching_target(generated.detach(), xt, t, teacher, fake)
        optimizer.zero_grad()
        ((generated - target).square().mean() / 2).backward()
        optimizer.step()
    assert (mean.item(), std.item()) == pytest.approx(DATA, abs=0.03)
