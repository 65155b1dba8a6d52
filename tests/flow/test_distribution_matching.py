"""The gradient of distribution matching against Gaussians, whose scores are known."""

from __future__ import annotations

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
