"""Errors that tell a user what is wrong, where, and how to fix it; and checks of values that raise them.

Imports nothing of ours.
"""

from __future__ import annotations

import difflib
import inspect
import math
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
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


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images", "0 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number} {noun}{ending}"


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


def with_article(name: object) -> str:
    """Return the name of a class, or another, behind its article: a FluxPipeline, an AuraFlowPipeline, a UNet."""
    return f"{'an' if str(name)[:1] in 'AEIO' else 'a'} {name}"


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that ``name`` was probably meant to be, or None when none is as alike as ``cutoff`` (difflib's
    ratio, from 0 to 1)."""
    matches = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(guess: object | None) -> str:
    """Return a question for the user that names what was probably meant, and a space; "" without a guess."""
    return f"Did you mean '{guess}'? " if guess else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a ``name`` that is none of ``choices``, with the nearest one named."""
    names = list(choices)
    guess = nearest(name, names)
    hint = f"did you mean '{guess}'? " if guess else ""
    return UserError(f"unknown {kind} '{name}'", f"{hint}Choices: {few(names, 40)}")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``.

    Raises:
        UserError: ``name`` is not in the table; the nearest name is suggested.
    """
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def whole(name: str, value: Any, least: int, most: int | None = None, *, fix: str = "") -> int:
    """Return ``value`` as an int if it is a whole number (numpy's are) from ``least`` to ``most``.

    Args:
        name: what a user calls it.
        fix: advice in the error, in place of the range.

    Raises:
        UserError: it is another number, or no whole number: True, 2.0 and "2" are none.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if is_whole and least <= value and (most is None or value <= most):
        return int(value)
    span = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise UserError(f"{name} is {shown(value)}", fix or f"Give a whole number {span}.")


def check_resolution(resolution: int, multiple: int, needing: str = "the autoencoder needs") -> None:
    """Refuse a resolution that is not a multiple of what its models need.

    Raises:
        UserError: it is none; the nearest one is named.
    """
    if resolution % multiple:
        fitting = max(1, round(resolution / multiple)) * multiple
        raise UserError(
            f"--resolution {resolution} is not a multiple of {multiple}, as {needing}",
            f"Use --resolution {fitting}.",
        )


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number (numpy's are) that a float can hold, and no truth value."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        return False


def finite(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, fix: str = ""
) -> float:
    """Return ``value`` as a float if it is a finite number from ``least`` to ``most``.

    Args:
        name: what a user calls it.
        fix: advice in the error, in place of the range.

    Raises:
        UserError: it is NaN, infinite, out of range, or no number: True and "2" are none.
    """
    if is_number(value) and least <= value <= most:
        return float(value)
    span = "."
    if math.isfinite(least):
        span = f" from {least:g} to {most:g}." if math.isfinite(most) else f" of at least {least:g}."
    raise UserError(f"{name} is {shown(value)}", fix or f"Give a finite number{span}")


def make(table: Mapping[str, Callable[..., T]], name: str, kind: str, /, **options: Any) -> T:
    """Return ``table[name](**options)``; every mistake in the name or the options is named in an error.

    Args:
        table: name -> class or function; its signature says which options there are.
        name: the entry.
        kind: what the table holds, for messages: "path", "coupling", ...
        options: as written in a configuration. Where the default is a number, so is the option: text that is
            one is read as one (YAML reads 1e-4 as text).

    Raises:
        UserError: unknown name or option (the nearest is suggested); an option without a default is missing;
            or not a number where the default is one.
    """
    entry = lookup(table, name, kind)
    known = inspect.signature(entry).parameters
    what = f"of {kind} '{name}'"
    for option in options:
        if not known:
            raise UserError(f"option '{option}' {what}", "It has no options: leave it out.")
        if option not in known:
            raise unknown(f"option {what}:", option, known)
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"missing option {what}: {', '.join(missing)}", "It has no default: give a value.")
    return entry(
        **{
            option: _as_default(value, known[option], f"option '{option}' {what}")
            for option, value in options.items()
        }
    )


def _as_default(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    """Return ``value`` as a number if the default of ``parameter`` is one, as an integer if it is declared so."""
    if type(parameter.default) not in (int, float):
        return value
    whole = parameter.annotation in (int, "int")
    try:
        number = float(value if type(value) in (int, float, str) else "")
        return int(str(value).removesuffix(".0")) if whole else number
    except ValueError:
        raise UserError(f"{what} is {value!r}", f"Use a {'whole ' if whole else ''}number.") from None
