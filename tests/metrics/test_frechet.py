"""The Frechet distance against closed forms."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from latentflow.metrics import frechet_distance, gaussian_frechet_distance


def spread(d: int, seed: int) -> torch.Tensor:
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def test_diagonal_gaussians() -> None:
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    value = gaussian_frechet_distance(mean_a, std_a.square().diag(), mean_b, std_b.square().diag())
    assert value == pytest.approx(float(expected), abs=1e-10)


def test_full_covariances_agree_with_the_matrix_square_root() -> None:
    cov_a, cov_b = spread(6, 0), spread(6, 1)
    root = torch.from_numpy(scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real)
    expected = (cov_a + cov_b - 2 * root).trace()
    zero = torch.zeros(6)
    value = gaussian_frechet_distance(zero, cov_a, zero, cov_b)
    assert value == pytest.approx(float(expected), rel=1e-9)
    assert gaussian_frechet_distance(zero, cov_b, zero, cov_a) == pytest.approx(value, rel=1e-9)


def test_shifted_samples_differ_by_the_shift_alone_even_with_fewer_rows_than_dimensions() -> None:
    rows = torch.randn(10, 40, generator=torch.Generator().manual_seed(3))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(rows, rows + 0.5) == pytest.approx(40 * 0.25, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
