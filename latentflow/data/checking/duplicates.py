"""Near duplicates: one image saved twice, at another size, quality or format, or cropped by a percent or two.

Two images are near duplicates when their perceptual hashes differ in at most ``BITS`` of 64 bits, and, as hashes of
different images also meet by chance, their thumbnails by at most ``LEVELS`` of 255 (root mean square) and their
aspect ratios by at most 5 %. Mirror images are not.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

BITS = 6
LEVELS = 4.0
ASPECT = 0.05
_BANDS = 8  # of 8 bits: where 6 bits differ at most, two bands at least are equal
_MOST_NEIGHBOURS = 200  # images that one is compared with in one table, which bounds the time on any data


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
    for first, second in combinations(range(_BANDS), 2):
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
