"""Checks of numbers from callers and flags, of the options of a table's entries, and of a checkpoint's JSON files."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import UserError, lookup, nearest, shown, unknown
from .files import read_json

MEND = "Restore the file from where it came from, or train the checkpoint again."
CONFIG = "config.json"
#: largest accepted value of sizes that the file of weights does not bound, or too late
LARGEST = {
    "condition_channels": 2**16,
    "mlp_ratio": 2**10,
    "num_classes": 2**20,
    "num_train_timesteps": 2**20,
    "registers": 2**16,
    "sample_size": 2**12,
}


def read_settings(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON, nested too deeply, or holds something else.
    """
    document = read_json(file, MEND)
    if not isinstance(document, dict):
        raise UserError(f"{file} holds {shown(document)}, no settings", MEND)
    return document


def check_settings(file: object, settings: Mapping[str, Any], kind: Any) -> None:
    """Refuse settings that the constructor of ``kind`` does not take, or that have another type than it declares.

    Raises:
        UserError: names the file, the setting and its value.
    """
    hints = {name: hint for name, hint in get_type_hints(kind.__init__).items() if name != "return"}
    named = {name: value for name, value in settings.items() if not name.startswith("_")}
    for name in named:
        if name not in hints:
            guess = nearest(name, hints)
            raise UserError(
                f"{file}: {kind.__name__} has no setting '{name}'",
                f"Did you mean '{guess}'? {MEND}" if guess else MEND,
            )
    check_types(file, named, hints)


def check_types(file: object, settings: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse values of another type than ``hints`` has, numbers that are not finite, and sizes beyond `LARGEST`.

    Raises:
        UserError: names the file, the setting and its value.
    """
    for name, value in settings.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            raise UserError(f"{file}: {name} is {shown(value)}", f"Expected: {_words(hint)}. {MEND}")
        sizes = value if isinstance(value, list | tuple) else [value]
        if name in LARGEST and any(
            type(size) in (int, float) and not 0 <= size <= LARGEST[name] for size in sizes
        ):
            raise UserError(f"{file}: {name} is {shown(value)}", f"At most {LARGEST[name]} is read. {MEND}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return is_number(value)
    if hint in (bool, int, str):
        return type(value) is hint
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if isinstance(origin, type) and issubclass(origin, Collection):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    return True  # a component, or anything


def _words(hint: Any) -> str:
    return hint.__name__ if type(hint) is type else str(hint).replace("collections.abc.", "")


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


T = TypeVar("T")


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
            option: _read(value, known[option], f"option '{option}' {what}")
            for option, value in options.items()
        }
    )


def _read(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    """Return ``value`` as a number if the default of ``parameter`` is one, as an integer if it is declared so."""
    if type(parameter.default) not in (int, float):
        return value
    whole = parameter.annotation in (int, "int")
    try:
        number = float(value if type(value) in (int, float, str) else "")
        return int(str(value).removesuffix(".0")) if whole else number
    except ValueError:
        raise UserError(f"{what} is {value!r}", f"Use a {'whole ' if whole else ''}number.") from None
