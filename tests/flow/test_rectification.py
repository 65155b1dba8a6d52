from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import CondOT, integrate, reflow_pairs, straightness, time_grid

FINE = time_grid(200)


def gaussian_straightness(std: float) -> float:
    """S / x0^2 from N(0, 1) to N(m, std^2): z_t = t m + sqrt(V_t) x0, V_t = t^2 std^2 + (1 - t)^2."""

    def slope(t: float) -> float:
        return (t * std**2 - (1 - t)) / np.sqrt(t**2 * std**2 + (1 - t) ** 2)

    return quad(lambda t: (std - 1 - slope(t)) ** 2, 0, 1, epsabs=1e-12)[0]


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 2), ("dopri5", 2), ("euler", 1)])
def test_straightness_of_a_gaussian_and_its_order(gaussian, draw, solver, order) -> None:
    x0 = draw(8, 3)
    exact = gaussian_straightness(gaussian.stds[0]) * x0.square().sum(1)

    def error(steps: int) -> float:
        found = straightness(gaussian.on(CondOT()), x0, time_grid(steps), solver, rtol=1e-9, atol=1e-9)
        assert found.shape == (8,)
        return float((found / exact - 1).abs().max())

    coarse, fine = error(40), error(160)
    assert fine < (2e-4 if order == 2 else 0.1)
    assert np.log(coarse / fine) / np.log(4) == pytest.approx(order, abs=0.25)


def test_straightness_sums_over_elements_and_is_the_same_backwards(mixture, draw) -> None:
    x0 = draw(5, 2, 3, 4)
    velocity = mixture.on(CondOT())
    rows = straightness(velocity, x0, FINE)
    assert torch.allclose(rows, straightness(velocity, x0.reshape(-1, 1), FINE).reshape(5, -1).sum(1))
    back = straightness(velocity, integrate(velocity, x0, FINE), FINE.flip(0))
    assert torch.allclose(back, rows, rtol=1e-3)


def test_a_constant_velocity_is_straight_and_a_kink_has_the_variance_of_its_slopes(draw) -> None:
    x0, step = draw(6, 4), draw(4)
    for times in ([0.0, 0.3, 1.0], [0.9, 0.5, 0.2]):
        assert straightness(lambda x, t: step.expand_as(x), x0, times).max() < 1e-28
    kink = lambda x, t: torch.full_like(x, 3.0 * (t >= 0.5))  # noqa: E731
    found = straightness(kink, torch.zeros(2, 1), [0.2, 0.5, 0.6], "euler")
    assert found.tolist() == pytest.approx([9 * 0.25 * 0.75] * 2)  # slope 3 for a quarter of the time


def test_pairs_are_the_map_of_the_flow_row_by_row(gaussian, draw) -> None:
    noise = draw(7, 2, 3).requires_grad_()
    velocity = gaussian.on(CondOT())
    x0, x1 = reflow_pairs(velocity, noise, [0, 1], "dopri5", rtol=1e-10, atol=1e-10)
    assert torch.equal(x0, noise) and not x0.requires_grad and not x1.requires_grad
    assert torch.allclose(x1, 1.5 + 0.4 * x0, atol=1e-8)
    for batch_size in (1, 3, 7, 100):
        assert torch.allclose(reflow_pairs(velocity, noise, FINE, batch_size=batch_size)[1], x1, atol=1e-4)


def test_rectifying_a_correlated_gaussian_makes_it_straight(draw) -> None:
    """Affine velocities, fitted by least squares at every t, are exact between jointly Gaussian ends."""
    path, noise = CondOT(), draw(4000, 2)
    data = draw(4000, 2) @ torch.tensor([[2.0, 0.0], [1.0, 0.3]], dtype=torch.float64).T + 1.0

    def fitted(x0: Tensor, x1: Tensor):
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            sample = path.sample(x0, x1, t)
            known = torch.cat([sample.xt, torch.ones_like(x0[:, :1])], 1)
            weights = torch.linalg.lstsq(known, sample.velocity).solution
            return torch.cat([x, torch.ones_like(x[:, :1])], 1) @ weights

        return velocity

    first = fitted(noise, data)
    x0, x1 = reflow_pairs(first, noise, time_grid(50), batch_size=1500)
    second = fitted(x0, x1)
    start = draw(100, 2)
    before, after = (straightness(v, start, time_grid(50)).mean() for v in (first, second))
    assert before > 0.1
    assert after < 1e-8 * before
    # Straight: one Euler step is the whole map, and it is the map of the first flow.
    assert torch.allclose(
        integrate(second, start, [0, 1], "euler"), integrate(first, start, time_grid(50)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("function", "times", "options", "error", "message"),
    [
        (reflow_pairs, [0, 1], {"batch_size": 0}, ValueError, "batch_size is 0"),
        (reflow_pairs, [0, 1], {"solver": "huen"}, UserError, "did you mean 'heun'"),
        (straightness, [0, 1], {}, ValueError, "at least 2 steps"),
        (straightness, FINE, {"solver": "huen"}, UserError, "did you mean 'heun'"),
        (straightness, FINE, {"solver": "ddpm"}, UserError, "stochastic"),
    ],
)
def test_mistakes_are_named(function, times, options, error, message) -> None:
    with pytest.raises(error, match=message):
        function(lambda x, t: x, torch.zeros(2, 2), times, **options)
