"""Building an entry of a table (``PATHS``, ``COUPLINGS``, ...) from its name and the options that a user wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import UserError, lookup, unknown

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
