from __future__ import annotations

import pytest
import scipy.special
import scipy.stats
import torch

from latentflow.errors import UserError
from latentflow.flow import TIME_DENSITIES, sample_times, time_grid


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8), (-1.0, 2.0)])
def test_logit_normal_has_the_quantiles_of_scipy(mean, std) -> None:
    u = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    expected = torch.from_numpy(scipy.special.expit(scipy.stats.norm.ppf(u.numpy(), loc=mean, scale=std)))
    torch.testing.assert_close(sample_times("logit-normal", u, mean, std), expected, atol=1e-12, rtol=1e-12)


def test_a_positive_mean_leans_towards_the_data() -> None:
    u = torch.linspace(0.05, 0.95, 11, dtype=torch.float64)
    assert (sample_times("logit-normal", u, mean=1.0) > sample_times("logit-normal", u)).all()


def test_uniform_is_the_identity() -> None:
    u = torch.rand(7, dtype=torch.float64)
    assert torch.equal(sample_times("uniform", u), u)


@pytest.mark.parametrize("name", TIME_DENSITIES)
def test_densities_are_increasing_quantile_functions_into_the_unit_interval(name) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64).reshape(7, 143)
    t = sample_times(name, u)
    assert t.shape == u.shape
    assert t.dtype == torch.float64
    assert (t.flatten().diff() > 0).all()
    assert t.min() >= 0
    assert t.max() <= 1
    assert sample_times(name, torch.rand(3)).dtype == torch.float64  # float32 numbers are widened


def test_bad_densities_are_named() -> None:
    u = torch.rand(3)
    with pytest.raises(
        UserError, match=r"(?s)unknown time density 'logit_normal'.*did you mean 'logit-normal'"
    ):
        sample_times("logit_normal", u)
    with pytest.raises(UserError, match="std of the logit-normal density is 0"):
        sample_times("logit-normal", u, std=0.0)
    with pytest.raises(ValueError, match=r"u spans|uniform numbers in \[0, 1\]"):
        sample_times("uniform", u + 1)


def test_grid_of_shift_1_is_uniform() -> None:
    grid = time_grid(8)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [i / 8 for i in range(9)]


@pytest.mark.parametrize("shift", [0.3, 1.15, 3.0, 7.7])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_shift_is_that_of_sd3_on_sigma(steps, shift) -> None:
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = time_grid(steps, shift)
    torch.testing.assert_close(1 - grid, shift * sigma / (1 + (shift - 1) * sigma), atol=1e-14, rtol=0)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()


def test_a_larger_shift_spends_more_steps_near_the_noise() -> None:
    assert (time_grid(10, 3.0)[1:-1] < time_grid(10)[1:-1]).all()


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-5, 1.0), (10, 0.0), (10, -1.0), (10, float("nan"))])
def test_bad_grids_are_refused(steps, shift) -> None:
    with pytest.raises(UserError, match=r"sampling steps|time shift"):
        time_grid(steps, shift)
