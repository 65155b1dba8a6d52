"""Classification by conditional flows, against the exact posterior of mixtures."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import compare_conditions
from latentflow.flow.classification import _rounds

CLASSES, DIMENSIONS = 10, 4


class Gaussians:
    """Ten classes, each a Gaussian of its own mean and covariance (diagonal), with the exact velocity of each."""

    def __init__(self, seed: int = 0, spread: float = 1.0, same: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.means = spread * torch.randn(CLASSES, DIMENSIONS, generator=generator, dtype=torch.float64)
        stds = 0.4 + 0.8 * torch.rand(CLASSES, DIMENSIONS, generator=generator, dtype=torch.float64)
        self.stds = stds[:1].expand_as(stds) if same else stds
        self.calls = 0

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        noise = torch.randn(n, DIMENSIONS, generator=generator, dtype=torch.float64)
        return self.means[labels] + self.stds[labels] * noise, labels

    def log_posterior(self, x: Tensor) -> Tensor:
        residual = (x[:, None] - self.means) / self.stds
        return torch.log_softmax(-0.5 * residual.square().sum(2) - self.stds.log().sum(1), 1)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls += len(x)
        t = t[:, None]
        mean, variance = self.means[condition], self.stds[condition].square()
        total = t.square() * variance + (1 - t).square()
        residual = x - t * mean
        data = mean + t * variance / total * residual
        noise = (1 - t) / total * residual
        return data - noise


def test_ratios_converge_to_those_of_the_densities() -> None:
    mixture = Gaussians()
    x, _ = mixture.draw(20, 1)
    exact = mixture.log_posterior(x)
    errors = []
    for evaluations in (64, 4096):
        found = compare_conditions(
            mixture.velocity,
            x,
            CLASSES,
            evaluations=evaluations,
            halving=False,
            log_snr=(-14.0, 14.0),
            batch_size=100_000,
            generator=torch.Generator().manual_seed(2),
        )
        best = found.log_ratios.argmax(1, keepdim=True)
        assert bool((found.evaluations == evaluations).all())
        errors.append((found.log_ratios - (exact - exact.gather(1, best))).abs().median())
    assert errors[1] < 0.1 and errors[1] < 0.4 * errors[0]


def test_no_round_is_of_nothing() -> None:
    """Two evaluations are all taken in the first of four rounds; networks need not take an empty batch."""
    mixture, rows = Gaussians(), []

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        rows.append(len(x))
        return mixture.velocity(x, t, condition)

    found = compare_conditions(velocity, mixture.draw(3, 1)[0], CLASSES, evaluations=2)
    assert rows == [60] and bool((found.evaluations == 2).all())


def test_with_one_covariance_noise_leaves_nothing() -> None:
    """There errors of two classes differ by what is linear in the noise, which its negative takes away."""
    mixture = Gaussians(same=True)
    x, _ = mixture.draw(50, 1)
    exact = mixture.log_posterior(x)
    found = compare_conditions(
        mixture.velocity,
        x,
        CLASSES,
        evaluations=256,
        halving=False,
        log_snr=(-14.0, 14.0),
        batch_size=100_000,
    )
    best = found.log_ratios.argmax(1, keepdim=True)
    torch.testing.assert_close(found.log_ratios, exact - exact.gather(1, best), atol=0.02, rtol=0.01)


def test_within_a_hundredth_of_the_bayes_rate_and_unpaired_noise_is_not_with_four_times_as_many() -> None:
    mixture = Gaussians(spread=1.5)
    x, labels = mixture.draw(1500, 3)

    def right(scores: Tensor) -> float:
        return float((scores.argmax(1) == labels).double().mean())

    bayes = right(mixture.log_posterior(x))
    assert 0.6 < bayes < 0.95
    options = {"batch_size": 500_000, "generator": torch.Generator().manual_seed(4)}
    full = compare_conditions(mixture.velocity, x, CLASSES, evaluations=32, halving=False, **options)
    assert right(full.log_ratios) > bayes - 0.01
    mixture.calls = 0
    halved = compare_conditions(mixture.velocity, x, CLASSES, evaluations=32, **options)
    assert right(halved.log_ratios) > bayes - 0.015
    assert mixture.calls == int(halved.evaluations.sum()) < 0.4 * 32 * CLASSES * len(x)
    # every class with noise of its own: its loss alone, with the other column of the pair unused
    unpaired = [
        compare_conditions(
            lambda x, t, _, own=number: mixture.velocity(x, t, torch.full((len(x),), own)),
            x,
            2,
            evaluations=128,
            halving=False,
            **options,
        ).losses[:, 0]
        for number in range(CLASSES)
    ]
    assert right(-torch.stack(unpaired, 1)) < bayes - 0.01


def test_probabilities_are_calibrated() -> None:
    mixture = Gaussians(spread=1.0)
    x, labels = mixture.draw(4000, 5)
    found = compare_conditions(mixture.velocity, x, CLASSES, evaluations=128, batch_size=500_000)
    chosen = found.log_posterior().exp().max(1)
    hits = (chosen.indices == labels).double()
    for low in (0.4, 0.6, 0.8):
        within = (chosen.values >= low) & (chosen.values < low + 0.2)
        assert int(within.sum()) > 200
        assert abs(float(hits[within].mean() - chosen.values[within].mean())) < 0.06


def test_a_prior_and_a_temperature() -> None:
    mixture = Gaussians()
    x, _ = mixture.draw(3, 1)
    found = compare_conditions(mixture.velocity, x, CLASSES, evaluations=8)
    prior = torch.log_softmax(torch.arange(CLASSES, dtype=torch.float64), 0)
    torch.testing.assert_close(
        found.log_posterior(prior), torch.log_softmax(found.log_ratios + prior, 1), rtol=0, atol=0
    )
    assert found.log_posterior(temperature=1e9).exp().sub(1 / CLASSES).abs().max() < 1e-6


def test_a_condition_that_is_dropped_early_has_a_loss_as_good_as_the_others() -> None:
    """Its few draws are at two log-SNRs, whose errors differ far more than conditions do: the best one's are all."""
    mixture = Gaussians()
    x, _ = mixture.draw(200, 6)
    full, halved = (
        compare_conditions(
            mixture.velocity,
            x,
            CLASSES,
            halving=halving,
            batch_size=500_000,
            generator=torch.Generator().manual_seed(7),
        )
        for halving in (False, True)
    )
    best = halved.log_ratios.argmax(1, keepdim=True)
    torch.testing.assert_close(halved.losses.gather(1, best) - halved.losses, halved.log_ratios)
    dropped = halved.evaluations < 32
    apart = (halved.losses - full.losses)[dropped].abs() / (1 - full.log_ratios[dropped])
    assert int(dropped.sum()) > 1000 and float(apart.median()) < 0.5


def test_each_generator_alone_determines_its_sample() -> None:
    mixture = Gaussians()
    x, _ = mixture.draw(3, 1)

    def compared(rows: list[int]) -> Tensor:
        seeds = [torch.Generator().manual_seed(7 + row) for row in rows]
        return compare_conditions(mixture.velocity, x[rows], CLASSES, evaluations=8, generator=seeds).losses

    assert torch.equal(compared([0, 1, 2])[1:2], compared([1]))


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_rounds_end_with_one_condition_and_all_draws(count: int) -> None:
    rounds = _rounds(count, True)
    assert rounds[-1] == (1.0, 1)
    assert all(before[1] > after[1] or after[1] == 1 for before, after in pairwise(rounds))


def test_refusals() -> None:
    mixture = Gaussians()
    x, _ = mixture.draw(2, 1)
    with pytest.raises(UserError, match="one condition"):
        compare_conditions(mixture.velocity, x, 1)
    with pytest.raises(UserError, match="even number"):
        compare_conditions(mixture.velocity, x, 3, evaluations=5)
    with pytest.raises(UserError, match="not finite"):
        compare_conditions(lambda x, t, c: x * torch.nan, x, 3)
    for bad in (torch.nan, torch.inf):  # at some of the times, of one condition
        wrong = lambda x, t, c, bad=bad: torch.where(((t > 0.9) & (c == 1))[:, None], bad, x)  # noqa: E731
        with pytest.raises(UserError, match="not finite"):
            compare_conditions(wrong, x, 3)
