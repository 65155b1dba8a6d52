"""Errors that tell a user what is wrong, where, and how to fix it. Imports nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend: ``what`` is wrong (with the value and the place), and the ``fix``.

    Programs print it without a traceback and exit with ``status``.
    """

    status = 2

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}\n{fix}" if fix else what)
        self.what = what
        self.fix = fix


class RunError(UserError):
    """What stopped a run and was no mistake in its settings: a full disk, too little memory, a worker that died."""

    status = 1


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that ``name`` was probably meant to be, or None when nothing is close."""
    matches = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a ``name`` that is none of ``choices``, with the nearest one named."""
    names = list(choices)
    guess = nearest(name, names)
    hint = f"did you mean '{guess}'? " if guess else ""
    return UserError(f"unknown {kind} '{name}'", f"{hint}Choices: {', '.join(map(str, names))}")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``.

    Raises:
        UserError: ``name`` is not in the table; the nearest name is suggested.
    """
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
