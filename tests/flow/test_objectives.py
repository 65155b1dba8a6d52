from __future__ import annotations

import math

import pytest
import torch

from latentflow.flow import OBJECTIVES, CondOT

LOSS = OBJECTIVES["flow-matching"]


def sample_with_velocity(velocity: torch.Tensor):
    return CondOT().sample(torch.zeros_like(velocity), velocity, 0.5)


def test_by_hand() -> None:
    # Two rows, two channels, two positions. Row 0 is off by 1 in channel 0, by 2 in channel 1: (1 + 4) / 2.
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[3.0, 3.0], [4.0, 4.0]]])
    prediction = torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]])
    sample = sample_with_velocity(target)
    assert LOSS(prediction, sample).tolist() == [2.5, 0.0]
    # Row 0 is at right angles to the target over channels (1 - cos = 1), row 1 points the same way.
    torch.testing.assert_close(LOSS(prediction, sample, direction_weight=0.5), torch.tensor([3.0, 0.0]))


def test_the_cosine_is_over_channels_at_each_position() -> None:
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])  # (B=1, C=2, W=2): along (1, 0) at both positions
    prediction = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])  # the same, then opposite: 1 - cos = 0, 2
    without, with_direction = (
        LOSS(prediction, sample_with_velocity(target)),
        LOSS(prediction, sample_with_velocity(target), direction_weight=1.0),
    )
    torch.testing.assert_close(with_direction - without, torch.tensor([1.0]))


def test_the_direction_does_not_depend_on_length(draw) -> None:
    sample = sample_with_velocity(draw(3, 4, 2, 2))
    doubled = LOSS(2 * sample.velocity, sample, direction_weight=1.0)
    torch.testing.assert_close(doubled, sample.velocity.square().mean((1, 2, 3)))


def test_vectors_have_a_direction_too() -> None:
    sample = sample_with_velocity(torch.tensor([[1.0, 0.0]]))
    diagonal = LOSS(torch.tensor([[1.0, 1.0]]), sample, direction_weight=1.0)
    torch.testing.assert_close(diagonal, torch.tensor([0.5 + 1 - math.sqrt(0.5)]))


def test_rows_are_separate(draw) -> None:
    target, prediction = draw(4, 2, 4, 4), draw(4, 2, 4, 4)
    together = LOSS(prediction, sample_with_velocity(target), direction_weight=0.3)
    pairs = zip(prediction.split(1), target.split(1), strict=True)
    alone = [LOSS(p, sample_with_velocity(v), direction_weight=0.3) for p, v in pairs]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_minimiser_is_the_marginal_velocity(gaussian, draw) -> None:
    """At fixed t the best linear prediction a x_t + b equals the closed-form velocity of the Gaussian."""
    x0, x1, t = draw(200_000, 1), 1.5 + 0.4 * draw(200_000, 1), torch.tensor(0.6, dtype=torch.float64)
    sample = CondOT().sample(x0, x1, t)
    design = torch.cat([sample.xt, torch.ones_like(sample.xt)], dim=1)
    fit = torch.linalg.lstsq(design, sample.velocity).solution
    best = LOSS(design @ fit, sample).mean()
    exact = LOSS(gaussian.velocity(CondOT(), sample.xt, t), sample).mean()
    torch.testing.assert_close(exact, best, rtol=1e-4, atol=0)


def test_half_precision_is_calculated_in_float32(draw) -> None:
    prediction, target = draw(4, 3, 2).bfloat16(), draw(4, 3, 2).float()
    loss = LOSS(prediction, sample_with_velocity(target), direction_weight=1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSS(prediction.float(), sample_with_velocity(target), direction_weight=1.0))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(2, 8, 4\) for a velocity of shape \(2, 4, 4\)"):
        LOSS(torch.zeros(2, 8, 4), sample_with_velocity(torch.zeros(2, 4, 4)))
