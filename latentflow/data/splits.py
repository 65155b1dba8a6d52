"""Which examples are held out for validation: decided by content, so that names and order do not matter."""

from __future__ import annotations

import hashlib

from latentflow.errors import UserError

from .examples import Source


def split(source: Source, validation: float | int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation examples, both ascending.

    ``validation`` is a share in [0, 1) when it is a float and a number of examples when it is an int. Every
    example is ranked by a hash of its content and ``seed``; the lowest ranks validate. Equal pictures have
    equal ranks and therefore stay on one side, so that no validation picture is trained on under another name
    (the number held out may then be larger than asked).

    Raises:
        UserError: nothing would be left to train on, or ``validation`` is negative.
    """
    total = len(source)
    wanted = validation if isinstance(validation, int) else round(validation * total)
    if isinstance(validation, float) and 0 < validation < 1 and total > 1:
        wanted = max(1, wanted)
    ranks = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in source.content_keys()]
    if wanted < 0 or (wanted >= total and wanted > 0):
        raise _impossible(validation, total)
    limit = sorted(ranks)[wanted - 1] if wanted else ""
    held_out = [i for i, rank in enumerate(ranks) if rank <= limit]
    if held_out and len(held_out) == total:
        raise _impossible(validation, total)
    return [i for i, rank in enumerate(ranks) if rank > limit], held_out


def _impossible(validation: float | int, total: int) -> UserError:
    return UserError(
        f"cannot hold out {validation} of {total} pictures for validation and train on the rest",
        "Give a share such as 0.05, or a number below that of (different) pictures; 0 holds none out.",
    )
