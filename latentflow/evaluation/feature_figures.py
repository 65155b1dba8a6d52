"""Figures of generated and real images as vectors in one feature space, and each image's nearest training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..utils.names import composed
from .data import ImageSet
from .figures import missing, retrieval, share

MOST_REFERENCE = 20_000  # training images that are compared; others of a larger data set are left out
_NEIGHBOURS = 5  # that vote for a class; also the k of precision, recall, density and coverage
_SHOWN = 12, 5  # generated images, and nearest training images of each, in the sheet


@dataclass(frozen=True, kw_only=True)
class FeatureSets:
    """Features of all sets of images in one space, (N, D) each.

    Attributes:
        generated: of all generated images.
        train: of the training images `train_set`: those of ``beside`` first, then the reference.
        beside: number of real images that stand beside as many generated ones.
        unseen: of the images that were not trained on.
        device: where they are computed.
    """

    space: str
    generated: Tensor
    captions: list[str]
    train: Tensor
    train_set: ImageSet
    beside: int
    unseen: dict[str, Tensor]
    unseen_sets: dict[str, ImageSet]
    device: torch.device

    def of(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of more images (N, 3, H, W) in [-1, 1]."""
        return metrics.features(images, self.space, device=self.device)


def feature_sets(
    space: str,
    generated: Tensor,
    captions: list[str],
    train: ImageSet,
    real: metrics.RealSplit,
    unseen: dict[str, ImageSet],
    device: torch.device,
) -> FeatureSets:
    """Compute the features of every set once.

    Args:
        space: see `metrics.features`.
        real: which training images stand beside the generated ones; of the others 20,000 at most are the reference.
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no antialiased resizing
    train = train.rows([*real.beside, *real.reference[:MOST_REFERENCE]])
    return FeatureSets(
        space=space,
        generated=metrics.features(generated, space, device=device),
        captions=captions,
        train=metrics.features(train.images, space, device=device),
        train_set=train,
        beside=len(real.beside),
        unseen={name: metrics.features(part.images, space, device=device) for name, part in unseen.items()},
        unseen_sets=unseen,
        device=device,
    )


def compare(sets: FeatureSets, *, conditioned: bool, classes: bool) -> dict[str, Any]:
    """Measure generated images, and as many real ones, against the reference.

    Args:
        conditioned: images were generated for captions or classes.
        classes: these are the classes of the data.
    """
    n = sets.beside
    generated, beside, reference = sets.generated[:n], sets.train[:n], sets.train[n:]
    report: dict[str, Any] = {
        "space": sets.space,
        "dimensions": reference.shape[1],
        "generated": n,
        "real": n,
        "reference": len(reference),
        "frechet_distance": _frechet_distance(generated, beside, reference),
        "kernel_distance": _kernel_distance(generated, beside, reference),
        **_manifolds(generated, beside, reference),
    }
    if conditioned and classes:
        report["class_accuracy"] = _class_accuracy(sets)
    if conditioned and any(sets.captions):
        report["caption_retrieval"] = retrieval(
            sets.generated, sets.captions, sets.train, sets.train_set, sets.unseen, sets.unseen_sets
        )
    report["diversity"] = _diversity(generated, beside, sets.captions[:n])
    return report


def _frechet_distance(generated: Tensor, beside: Tensor, reference: Tensor) -> dict[str, Any]:
    if min(len(beside), len(reference)) < 2:
        return missing("value", "a covariance needs at least 2 images")
    return {
        "value": metrics.frechet_distance(generated, reference),
        "floor": metrics.frechet_distance(beside, reference),
    }


def _kernel_distance(generated: Tensor, beside: Tensor, reference: Tensor) -> dict[str, Any]:
    if min(len(beside), len(reference)) < 3:
        return missing("value", "it needs at least 3 images")
    value, floor = (metrics.kernel_distance(rows, reference) for rows in (generated, beside))
    return {
        "value": value.value,
        "standard_error": value.standard_error,
        "floor": floor.value,
        "floor_standard_error": floor.standard_error,
    }


def _manifolds(generated: Tensor, beside: Tensor, reference: Tensor) -> dict[str, Any]:
    if min(len(beside), len(reference)) <= _NEIGHBOURS:
        reason = f"it needs more than {_NEIGHBOURS} images"
        return {name: missing("value", reason) for name in metrics.Manifold._fields}
    found, real = (metrics.manifold(reference, rows, k=_NEIGHBOURS) for rows in (generated, beside))
    return {
        name: {"value": value, "real": getattr(real, name), "k": _NEIGHBOURS}
        for name, value in found._asdict().items()
    }


def _class_accuracy(sets: FeatureSets) -> dict[str, Any]:
    """Measure the share of images of whose 5 nearest reference images most have the class that was asked for."""
    n, labels = sets.beside, sets.train_set.captions

    def accuracy(rows: Tensor, asked: list[str]) -> dict[str, Any]:
        found = metrics.neighbour_labels(rows, sets.train[n:], labels[n:], k=_NEIGHBOURS)
        counts, expected = Counter(asked), Counter(found)
        chance = sum(expected[label] * count for label, count in counts.items()) / len(asked) ** 2
        right = sum(name == other for name, other in zip(found, asked, strict=True))
        return {**share(right, len(asked)), "chance": chance}

    return {
        **accuracy(sets.generated, sets.captions),
        "real": accuracy(sets.train[:n], labels[:n]),
        "k": _NEIGHBOURS,
    }


def _diversity(generated: Tensor, beside: Tensor, captions: list[str]) -> dict[str, Any]:
    """Measure the mean distance of two images of one condition, weighted by how often each was asked for.

    If no condition was asked for twice, that of any two images.
    """
    within = "condition" if len(set(captions)) < len(captions) and len(set(captions)) > 1 else "all"
    labels = captions if within == "condition" else [""] * len(captions)
    if len(labels) < 2:
        return missing("value", "it needs at least 2 images")
    ours, real = metrics.diversity(generated, labels), metrics.diversity(beside, labels)
    counts = Counter(label for label in labels if label in ours)
    value, floor = (
        sum(found[label] * count for label, count in counts.items()) / counts.total()
        for found in (ours, real)
    )
    ratio = {"ratio": value / floor} if floor > 0 else missing("ratio", "all real images are equal")
    return {"value": value, "real": floor, **ratio, "within": within}


def combinations(
    generated: Tensor,
    real: Tensor,
    captions: Sequence[str],
    train: Tensor,
    train_captions: Sequence[str],
    attributes: Sequence[str],
) -> dict[str, Any]:
    """Measure images of combinations of an attribute and a rest of a caption that were not trained on.

    Args:
        generated: features (N, D) of an image for each caption. real: (N, D), of the real images with these captions.
        captions: those of the N images; each carries one of ``attributes``, such as "flat style" in
            "flat style: red apple".
        train: (M, D), of the training images.

    Returns:
        ``attribute``: the share of images whose nearest training image has the same attribute. ``rest``: of those whose
        nearest training image, among those with another attribute, has the same rest; only of captions whose rest is
        there. Both with ``real``, that of the real images. ``caption``: the share of generated images whose nearest
        real image with the same attribute, of those trained on and those not, has the caption.
    """
    asked, data = (metrics.split_attributes(texts, attributes) for texts in (captions, train_captions))
    known = [split for split in asked if split is not None]
    assert len(known) == len(captions), "every caption carries an attribute"
    rests = [None if split is None else split[0] for split in data]
    of_data = torch.tensor([-1 if split is None else split[1] for split in data])
    own = torch.tensor([attribute for _, attribute in known])
    others = (of_data >= 0) & (of_data != own[:, None])  # (N, M)
    there = {split for split in data if split is not None}
    answered = [
        row
        for row, (rest, attribute) in enumerate(known)
        if any((rest, other) in there for other in range(len(attributes)) if other != attribute)
    ]

    def nearest(rows: Tensor, reference: Tensor, allowed: Tensor) -> list[int]:
        apart: Tensor = metrics.distances(rows, reference).masked_fill(~allowed, float("inf"))
        return apart.argmin(1).tolist()

    def measured(rows: Tensor) -> dict[str, dict[str, Any]]:
        same = of_data[nearest(rows, train, (of_data >= 0).expand(len(rows), -1))] == own
        found = nearest(rows[answered], train, others[answered])
        right = [rests[i] == known[row][0] for row, i in zip(answered, found, strict=True)]
        rest = (
            share(sum(right), len(right)) if right else missing("share", "no attribute has a rest in common")
        )
        return {"attribute": share(int(same.sum()), len(rows)), "rest": rest}

    ours, theirs = measured(generated), measured(real)
    both = [*train_captions, *captions]
    same_attribute = torch.cat([of_data, own]) == own[:, None]
    found = nearest(generated, torch.cat([train, real]), same_attribute)
    right = sum(composed(both[i]) == composed(caption) for i, caption in zip(found, captions, strict=True))
    return {
        **{name: {**figure, "real": theirs[name]} for name, figure in ours.items()},
        "caption": share(right, len(captions)),
    }


def neighbour_sheet(sets: FeatureSets, generated: Tensor) -> tuple[Tensor, int]:
    """Return the first generated images, each followed by its nearest training images, and the images in such a row."""
    rows, k = _SHOWN
    nearest = metrics.nearest_rows(sets.generated[:rows], sets.train, k)
    images = [
        torch.cat([image[None], sets.train_set.images[found]])
        for image, found in zip(generated[:rows], nearest, strict=False)
    ]
    return torch.cat(images), 1 + nearest.shape[1]
