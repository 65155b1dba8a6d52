"""Errors that tell a user what is wrong, where, and how to fix it. Imports nothing of ours."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
LENGTH = 3000  # characters of an error's text, at most: a screen


class UserError(ValueError):
    """A mistake that the user can mend: ``what`` is wrong (with the value and the place), and the ``fix``.

    Programs print it without a traceback and exit with ``status``. Its text is `printable`: names of files and
    words of captions in it cannot steer a terminal. Of more than ``LENGTH`` characters the middle is left out.
    """

    status = 2

    def __init__(self, what: str, fix: str = "") -> None:
        what, fix = _shortened(printable(what)), _shortened(printable(fix))
        super().__init__(f"{what}\n{fix}" if fix else what)
        self.what = what
        self.fix = fix


class RunError(UserError):
    """A failure of a run that no setting caused: a full disk, too little memory, a worker that died."""

    status = 1


def printable(text: str) -> str:
    """Return ``text`` with control and format characters and lone surrogates written as escapes.

    Line ends, tabs and the joiners inside emoji and words stay. What others wrote (names of files, captions, messages
    of libraries) passes through here before it reaches a terminal or a file.
    """
    return "".join(
        character if _is_printable(character) else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    """Return ``text`` as `printable` does, line ends and tabs written as escapes too: a name in a list, a log line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class _Short(reprlib.Repr):
    """Short texts of values; of tensors and arrays, whatever holds them, the shape."""

    def repr_instance(self, x: Any, level: int) -> str:
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and shape:
            return f"a {type(x).__name__} of shape {tuple(shape)}"
        return super().repr_instance(x, level)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return ``repr(value)`` on one line, cut to 80 characters or a few entries however large or deep it is."""
    try:
        return one_line(_SHORT.repr(value))
    except ValueError:  # a whole number of more digits than Python writes
        return f"a very large {type(value).__name__}"


def few(names: Iterable[object], limit: int = 5) -> str:
    """Return the first few names, each on one line whatever it holds, and how many more there are."""
    listed = [one_line(str(name)) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _is_printable(character: str) -> bool:
    return character in "\n\t\u200c\u200d" or unicodedata.category(character) not in (
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 500]} [...] {text[-490:]}"


def reason(error: BaseException) -> str:
    """Return what an exception says: its first line that is not empty (and the next, where that ends with a colon), at
    most 300 characters; else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")


@contextmanager
def reading(file: object, *failures: type[BaseException], fix: str = "") -> Iterator[None]:
    """Turn failures of the library that reads ``file`` into a `UserError` that names the file and the reason.

    Only the library's call belongs inside, and only exceptions that it is known to raise belong in ``failures``: an
    exception of code of ours is a defect, and keeps its traceback.

    Args:
        file: what is read, as a user would call it.
        fix: what the user can do.

    Raises:
        UserError: in the place of any of ``failures``; a `UserError` passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except failures as error:
        raise UserError(f"{file} cannot be read: {reason(error)}", fix) from error


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice that ``name`` was probably meant to be, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a ``name`` that is none of ``choices``, with the nearest one named."""
    names = list(choices)
    guess = nearest(name, names)
    hint = f"did you mean '{guess}'? " if guess else ""
    return UserError(f"unknown {kind} '{name}'", f"{hint}Choices: {', '.join(map(str, names))}")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``.

    Raises:
        UserError: ``name`` is not in the table; the nearest name is suggested.
    """
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
