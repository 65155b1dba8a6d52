"""Which examples are held out for validation: decided by content, so that names and order do not matter."""

from __future__ import annotations

import hashlib
import logging

from latentflow.errors import UserError

from .checking.source import groups_of
from .examples import Source

log = logging.getLogger(__name__)


def split(source: Source, validation: float | int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation examples, both ascending.

    ``validation`` is a share in [0, 1) when it is a float and a number of examples when it is an int. Every
    example is ranked by a hash of its content and ``seed``; the lowest ranks validate. Equal pictures have
    equal ranks and therefore stay on one side, so that no validation picture is trained on under another name
    (the number held out may then be larger than asked). So do near duplicates (``checking/near.py``), which all
    take the highest rank among them: as a group has to be held out as a whole, rather others are. Where that
    would hold out more than twice the number asked, as in a film, near duplicates are parted, and a warning says
    so. A folder of latents knows the groups of its pictures, and is split as they are.

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
    ranks = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in source.content_keys()]
    held_out = _lowest(_joined(source, ranks), wanted)
    if len(held_out) > max(2 * wanted, len(alone := _lowest(ranks, wanted))):
        log.warning("most pictures are near duplicates of others: some are validated on, others trained on")
        held_out = alone
    if len(held_out) == total:
        raise _impossible(validation, total)
    chosen = set(held_out)
    return [i for i in range(total) if i not in chosen], held_out


def _lowest(ranks: list[str], wanted: int) -> list[int]:
    limit = sorted(ranks)[wanted - 1]
    return [i for i, rank in enumerate(ranks) if rank <= limit]


def _joined(source: Source, ranks: list[str]) -> list[str]:
    """The ranks, near duplicates having the highest among theirs."""
    groups = groups_of(source).tolist()
    highest: dict[int, str] = {}
    for rank, group in zip(ranks, groups, strict=True):
        highest[group] = max(rank, highest.get(group, ""))
    return [highest[group] for group in groups]


def _impossible(validation: float | int, total: int) -> UserError:
    return UserError(
        f"cannot hold out {validation} of {total} pictures for validation and train on the rest",
        "Give a share such as 0.05, or a number below that of (different) pictures; 0 holds none out.",
    )
