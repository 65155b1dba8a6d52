"""What one row of any table says of a picture: text (one or several), label, mask, weight."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from latentflow.documents import refuse_no_text
from latentflow.errors import UserError, nearest, shown

HEAVIEST = 1e6  # weight of an image's loss: more only ends in updates that are not finite
KNOWN = ("image", "file_name", "text", "label", "mask", "weight")
_MEANT = {
    "text": ("caption", "captions", "prompt", "description", "texts"),
    "label": ("class", "classes", "category", "labels", "class_name"),
    "mask": ("masks", "mask_file", "mask_file_name", "mask_path", "mask_image"),
    "weight": ("weights", "loss_weight", "sample_weight"),
}
_NUMBERED = re.compile(r"text_([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Said:
    """What a row says: captions (none, one or several), a label or None, and a factor on the loss."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    weight: float = 1.0


def said(row: Mapping[str, object], where: str) -> Said:
    """The meaning of a row's ``text`` (a string or a list), ``text_1``, ``text_2``, ..., ``label`` and ``weight``.

    ``where`` begins messages: the file and the line.

    Raises:
        UserError: a value is of the wrong type.
    """
    numbered = sorted((int(m[1]), name) for name in row if (m := _NUMBERED.fullmatch(name)))
    texts: list[str] = []
    for name in ("text", *(name for _, name in numbered)):
        texts += _texts(row.get(name), f"{where}: {name}")
    return Said(tuple(texts), _label(row.get("label"), where), _weight(row.get("weight"), where))


def class_name(names: Sequence[str], label: object, where: str) -> object:
    """The name of a class that `datasets` writes as a number; None for -1, its word for "not known".

    Raises:
        UserError: there is no such number.
    """
    if not isinstance(label, int) or label == -1:
        return None if label == -1 else label
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label is {label}, of {len(names)} classes", "Write the table again.")
    return names[label]


def is_text(column: str) -> bool:
    """Whether a column holds captions: ``text`` or ``text_1``, ``text_2``, ..."""
    return column == "text" or _NUMBERED.fullmatch(column) is not None


def rename(columns: Iterable[str], meant: Mapping[str, str], where: str) -> dict[str, str]:
    """Our name of every column of a table, by its own name; ``meant`` maps ours to theirs (``--columns``).

    Raises:
        UserError: one of the names is not there; two columns would have the same name.
    """
    own = list(columns)
    for ours, theirs in meant.items():
        if ours not in KNOWN:
            raise UserError(f"--columns: '{ours}' is none of {', '.join(KNOWN)}", _near(ours, KNOWN))
        if theirs not in own:
            raise UserError(
                f"{where} has no column '{theirs}' (--columns {ours} {theirs})",
                f"{_near(theirs, own)}Its columns: {', '.join(own)}",
            )
        if ours != theirs and ours in own and ours not in meant.values():
            raise UserError(
                f"{where} has both '{ours}' and '{theirs}', which --columns names '{ours}'",
                "Rename or drop one of the two.",
            )
    ours_of = {theirs: ours for ours, theirs in meant.items()}
    return {name: ours_of.get(name, name) for name in own}


def unused(ours: Mapping[str, str], image: str) -> list[str]:
    """Return a table's own names of columns that are not used; ``image`` is our name of the one with the images."""
    read = {image, *KNOWN} - ({"image", "file_name"} - {image})
    return [name for name, one in ours.items() if one not in read and not is_text(one)]


def refuse_synonyms(where: str, columns: Collection[str]) -> None:
    """Refuses a table that says with another word what would otherwise be passed over."""
    for column, synonyms in _MEANT.items():
        missing = ["text", "label"] if column in ("text", "label") else [column]
        if any(name in missing or ("text" in missing and is_text(name)) for name in columns):
            continue
        for synonym in synonyms:
            if synonym in columns:
                raise UserError(
                    f"{where} has no {' or '.join(missing)}, but '{synonym}'",
                    f"Rename it to '{column}', or add --columns {column} {synonym}.",
                )


def _texts(value: object, where: str) -> list[str]:
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where} is {shown(value)}, not a string or a list of strings", "Write it in quotes."
        )
    for text in texts:
        refuse_no_text(text, where)
    return [text.strip() for text in texts if text.strip()]


def _label(value: object, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        refuse_no_text(value, f"{where}: label")
        return value.strip() or None
    if isinstance(value, int):
        return str(value)
    raise UserError(
        f"{where}: label is {shown(value)}, neither a string nor a whole number", "Write it in quotes."
    )


def _weight(value: object, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(value)}",
            f"Give a number above 0, at most {HEAVIEST:,.0f} (1 is usual); to leave an image out, leave its row out.",
        )
    return weight


def _near(name: str, names: Iterable[str]) -> str:
    guess = nearest(name, names)
    return f"Did you mean '{guess}'? " if guess else ""
