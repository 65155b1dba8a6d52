"""Retrieval of captions: whether the nearest real image of a generated one has its caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.names import composed
from ..utils.progress import progress_bar
from .features import distances, features


class Retrieval(NamedTuple):
    """Numbers of images whose caption is among those of the k nearest data images.

    Attributes:
        n: images.
        hits: k -> number of images whose own caption is found.
        chance: k -> expected share if the captions were assigned to the images at random.
    """

    n: int
    hits: dict[int, int]
    chance: dict[int, float]

    @property
    def shares(self) -> dict[int, float]:
        """Return ``hits`` as shares: k -> share."""
        return {k: hits / self.n for k, hits in self.hits.items()}


def retrieve(
    generated: Tensor,
    captions: Sequence[str],
    data_images: Tensor,
    data_captions: Sequence[str],
    *,
    space: str = "pixels-32",
    tops: Sequence[int] = (1, 5),
) -> Retrieval:
    """Count, for each k of ``tops``, the images whose caption is among those of the k nearest data images.

    A caption is found if fewer than k data images are nearer than its nearest one. So if equal data images have
    several captions, each of them is found.

    Args:
        generated: (N, 3, H, W) in [-1, 1].
        captions: the N captions (or class names) that the images were generated for.
        data_images: (M, 3, H', W') in [-1, 1].
        data_captions: their M captions.

    Raises:
        ValueError: numbers of images and captions differ, or a set is empty.
        UserError: an image holds values that are not finite.
    """
    rows, reference = features(generated, space), features(data_images, space)
    return retrieve_rows(rows, captions, reference, data_captions, tops=tops)


def retrieve_rows(
    rows: Tensor,
    captions: Sequence[str],
    reference: Tensor,
    data_captions: Sequence[str],
    *,
    tops: Sequence[int] = (1, 5),
) -> Retrieval:
    """Count as `retrieve` does, from the features (N, D) of the images and (M, D) of the data.

    Raises:
        ValueError: numbers of rows and captions differ, or a set is empty.
    """
    _same_length("generated", rows, captions)
    _same_length("data", reference, data_captions)
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([numbers[caption] for caption in captions])
    counts = torch.bincount(own, minlength=len(numbers)).double()
    # Data images of other captions go into one more column.
    column = torch.tensor([numbers.get(caption, len(numbers)) for caption in data_captions])
    hits, by_chance = dict.fromkeys(tops, 0), dict.fromkeys(tops, 0.0)
    for part in progress_bar(torch.arange(len(rows)).split(64), desc="nearest images", delay=3, leave=False):
        apart = distances(rows[part], reference)
        first = torch.full((len(part), len(numbers) + 1), float("inf"))
        first = first.scatter_reduce(1, column.expand(len(part), -1), apart, "amin")[:, :-1]
        nearer = torch.searchsorted(apart.sort(1).values, first.contiguous())  # data images that are
        for k in tops:
            found = (nearer < k) & first.isfinite()
            hits[k] += int(found.gather(1, own[part, None]).sum())
            by_chance[k] += float((found.double() @ counts).sum())
    return Retrieval(len(rows), hits, {k: total / len(rows) ** 2 for k, total in by_chance.items()})


def split_attributes(captions: Sequence[str], attributes: Sequence[str]) -> list[tuple[str, int] | None]:
    """Return each caption without its attribute, and which one that was; None for those that carry none.

    A caption such as "waving hand: dark skin tone" carries one of ``attributes`` ("light skin tone",
    "dark skin tone", ...) as whole words; the longest match counts.
    """
    written = [composed(attribute) for attribute in attributes]
    by_length = sorted(range(len(written)), key=lambda i: -len(written[i]))
    words = [re.compile(rf"(?<!\w){re.escape(attribute)}(?!\w)") for attribute in written]
    found: list[tuple[str, int] | None] = []
    for caption in map(composed, captions):
        own = next((i for i in by_length if words[i].search(caption)), None)
        found.append(None if own is None else (words[own].sub("\0", caption), own))
    return found


def attribute_groups(
    captions: Sequence[str], attributes: Sequence[str], data_captions: Sequence[str]
) -> list[tuple[int, int, list[int]]]:
    """Find the captions that have a counterpart in the data for every attribute.

    The counterparts of a caption are the same words with each attribute in turn (:func:`split_attributes`).

    Returns:
        (index of the caption, index of its attribute, data index of the counterpart for each attribute). Captions
        without an attribute, or without a counterpart, are left out.
    """
    data = split_attributes(data_captions, attributes)
    where = {split: i for i, split in reversed(list(enumerate(data))) if split is not None}
    groups = []
    for index, split in enumerate(split_attributes(captions, attributes)):
        if split is None:
            continue
        rest, own = split
        found = [where[rest, i] for i in range(len(attributes)) if (rest, i) in where]
        if len(found) == len(attributes):
            groups.append((index, own, found))
    return groups


def attribute_retrieval(
    generated: Tensor, candidates: Tensor, expected: Sequence[int], *, space: str = "pixels-32"
) -> float:
    """Return the share of generated images whose nearest candidate, of their own K, is the expected one.

    Args:
        generated: (N, 3, H, W) in [-1, 1].
        candidates: (N, K, 3, H', W') in [-1, 1]; candidate k shows the same thing with attribute k.
        expected: the right k of each image.

    Raises:
        ValueError: numbers of images and expected attributes differ, or there are none.
        UserError: an image holds values that are not finite.
    """
    _same_length("generated", generated, expected)
    _same_length("candidates", candidates, expected)
    options = features(candidates.flatten(0, 1), space).unflatten(0, candidates.shape[:2])  # (N, K, D)
    gaps = (options - features(generated, space)[:, None]).norm(dim=2)
    return float((gaps.argmin(1) == torch.tensor(list(expected))).double().mean())


def _same_length(name: str, images: Tensor, labels: Sequence[object]) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{name}: {len(images)} images for {len(labels)} labels; give as many, and at least one"
        )
