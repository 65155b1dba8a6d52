"""Real images to stand beside generated ones: in the data's own proportions, and apart from the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch


class RealSplit(NamedTuple):
    """Two parts of the data without a common image.

    Attributes:
        beside: indices of real images that are compared with the reference as generated ones are: what a perfect
            generator would get.
        reference: indices of all other images.
    """

    beside: list[int]
    reference: list[int]


def in_proportion(labels: Sequence[str], seed: int) -> list[int]:
    """Return the indices of ``labels`` in a random order of which every beginning has the labels' own proportions.

    The first k hold each label as often as its share of k says, give or take two: each label is spread evenly over the
    order, from a random start. Equal labels and seeds give equal orders.

    Args:
        labels: class, caption or "" of every image.
    """
    generator = torch.Generator().manual_seed(seed)
    total, met, start = Counter(labels), Counter[str](), dict[str, float]()
    place = [0.0] * len(labels)
    for index in torch.randperm(len(labels), generator=generator).tolist():
        label = labels[index]
        if label not in start:
            start[label] = float(torch.rand((), generator=generator, dtype=torch.float64))
        place[index] = (met[label] + start[label]) / total[label]
        met[label] += 1
    return sorted(range(len(labels)), key=place.__getitem__)


def real_split(order: Sequence[int], generated: int) -> RealSplit:
    """Split the data into as many real images as are compared with the reference, and that reference.

    A Frechet distance depends on the numbers of images on both sides. So generated and real images are compared with
    one reference, as many of each; where the data are too few for all ``generated``, half of the data is.

    Args:
        order: indices of all data, see `in_proportion`.
    """
    beside = min(generated, len(order) // 2)
    return RealSplit(list(order[:beside]), list(order[beside:]))
