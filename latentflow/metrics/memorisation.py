"""Comparison of generated images with their nearest training images, which finds copies."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.progress import progress_bar
from .features import distances, features

COMMON = 0.95  # share of new real images that are farther from the training images than a copy is
ENOUGH = 50  # held-out images; with fewer, the share above is noise
_LEFT_OUT = 1000  # training images, at most, that are each compared with all others


class Memorisation(NamedTuple):
    """Distances to the nearest training image, of generated images beside those of new real ones.

    Attributes:
        ratio: median distance of generated images divided by that of new real ones. About 1: as new as real images
            that were not trained on. Near 0: copies.
        copies: share of generated images that are nearer to a training image than 95 % of new real ones are.
        copied: number of these images.
        drawn: number of generated images.
        expected: mean of ``copies`` for a generator that memorises nothing: 0.05, or more with fewer than 19 new real
            images.
        usual: interval (low, high) that holds ``copies`` of such a generator in 95 of 100 measurements with as many
            generated and new real images.
        generated: median distance per feature (root mean square) of generated images.
        real: the same of new real images.
        compared: number of new real images.
        new: which images are the new ones: "held out"; or "left out": training images, each compared with the others.
    """

    ratio: float
    copies: float
    copied: int
    drawn: int
    expected: float
    usual: tuple[float, float]
    generated: float
    real: float
    compared: int
    new: Literal["held out", "left out"]


def memorisation(
    generated: Tensor, train: Tensor, held_out: Tensor | None, *, space: str = "pixels-32"
) -> Memorisation:
    """Compare nearest-neighbour distances in a feature space, without learned weights.

    New real images are the held-out ones, if at least 50 different ones of them are not in ``train``. Otherwise
    training images (1,000 at most, evenly spread) are each compared with all others. Equal images count once, so that
    a duplicate in ``train`` does not count as a new image with a near neighbour.

    Near variants of training images among the held-out ones raise the threshold and hide copies: hold out images that
    are as new as generated ones should be.

    Args:
        generated, train, held_out: (N, 3, H, W) in [-1, 1].

    Raises:
        ValueError: there are no generated images, or no two training images differ.
        UserError: an image holds values that are not finite.
    """
    reference = features(train, space).unique(dim=0)
    if not len(generated) or len(reference) < 2:
        raise ValueError(
            f"{len(generated)} generated images and {len(reference)} different training images: "
            "give at least one and two"
        )
    near_generated = nearest(features(generated, space), reference)
    near_real = torch.zeros(0)
    if held_out is not None and len(held_out) >= ENOUGH:
        near_real = nearest(features(held_out, space).unique(dim=0), reference)
        near_real = near_real[near_real > 0]
    held = len(near_real) >= ENOUGH
    if not held:
        rows = torch.linspace(0, len(reference) - 1, min(len(reference), _LEFT_OUT)).round().long()
        near_real = nearest(reference[rows], reference, left_out=rows)

    from scipy.stats import betabinom

    # The r-th smallest of h distances has r / (h + 1) of all new images below it, on average; where r is no whole
    # number, it lies between two. What is below then is distributed as Beta(r, h + 1 - r).
    h, drawn = len(near_real), len(near_generated)
    r = max((1 - COMMON) * (h + 1), 1.0)
    threshold = float(np.quantile(near_real.double().numpy(), r / (h + 1), method="weibull"))
    copied = int((near_generated < threshold).sum())
    low, high = betabinom(drawn, r, h + 1 - r).interval(0.95)
    medians = float(near_generated.quantile(0.5)), float(near_real.quantile(0.5))
    scale = reference.shape[1] ** 0.5
    return Memorisation(
        ratio=medians[0] / medians[1],
        copies=copied / drawn,
        copied=copied,
        drawn=drawn,
        expected=r / (h + 1),
        usual=(float(low) / drawn, float(high) / drawn),
        generated=medians[0] / scale,
        real=medians[1] / scale,
        compared=h,
        new="held out" if held else "left out",
    )


def nearest(rows: Tensor, reference: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Return the distance of each of ``rows`` (N, D) to the nearest of ``reference`` (M, D): (N,).

    Args:
        left_out: (N,), index of the row in ``reference`` that each row is not compared with: itself.
    """
    found = torch.empty(len(rows))
    for part in progress_bar(torch.arange(len(rows)).split(64), desc="nearest images", delay=3, leave=False):
        apart = distances(rows[part], reference)
        if left_out is not None:
            apart.scatter_(1, left_out[part, None], float("inf"))
        found[part] = apart.amin(1)
    return found
