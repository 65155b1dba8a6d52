"""The bridge from N(-a, 1) to N(a, 1): its static coupling, marginals, velocity and score have closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.flow import SchrodingerBridge, bridge_matching_loss

from .closed_forms import seeded

SIGMAS = [0.5, 1.0, 2.0]
A = 1.5


def correlation(sigma: float) -> float:
    """Cov(x0, x1) of the entropic coupling of two unit Gaussians: c sigma^2 = 1 - c^2."""
    return (math.sqrt(4 + sigma**4) - sigma**2) / 2


def variance(sigma: float, t: torch.Tensor) -> torch.Tensor:
    return t * (1 - t) * math.sqrt(4 + sigma**4) + (1 - t) ** 2 + t**2


def coefficients(bridge: SchrodingerBridge, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(T, 3) each: the weights of x0, x1 and the noise in xt, velocity and score, by probing with unit rows."""
    e = torch.eye(3, dtype=torch.float64).expand(len(t), 3, 3)
    sample = bridge.sample(e[:, 0], e[:, 1], t, noise=e[:, 2])
    return sample.xt, sample.velocity, sample.score


def static_covariance(sigma: float) -> torch.Tensor:
    """Return the covariance of (x0, x1, noise)."""
    c = correlation(sigma)
    return torch.tensor([[1.0, c, 0.0], [c, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_marginals_are_known_and_targets_average_to_the_exact_velocity_score_and_drift(sigma) -> None:
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    xt, velocity, score = coefficients(SchrodingerBridge(sigma), t)
    covariance, mean = static_covariance(sigma), torch.tensor([-A, A, 0.0], dtype=torch.float64)
    torch.testing.assert_close(xt @ mean, (2 * t - 1) * A)
    torch.testing.assert_close(torch.einsum("ti,ij,tj->t", xt, covariance, xt), variance(sigma, t))

    def slope(target: torch.Tensor) -> torch.Tensor:
        """Return the slope of E[target | xt] = E[target] + slope (xt - E[xt]), all being jointly Gaussian."""
        return torch.einsum("ti,ij,tj->t", target, covariance, xt) / variance(sigma, t)

    v = variance(sigma, t)
    d_v = (1 - 2 * t) * math.sqrt(4 + sigma**4) - 2 * (1 - t) + 2 * t
    torch.testing.assert_close(velocity @ mean, torch.full_like(t, 2 * A), atol=1e-10, rtol=0)
    torch.testing.assert_close(slope(velocity), d_v / (2 * v), atol=1e-10, rtol=0)
    torch.testing.assert_close(score @ mean, torch.zeros_like(t), atol=1e-10, rtol=0)
    torch.testing.assert_close(slope(score), -1 / v, atol=1e-10, rtol=0)
    # A Brownian bridge is dx = (x1 - x)/(1 - t) dt + sigma dW: the same drift as the SDE's, on average.
    pinned = (torch.eye(3, dtype=torch.float64)[1] - xt) / (1 - t)[:, None]
    torch.testing.assert_close(slope(velocity + sigma**2 / 2 * score), slope(pinned), atol=1e-10, rtol=0)


def test_coupled_samples_are_drawn_with_the_known_moments(draw) -> None:
    bridge, generator, rows, rounds = SchrodingerBridge(1.0), seeded(), 128, 49
    moments = []
    for _ in range(rounds):
        x0, x1 = draw(rows, 1) - A, draw(rows, 1) + A
        paired = bridge.coupling(x0, x1, generator=generator)
        xt = bridge.sample(paired, x1, 0.3, generator=generator).xt
        moments.append([xt.mean(), (xt + 0.4 * A).square().mean(), ((paired + A) * (x1 - A)).mean()])
    moments = torch.tensor(moments)
    exact = torch.tensor([-0.4 * A, float(variance(1.0, torch.tensor(0.3))), correlation(1.0)])
    assert bool(((moments.mean(0) - exact).abs() < 4.5 * moments.std(0) / math.sqrt(rounds)).all())


def test_ends_are_exact_and_targets_finite(draw) -> None:
    x0, x1 = draw(5, 2, 3), draw(5, 2, 3)
    bridge = SchrodingerBridge(0.7)
    assert torch.equal(bridge.sample(x0, x1, 0.0).xt, x0)
    torch.testing.assert_close(bridge.sample(x0, x1, 1.0).xt, x1)
    for t in (0.0, 1.0, torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0])):
        sample = bridge.sample(x0.float(), x1.float(), t)
        assert sample.velocity.isfinite().all() and sample.score.isfinite().all()
        assert (bridge.score_weight(t, x0) > 0).all()


def test_velocity_is_the_derivative_of_the_point_at_fixed_noise(draw) -> None:
    x0, x1, noise = draw(7, 3), draw(7, 3), draw(7, 3)
    t, h, bridge = torch.linspace(0.1, 0.9, 7, dtype=torch.float64), 1e-6, SchrodingerBridge(1.3)
    ahead, behind = (bridge.sample(x0, x1, t + d, noise=noise).xt for d in (h, -h))
    torch.testing.assert_close(bridge.sample(x0, x1, t, noise=noise).velocity, (ahead - behind) / (2 * h))


def test_noise_comes_from_the_generator_alone_and_half_precision_is_calculated_in_float32(draw) -> None:
    x0, x1, bridge = draw(8, 3).bfloat16(), draw(8, 3).bfloat16(), SchrodingerBridge()
    half = bridge.sample(x0, x1, 0.3, generator=seeded(5))
    assert torch.equal(half.xt, bridge.sample(x0, x1, 0.3, generator=seeded(5)).xt)
    full = bridge.sample(x0.float(), x1.float(), 0.3, noise=half.noise)
    for name in ("xt", "velocity", "score"):
        assert torch.equal(getattr(half, name), getattr(full, name).bfloat16())


def test_loss_is_zero_at_the_targets_and_a_unit_noise_regression_for_the_score(draw) -> None:
    bridge, t = SchrodingerBridge(0.6), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    sample = bridge.sample(draw(6, 2, 3), draw(6, 2, 3), t, noise=draw(6, 2, 3))
    assert bridge_matching_loss(sample.velocity, sample.score, sample, bridge).abs().max() < 1e-12
    no_score = bridge_matching_loss(sample.velocity, torch.zeros_like(sample.score), sample, bridge)
    torch.testing.assert_close(no_score, sample.noise.square().flatten(1).mean(1))
    off = bridge_matching_loss(sample.velocity + 2.0, sample.score, sample, bridge)
    torch.testing.assert_close(off, torch.full((6,), 4.0, dtype=torch.float64))


def test_mistakes_are_refused(draw) -> None:
    x, bridge = draw(4, 3), SchrodingerBridge()
    for call, message in (
        *((lambda bad=bad: SchrodingerBridge(bad), "sigma must be positive") for bad in (0.0, float("nan"))),
        (lambda: bridge.sample(x[:2], x, 0.5), r"x0 has shape \(2, 3\)"),
        (lambda: bridge.sample(x, x, 0.5, noise=x[:2]), r"noise has shape \(2, 3\)"),
        (lambda: bridge.sample(x, x, 0.5, noise=x, generator=torch.Generator()), "pass one of them"),
        (lambda: bridge.sample(x, x, 1.5), r"t must lie in \[0, 1\]"),
        (
            lambda: bridge_matching_loss(x, x[:2], bridge.sample(x, x, 0.5), bridge),
            r"the score has shape \(2, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
