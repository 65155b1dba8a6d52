"""Feature spaces in which images are compared. Pixels need no download and mean the same everywhere."""

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
    """Images (B, 3, H, W) in [-1, 1] as vectors (B, D) float32 on the CPU.

    "pixels-16" and "pixels-32" are the RGB values of the antialiased 16x16 and 32x32 thumbnail.

    Raises:
        UserError: there is no such space, or an image holds values that are not finite.
    """
    function = lookup(FEATURES, space, "feature space")
    refuse_not_finite(images, "images")
    return torch.cat([function(batch).cpu() for batch in images.split(batch_size)])


def refuse_not_finite(images: Tensor, what: str) -> None:
    """Refuse images (B, ...) with NaN or infinity: every figure of them would be one of its own.

    Raises:
        UserError: says how many of ``what``, and which the first is.
    """
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"{len(broken)} of {len(images)} {what} hold values that are not finite, first number {broken[0]}",
            "Weights that are damaged, or that overflow in half precision, do that; such images are not measured.",
        )


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between the rows of (N, D) and (M, D): (N, M)."""
    # Differences taken one by one: the quicker product form loses the small distances that matter for copies.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
