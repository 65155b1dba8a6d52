"""Frechet distance between Gaussians that are fitted to two sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance between the Gaussians fitted to the rows of (N, D) and (M, D).

    With fewer rows than dimensions it is biased upwards: compare only distances with the same N, and with that of as
    many real images.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    return gaussian_frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def gaussian_frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), computed in float64.

    Dowson & Landau 1982, eq. 4; FID is this number for Inception features (Heusel et al. 2017,
    arXiv:1706.08500, eq. 6).

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric and positive semi-definite.
    """
    cov_a, cov_b = cov_a.double(), cov_b.double()
    root = _symmetric_root(cov_a)
    # C_a C_b is similar to the symmetric C_a^(1/2) C_b C_a^(1/2), whose roots are real and safe to take.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
