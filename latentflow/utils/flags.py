"""The flags of a settings dataclass: its fields with sections flattened, and the help that lists them.

Imports errors only.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..errors import UserError, lookup, reason

_FEW = 45  # flags: the short help of a command with so few shows all
_MARGIN = 26  # columns in front of a flag's help
_WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "{True,False}"}


def flag_of(name: str) -> str:
    """Return the flag of a setting: "--train-batch-size" of "train_batch_size"."""
    return f"--{name.replace('_', '-')}"


class Essential(NamedTuple):
    """Mark a flag that the short help shows, under a heading: ``Annotated[int, Essential("data")] = 64``."""

    heading: str = ""


class Section(NamedTuple):
    """A field that is a dataclass itself: its name, and the first paragraph of its docstring on one line."""

    name: str = ""
    help: str = ""


_NO_SECTION = Section()


@dataclasses.dataclass(frozen=True)
class Flag:
    """One leaf of a settings dataclass.

    Attributes:
        key: name in a config file; the flag without dashes.
        path: names of the fields that lead to it through the sections.
        hint: type, without ``Annotated``.
        extras: what ``Annotated`` adds to the type.
        help: the docstring below the field, on one line.
        section: the section that it belongs to; without a name for the outer dataclass.
    """

    key: str
    path: tuple[str, ...]
    hint: Any
    extras: tuple[Any, ...]
    help: str
    section: Section

    def of(self, config: Any) -> Any:
        """Return the flag's value in an instance of the dataclass."""
        for name in self.path:
            config = getattr(config, name)
        return config

    def extra(self, name: str) -> Any:
        """Return the attribute of that name of the first extra that has one and sets it, or None."""
        return next((value for extra in self.extras if (value := getattr(extra, name, None))), None)

    @property
    def positional(self) -> bool:
        """Return whether the value is given without the flag's name."""
        from tyro.conf import Positional

        return Positional in self.extras

    def names(self, default: Any) -> list[str]:
        """Return the spellings of the flag, the short one first; of a positional none."""
        if self.positional:
            return []
        long = f"--{'no-' if self.hint is bool and default is True else ''}{self.key.replace('_', '-')}"
        return [*(self.extra("aliases") or ()), long]

    @property
    def value(self) -> str:
        """Words for the flag's value in a help text, such as ``INT``; empty for a switch."""
        given = self.extra("metavar") or (self.key.upper() if self.positional else None)
        return given or ("" if self.hint is bool else _words(self.hint))


def flags_of(config_class: type, path: tuple[str, ...] = (), section: Section = _NO_SECTION) -> list[Flag]:
    """Return the flags of a dataclass in order, those of its sections (fields that are dataclasses) in their place."""
    hints = get_type_hints(config_class, include_extras=True)
    texts = _texts_below_fields(config_class)
    flags: list[Flag] = []
    for field in dataclasses.fields(config_class):
        bare, extras = without_annotation(hints[field.name])
        here = (*path, field.name)
        if dataclasses.is_dataclass(bare) and isinstance(bare, type):
            inner = Section(field.name.replace("_", "-"), _first_paragraph(bare))
            if any(
                getattr(extra, "name", None) == "" for extra in extras
            ):  # its flags count as the outer class's
                inner = section
            flags += flags_of(bare, here, inner)
        elif field.init:
            flag = Flag(field.name, here, bare, extras, texts.get(field.name, ""), section)
            key, text = flag.extra("name") or field.name, flag.extra("help") or flag.help
            flags.append(dataclasses.replace(flag, key=normal(key), help=text))
    return flags


def without_annotation(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type hint without its ``Annotated`` wrapping, and what was in the wrapping."""
    if get_origin(hint) is Annotated:
        bare, *extras = get_args(hint)
        return bare, tuple(extras)
    return hint, ()


def normal(key: Any) -> str:
    """Return the name of a key or flag with underscores, and without dashes around it."""
    return str(key).strip("-").replace("-", "_").strip("_")


def help_text(
    config_class: type,
    defaults: Any,
    *,
    prog: str,
    description: str,
    group: str | None = None,
    everything: bool = False,
) -> str:
    """Return the help of a command.

    Args:
        config_class: the dataclass with its settings.
        defaults: an instance of it; a value that `tyro.MISSING` stands for is required.
        prog: the command.
        description: what it does.
        group: show the flags of this section only.
        everything: show all flags, and not only the essential ones where there are many.

    Raises:
        UserError: there is no such section.
    """
    from tyro import MISSING

    flags = flags_of(config_class)
    main = [flag for flag in flags if flag.positional or flag.of(defaults) is MISSING]
    sections = {flag.section.name: flag.section for flag in flags if flag.section.name}
    short = group is None and not everything and len(flags) > _FEW
    shown: dict[str, list[Flag]] = {"": list(main)}
    for flag in flags:
        essential = [extra for extra in flag.extras if isinstance(extra, Essential)]
        heading = essential[0].heading if short and essential else flag.section.name
        if flag not in main and (essential or not short):
            shown.setdefault(heading, []).append(flag)
    if group is not None and sections:
        shown = {group: shown.get(lookup(sections, group, "group of flags").name, [])}

    usage = []
    for flag in main:
        text = " ".join([*flag.names(MISSING)[:1], flag.value])
        usage.append(text if flag.of(defaults) is MISSING else f"[{text}]")
    lines = [" ".join(["usage:", prog, *usage, "[flags]"]), ""]
    width = min(100, shutil.get_terminal_size().columns)
    lines += "\n\n".join(_wrapped(block, width) for block in description.split("\n\n")).splitlines()
    for name, members in shown.items():
        about = "" if short or not name else sections[name].help
        if members:
            lines += ["", *textwrap.wrap(f"{name}: {about}", width)] if name else [""]
        for flag in members:
            lines += _entry(flag, flag.of(defaults), width)
    more = "--no-FLAG switches off a flag without a value that --config or --preset switches on."
    if sum(map(len, shown.values())) < len(flags):
        names = ", ".join(sections)
        more = f"More flags: `{prog} --help-all`, or `{prog} --help GROUP` with one of: {names}. {more}"
    lines += ["", *textwrap.wrap(more, width, break_on_hyphens=False)]
    return "\n".join(lines)


def _entry(flag: Flag, default: Any, width: int) -> list[str]:
    """Return the lines of one flag: its names and value on the left, its help and default on the right."""
    from tyro import MISSING

    left = "  " + f"{', '.join(flag.names(default))} {flag.value}".strip()
    text = (
        "" if default is MISSING or default is None or isinstance(default, bool) else _plain(default).strip()
    )
    right = textwrap.wrap(flag.help + (f" (default: {text})" if text else ""), width - _MARGIN)
    lines = [f"{'':{_MARGIN}}{line}" for line in right] or [""]
    if len(left) > _MARGIN - 2:
        return [left, *lines]
    return [(left.ljust(_MARGIN) + lines[0][_MARGIN:]).rstrip(), *lines[1:]]


def _wrapped(block: str, width: int) -> str:
    """Return a paragraph in lines of the width; lines that show commands stay as they are."""
    shows_commands = any(line.startswith((" ", "latentflow ")) for line in block.splitlines())
    return block if shows_commands else textwrap.fill(block, width)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [word for pair in value.items() for word in pair]
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _words(hint: Any) -> str:
    """Return words for the values of a type: ``INT``, ``{a,b}``, ``TEXT ...``."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if NoneType in inner:
        return " ".join(_words(kind) for kind in inner if kind is not NoneType)
    if get_origin(hint) is dict:
        return f"NAME {_words(inner[1])} ..."
    if get_origin(hint) is tuple:
        return " ".join("..." if kind is Ellipsis else _words(kind) for kind in inner)
    return _WORDS.get(hint, "VALUE")


def _first_paragraph(config_class: type) -> str:
    text = inspect.cleandoc(config_class.__doc__ or "").partition("\n\n")[0]
    is_written = not text.startswith(f"{config_class.__name__}(")  # else it is `dataclass`'s own
    return " ".join(text.split()) if is_written else ""


@cache
def _texts_below_fields(config_class: type) -> dict[str, str]:
    """Return the docstring below each field of a class and its bases, read from their source."""
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # it was not written in a file
            continue
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Return ``--family-options`` as values by name: numbers, lists, true, false and null as in YAML.

    Raises:
        UserError: one is not of the form NAME=VALUE.
    """
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--family-options {text}", "Give NAME=VALUE, such as max_sequence_length=256.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--family-options {text}: {reason(error)}") from error
    return found
