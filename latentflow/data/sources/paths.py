"""File names as users write many of them: one path, ``shards-{000..009}.tar``, ``shards/*.tar``."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ...errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def many_paths(data: str) -> list[Path]:
    """The files that ``data`` names: braces as in a shell (a range keeps its zeros), then wildcards, in order.

    Raises:
        UserError: one of the files is not there; the braces make no sense.
    """
    found: list[Path] = []
    for one in _expanded(str(Path(data).expanduser())):
        if Path(one).exists() or not glob.has_magic(one):
            found.append(Path(one))
        else:
            found += sorted(Path(name) for name in glob.glob(one))  # noqa: PTH207 (from any folder)
    absent = [str(path) for path in found if not path.is_file()]
    if absent or not found:
        what = f"{len(absent)} of the {len(found)} files of {data} are not there: {', '.join(absent[:5])}"
        raise UserError(what if absent else f"no file is named like {data}", "Check the path.")
    return list(dict.fromkeys(found))


def common_folder(paths: list[Path]) -> Path:
    """The deepest folder that holds all these files."""
    return Path(os.path.commonpath([path.parent.absolute() for path in paths]))


def _expanded(text: str) -> list[str]:
    """All words that the first braces stand for, each expanded in turn."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise UserError(f"{text}: {{{match[1]}}} counts down", "Write the smaller number first.")
        words = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    elif "," in match[1]:
        words = match[1].split(",")
    else:
        raise UserError(
            f"{text}: {{{match[1]}}} is no range", "Write {000..009} or {a,b}; quote it in the shell."
        )
    before, after = text[: match.start()], text[match.end() :]
    return [word for middle in words for word in _expanded(before + middle + after)]
