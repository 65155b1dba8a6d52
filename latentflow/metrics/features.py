"""Feature spaces in which images are compared, and the Frechet distance in them. Those of pixels need no download."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, lookup


def _pixels(images: Tensor, side: int) -> Tensor:
    unit = images.detach().float().clamp(-1, 1)
    small = F.interpolate(unit, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.flatten(1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels-16": partial(_pixels, side=16),  # 768 numbers: for distances between distributions
    "pixels-32": partial(_pixels, side=32),  # 3072 numbers: for the nearest image
}


def features(images: Tensor, space: str = "pixels-32", batch_size: int = 256) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as vectors (B, D) float32 on the CPU.

    The features of "pixels-16" and "pixels-32" are the RGB values of the antialiased 16x16 and 32x32 thumbnail.

    Raises:
        UserError: there is no such space, or an image holds values that are not finite.
    """
    function = lookup(FEATURES, space, "feature space")
    refuse_not_finite(images, "images")
    return torch.cat([function(batch).cpu() for batch in images.split(batch_size)])


def refuse_not_finite(images: Tensor, description: str) -> None:
    """Refuse images (B, ...) with NaN or infinity, which would make every metric meaningless.

    Raises:
        UserError: says how many of ``description`` there are, and the number of the first.
    """
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"{len(broken)} of {len(images)} {description} hold values that are not finite, first number {broken[0]}",
            "Damaged weights, or an overflow in half precision, cause that; such images are not measured.",
        )


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances between the rows of (N, D) and (M, D), as (N, M)."""
    # Computed from differences: the faster form with matrix products loses the small distances that matter for copies.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
