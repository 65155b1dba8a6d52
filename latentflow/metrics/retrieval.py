"""Does a generated picture show what was asked? It does if its nearest real picture carries that caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .features import distances, features


def caption_retrieval(
    generated: Tensor,
    captions: Sequence[str],
    data_images: Tensor,
    data_captions: Sequence[str],
    *,
    space: str = "pixels-32",
    tops: Sequence[int] = (1, 5),
) -> dict[int, float]:
    """For each k of ``tops``: the share of images whose caption is among those of the k nearest data images.

    Args:
        generated: (N, 3, H, W) in [-1, 1].
        captions: the N captions (or class names) that were asked for.
        data_images: (M, 3, H', W') in [-1, 1].
        data_captions: their M captions.

    Raises:
        ValueError: numbers of images and captions differ, or a set is empty.
    """
    _same_length("generated", generated, captions)
    _same_length("data", data_images, data_captions)
    space_of_data = features(data_images, space)
    nearest = distances(features(generated, space), space_of_data).argsort(1)[:, : max(tops)].tolist()
    return {
        k: sum(
            caption in {data_captions[i] for i in row[:k]}
            for caption, row in zip(captions, nearest, strict=True)
        )
        / len(captions)
        for k in tops
    }


def attribute_groups(
    captions: Sequence[str], attributes: Sequence[str], data_captions: Sequence[str]
) -> list[tuple[int, int, list[int]]]:
    """The captions that have one counterpart in the data for every attribute.

    A caption such as "waving hand: dark skin tone" carries one of ``attributes`` ("light skin tone",
    "dark skin tone", ...; the longest that fits counts). Its counterparts are the same words with each
    attribute in turn.

    Returns:
        (index of the caption, index of its attribute, data index of the counterpart per attribute). Captions
        without an attribute, or with a counterpart missing, are left out.
    """
    where = {caption: i for i, caption in reversed(list(enumerate(data_captions)))}
    by_length = sorted(range(len(attributes)), key=lambda i: -len(attributes[i]))
    groups = []
    for index, caption in enumerate(captions):
        own = next((i for i in by_length if attributes[i] in caption), None)
        if own is None:
            continue
        counterparts = [where.get(caption.replace(attributes[own], other)) for other in attributes]
        found = [i for i in counterparts if i is not None]
        if len(found) == len(attributes):
            groups.append((index, own, found))
    return groups


def attribute_retrieval(
    generated: Tensor, candidates: Tensor, expected: Sequence[int], *, space: str = "pixels-32"
) -> float:
    """Share of generated images whose nearest candidate, of their own K, is the expected one.

    Args:
        generated: (N, 3, H, W) in [-1, 1].
        candidates: (N, K, 3, H', W') in [-1, 1]; candidate k shows the same thing with attribute k.
        expected: the N right values of k.

    Raises:
        ValueError: numbers of images and expected attributes differ, or there are none.
    """
    _same_length("generated", generated, expected)
    _same_length("candidates", candidates, expected)
    options = features(candidates.flatten(0, 1), space).unflatten(0, candidates.shape[:2])  # (N, K, D)
    gaps = (options - features(generated, space)[:, None]).norm(dim=2)
    return float((gaps.argmin(1) == torch.tensor(list(expected))).double().mean())


def _same_length(what: str, images: Tensor, labels: Sequence[object]) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{what}: {len(images)} images for {len(labels)} labels; give as many, and at least one"
        )
