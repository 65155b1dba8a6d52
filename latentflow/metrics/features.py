"""Feature spaces in which pictures are compared. Pixels need no download and mean the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.errors import lookup


def _pixels(images: Tensor, side: int) -> Tensor:
    unit = images.detach().float().clamp(-1, 1)
    small = F.interpolate(unit, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.flatten(1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels-16": partial(_pixels, side=16),  # 768 numbers: for distances between distributions
    "pixels-32": partial(_pixels, side=32),  # 3072 numbers: for the nearest picture
}


def features(images: Tensor, space: str = "pixels-32", batch_size: int = 256) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as vectors (B, D) float32 on the CPU.

    "pixels-16" and "pixels-32" are the RGB values of the antialiased 16x16 and 32x32 thumbnail.

    Raises:
        UserError: there is no such space.
    """
    function = lookup(FEATURES, space, "feature space")
    return torch.cat([function(batch).cpu() for batch in images.split(batch_size)])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between the rows of (N, D) and (M, D): (N, M)."""
    # Differences taken one by one: the quicker product form loses the small distances that matter for copies.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
