"""Names as people write them and as they are on disk: the Unicode spellings of one name, and the file that was meant.

A letter with an accent has two spellings in Unicode: one character (NFC, as nearly all programs write it), or the
letter and the accent (NFD, as macOS writes names of files, also in archives). They look alike; here they are the same
name.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from ..errors import did_you_mean, nearest

_MOST = 20_000  # names that are looked through for one with nearly the same letters, and entries of folders

#: Entries of folders, by their names in NFC.
Listings: TypeAlias = dict[Path, dict[str, str]]


def composed(name: str) -> str:
    """Return the name in NFC: equal for all spellings of one name."""
    return unicodedata.normalize("NFC", name)


def as_spelled(name: str, choices: Collection[str]) -> str:
    """Return the one of ``choices`` that is the same name; ``name`` itself where none is."""
    if name in choices:
        return name
    return next((choice for choice in choices if composed(choice) == composed(name)), name)


def find_path(path: Path, listings: Listings | None = None) -> Path:
    """Return the file or folder of this name, as each part of it is spelled on disk; ``path`` itself where none exists.

    Args:
        listings: remembers folders that were listed, where many paths are looked for.
    """
    listings = {} if listings is None else listings
    if os.path.lexists(path) or str(path).isascii():
        return path
    folder = find_path(path.parent, listings)
    if folder not in listings:
        listings[folder] = {composed(entry.name): entry.name for entry in _entries(folder)}
    return folder / listings[folder].get(composed(path.name), path.name)


def near_name(name: str, there: Iterable[str]) -> str | None:
    """Return the file among those that are ``there`` that was probably meant by ``name``; None where none is like it.

    First one that differs in case, in white space around its parts, in ``\\`` for ``/`` or in a ``/`` before them; then
    one with another ending, in another folder, or both; then one with nearly the same letters and the same numbers
    (2.png is not 1.png misspelt).
    """
    plain, wanted = {other: _plain(other) for other in there}, _plain(name)
    for part in (str, _without_ending, _base, lambda path: _without_ending(_base(path))):
        aim = part(wanted)
        if same := [other for other, path in plain.items() if part(path) == aim]:
            return nearest(name, same, cutoff=0.0)
    numbers = _numbers(name)
    return nearest(name, islice((other for other in plain if _numbers(other) == numbers), _MOST))


def near_path(name: str, folder: Path = Path()) -> str:
    """Return a question for the user that names the existing file or folder that ``name`` was probably meant to be; ""
    where none is like it.

    It is looked for in the folder that the name leads to, then in ``folder``, and in the subfolders of both.

    Args:
        folder: the start of relative names, which the answer is relative to as well.
    """
    missing = folder / name
    places = dict.fromkeys((next((parent for parent in missing.parents if parent.is_dir()), folder), folder))
    for place in places:
        within = str(missing.relative_to(place)) if missing.is_relative_to(place) else name
        if near := near_name(within, islice(_below(place), _MOST)):
            found = place / near
            return did_you_mean(found.relative_to(folder) if found.is_relative_to(folder) else found)
    return ""


def _below(folder: Path) -> Iterator[str]:
    """Yield the names of what is in a folder, and of what is in its subfolders; of the root of a disk these alone."""
    subfolders, is_root = [], folder.absolute() == folder.absolute().parent
    for entry in _entries(folder):
        yield entry.name
        with suppress(OSError):
            if entry.is_dir() and not entry.name.startswith(".") and not is_root:
                subfolders.append(entry.name)
    for subfolder in subfolders:
        yield from (f"{subfolder}/{entry.name}" for entry in _entries(folder / subfolder))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError):
        return []


def _plain(name: str) -> str:
    """Return a path in NFC and lower case, with ``/``, without white space and empty parts around its parts."""
    parts = (part.strip() for part in composed(name).replace("\\", "/").casefold().split("/"))
    return "/".join(part for part in parts if part not in ("", "."))


def _without_ending(path: str) -> str:
    return os.path.splitext(path)[0].rstrip()  # noqa: PTH122 (a `Path` for each of many files takes long)


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _numbers(name: str) -> list[str]:
    return [number.lstrip("0") for number in re.findall(r"[0-9]+", name)]
