"""The split into training and validation, decided by content: names and order do not matter."""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from ..errors import UserError
from .cache.store import Array
from .checking.check import groups_of
from .dataset import Source

log = logging.getLogger(__name__)


def split(source: Source, validation: float | int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices of the training and of the validation examples, both ascending.

    ``validation`` is a share in [0, 1) when it is a float and a number of examples when it is an int. Every
    example is ranked by a hash of its content and ``seed``; the lowest ranks validate. Equal images have
    equal ranks and therefore stay on one side, so that no validation image is trained on under another name
    (the number held out may then be larger than asked). So do near duplicates (``near_duplicates``), which all
    take the highest rank among them, so that other images are held out rather than a whole group. Where that
    would hold out more than twice the number asked, as in a film, near duplicates are separated, with a warning.
    A folder of latents knows the groups of its images, and is split like them.

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
    held_out = _lowest(highest[members], wanted)
    if len(held_out) > max(2 * wanted, len(alone := _lowest(ranks, wanted))):
        log.warning("most images are near duplicates of others: groups of them are split")
        held_out = alone
    if len(held_out) == total:
        raise _impossible(validation, total)
    kept = np.ones(total, dtype=bool)
    kept[held_out] = False
    return np.flatnonzero(kept).tolist(), held_out.tolist()


def _lowest(ranks: Array, wanted: int) -> Array:
    return np.flatnonzero(ranks <= np.partition(ranks, wanted - 1)[wanted - 1])


def _impossible(validation: float | int, total: int) -> UserError:
    return UserError(
        f"cannot hold out {validation} of {total} images for validation and train on the rest",
        "Give a share such as 0.05, or a number below that of (different) images; 0 holds none out.",
    )
