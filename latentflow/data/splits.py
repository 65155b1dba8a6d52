"""The split into training and validation, decided by content: names, order and copies of an image do not matter."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..utils.progress import progress_bar
from .cache.store import Array
from .checking.inspect_images import ImageInfo, inspect_images
from .dataset import Source

log = logging.getLogger(__name__)


def split(
    source: Source, validation: float | int, seed: int = 0, *, stratify: bool = True
) -> tuple[list[int], list[int]]:
    """Return the indices of the training and of the validation examples, both ascending.

    Every example is ranked by a hash of its content and ``seed``; the lowest ranks validate. Equal images have
    equal ranks and therefore stay on one side, so that no validation image is trained on under another name
    (the number held out may then be larger than asked). So do near duplicates (``near_duplicates``), which all
    take the highest rank among them, so that other images are held out rather than a whole group. Where that
    would hold out more than twice the number asked, as in a film, near duplicates are separated, with a warning.
    A folder of latents knows the groups of its images, and is split like them.

    Args:
        validation: a share in [0, 1) if it is a float, a number of examples if it is an int.
        stratify: hold out the lowest ranks of every class, as many as its share of the images; else the lowest of all.

    Raises:
        UserError: nothing would be left to train on, or ``validation`` is negative.
    """
    total = len(source)
    wanted = validation if isinstance(validation, int) else round(validation * total)
    if isinstance(validation, float) and 0 < validation < 1 and total > 1:
        wanted = max(1, wanted)
    if wanted < 0 or (wanted >= total and wanted > 0):
        raise _impossible(validation, total)
    if not wanted:
        return list(range(total)), []
    digests = (hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in source.content_keys())
    ranks = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, total)
    groups, members = np.unique(groups_of(source), return_inverse=True)
    highest = np.zeros(len(groups), dtype=np.uint64)  # of each group
    np.maximum.at(highest, members, ranks)
    strata = (
        np.unique(source.strata(), return_inverse=True)[1] if stratify else np.zeros(total, dtype=np.int64)
    )
    held_out = _lowest(highest[members], strata, wanted)
    if len(held_out) > max(2 * wanted, len(alone := _lowest(ranks, strata, wanted))):
        log.warning(
            "most images are near duplicates of others: some held-out images are near duplicates of training images"
        )
        held_out = alone
    if len(held_out) == total:
        raise _impossible(validation, total)
    kept = np.ones(total, dtype=bool)
    kept[held_out] = False
    return np.flatnonzero(kept).tolist(), held_out.tolist()


def _lowest(ranks: Array, strata: Array, wanted: int) -> Array:
    """Return the images (at least ``wanted``) of the lowest ranks of every stratum, in proportion to the strata.

    Of a stratum of n images, sorted by rank, number i = 1, 2, ... stands at (i - 1/2) / n; those that stand first in
    all are taken (the method of Sainte-Lague, by which a larger number always contains the smaller). Images of equal
    rank stay together, where the last of them stands, and belong to the stratum of the first.
    """
    _, first, members, sizes = np.unique(ranks, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(strata[first], kind="stable")  # by stratum, and in each by rank
    stratum = strata[first][order]
    last = np.cumsum(sizes[order])
    images = np.bincount(stratum, weights=sizes[order])
    before = np.cumsum(images) - images
    stands = (last - before[stratum] - 0.5) / images[stratum]
    taken = order[np.lexsort((order, stands))]  # where two stand equal, the lower rank
    count = int(np.searchsorted(np.cumsum(sizes[taken]), wanted)) + 1
    return np.flatnonzero(np.isin(members, taken[:count]))


def _impossible(validation: float | int, total: int) -> UserError:
    return UserError(
        f"cannot hold out {validation} of {total} images for validation and train on the rest",
        "Give a share such as 0.05, or a number below that of (different) images; 0 holds none out.",
    )


# ---------------------------------------------------------------- near duplicates

# Near duplicates are one image saved twice, at another size, quality or format, or cropped by a percent or two: their
# perceptual hashes differ in at most ``BITS`` of 64 bits, and, as hashes of different images also meet by chance, their
# thumbnails by at most ``LEVELS`` of 255 (root mean square) and their aspect ratios by at most 5 %. Mirror images are
# not.
BITS = 6
LEVELS = 4.0
ASPECT = 0.05
_BANDS = 8  # of 8 bits: where 6 bits differ at most, two bands at least are equal
_MOST_NEIGHBOURS = 200  # images that one is compared with in one table, which bounds the time on any data
NEAR = f"near duplicates: at most {BITS} of 64 bits of their hashes and {LEVELS:g} of 255 levels of thumbnails apart"


def groups_of(source: Source) -> NDArray[np.int64]:
    """Return the number of the group of near duplicates (N,) of every image."""
    stored = source.groups()
    return near_groups(list(inspect_images(source))) if stored is None else stored


def near_groups(infos: Sequence[ImageInfo]) -> NDArray[np.int64]:
    """Return the number of the group of near duplicates (N,) of every image; what cannot be read stands alone."""
    groups = np.arange(len(infos), 2 * len(infos))
    known = [info for info in infos if info.error is None]
    if known:
        thumbnails = np.frombuffer(b"".join(info.thumbnail for info in known), dtype=np.uint8)
        groups[[info.error is None for info in infos]] = near_duplicates(
            np.array([info.hash for info in known], dtype=np.int64),
            thumbnails.reshape(len(known), -1),
            np.array([info.size for info in known], dtype=np.int64),
        )
    return groups


def near_duplicates(
    hashes: NDArray[np.int64], thumbnails: NDArray[np.uint8], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of the group (N,) that each image belongs to. A group grows from pair to pair.

    Args:
        hashes: (N,) perceptual hashes.
        thumbnails: (N, D) pixels.
        sizes: (N, 2) widths and heights.
    """
    aspects = np.log(sizes[:, 0] / sizes[:, 1]).astype(np.float32)
    # Copies are compared once: thousands of equal blank pages would make millions of pairs.
    records = np.concatenate(
        [hashes[:, None].view(np.uint8), thumbnails, aspects[:, None].view(np.uint8)], axis=1
    )
    _, first, copies = np.unique(records, axis=0, return_index=True, return_inverse=True)
    labels = _grouped(hashes[first].view(np.uint64), thumbnails[first], aspects[first])
    return labels[copies.reshape(-1)]


def _grouped(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], aspects: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return groups (N,) joined by near pairs. Only images that agree in two bands of their hashes are compared."""
    bands = hashes[:, None].view(np.uint8).astype(np.uint16)
    labels = np.arange(len(hashes))
    pairs = list(combinations(range(_BANDS), 2))
    for first, second in progress_bar(pairs, desc="comparing images", delay=3, leave=False):
        keys = bands[:, first] << 8 | bands[:, second]
        order = np.lexsort((hashes, keys))
        keys = keys[order]
        alive = np.arange(len(keys))
        for step in range(1, _MOST_NEIGHBOURS):
            alive = alive[: np.searchsorted(alive, len(keys) - step)]
            alive = alive[keys[alive] == keys[alive + step]]
            if not len(alive):
                break
            a, b = order[alive], order[alive + step]
            # In a film nearly all pairs are near: those within one group already are neither compared nor kept.
            close = (labels[a] != labels[b]) & (np.bitwise_count(hashes[a] ^ hashes[b]) <= BITS)
            labels = _merged(labels, _verified(a[close], b[close], thumbnails, aspects))
    return labels


def _merged(labels: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups after joining those of each pair (P, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return labels
    edges = labels[pairs]
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(len(labels),) * 2)
    joined: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return joined[labels].astype(np.int64)


def _verified(
    a: NDArray[np.int64], b: NDArray[np.int64], thumbnails: NDArray[np.uint8], aspects: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the pairs (P, 2) among candidates ``a`` and ``b`` that are near by shape and thumbnail."""
    alike = np.abs(aspects[a] - aspects[b]) <= ASPECT
    a, b = a[alike], b[alike]
    difference = thumbnails[a].astype(np.float32) - thumbnails[b]
    near = np.square(difference).mean(axis=1) <= LEVELS**2
    return np.stack([a[near], b[near]], axis=1)
