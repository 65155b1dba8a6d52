"""Are generated pictures copies of training pictures?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import distances, features


class Memorisation(NamedTuple):
    """Distances to the nearest training picture, generated beside held-out ones.

    Attributes:
        ratio: median distance of generated pictures over that of held-out real ones. About 1: as new as real
            pictures that were never trained on. Near 0: copies.
        copies: share of generated pictures nearer to a training picture than 95 % of the held-out ones are.
            About 0.05 without memorisation.
        generated: that median distance, per feature (root mean square), for generated pictures.
        held_out: the same for held-out pictures.
    """

    ratio: float
    copies: float
    generated: float
    held_out: float


def memorisation(
    generated: Tensor, train: Tensor, held_out: Tensor | None, *, space: str = "pixels-32"
) -> Memorisation:
    """Compare nearest-neighbour distances in a feature space, without learned weights.

    Held-out pictures that are near variants of training pictures have small distances themselves, which
    raises the ratio and hides copies: hold out what is as new as a generated picture should be.

    Args:
        generated, train, held_out: (N, 3, H, W) in [-1, 1], each with at least one image. Without ``held_out`` each
            training picture stands for one that was held out, beside the others (of which there must be one).

    Raises:
        ValueError: a set is empty.
    """
    fresh = train[1:] if held_out is None else held_out
    if not (len(generated) and len(train) and len(fresh)):
        raise ValueError(
            f"a set is empty: {len(generated)} generated, {len(train)} train, {len(fresh)} held out"
        )
    reference = features(train, space)
    scale = reference.shape[1] ** 0.5
    near_generated = distances(features(generated, space), reference).amin(1) / scale
    if held_out is None:
        among = distances(reference, reference).fill_diagonal_(float("inf"))
    else:
        among = distances(features(held_out, space), reference)
    near_held_out = among.amin(1) / scale
    threshold = torch.quantile(near_held_out, 0.05)
    medians = float(near_generated.quantile(0.5)), float(near_held_out.quantile(0.5))
    return Memorisation(
        ratio=medians[0] / medians[1] if medians[1] else float("nan"),
        copies=float((near_generated < threshold).double().mean()),
        generated=medians[0],
        held_out=medians[1],
    )
