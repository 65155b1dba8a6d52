"""Choice of real images to compare with generated ones, in the data's own proportions and apart from the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch


class RealSplit(NamedTuple):
    """Two parts of the data without a common image.

    Attributes:
        beside: indices of the real images that are compared with the reference as the generated ones are; their
            distance is that of a perfect generator.
        reference: indices of all other images.
    """

    beside: list[int]
    reference: list[int]


def in_proportion(labels: Sequence[str], seed: int) -> list[int]:
    """Return the indices of ``labels`` in a random order whose every beginning has the labels' own proportions.

    Among the first k each label has its share of k, give or take two: each label is spread evenly over the order, from
    a random start. Equal labels and seeds give equal orders.

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
    """Split the data into real images beside the generated ones, and the reference of both.

    A Frechet distance depends on the numbers of images on both sides, so as many real as generated images are compared
    with one reference. If the data are too few for all ``generated``, half of the data is compared.

    Args:
        order: indices of all data, see `in_proportion`.
    """
    beside = min(generated, len(order) // 2)
    return RealSplit(list(order[:beside]), list(order[beside:]))
