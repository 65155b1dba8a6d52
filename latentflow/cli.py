"""The command line: `latentflow <command>`, and the flags, config files and errors of its programs.

A program is a file in `train/` or `pipelines/` with a `main(argv=None)`. It reads its flags with
:func:`parse` and ends in ``if __name__ == "__main__": run(main)``. Nothing here imports torch, so that
`latentflow --help` answers at once.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from . import __version__
from .errors import UserError, nearest, printable, shown, unknown
from .utils import begin_program
from .utils.files import PROGRAMS_ROOT, read_yaml, replacing
from .utils.flags import Essential, Flag, flag_of, flags_of, help_text, normal, without_annotation
from .utils.names import near_path

C = TypeVar("C")

# ----------------------------------------------------------------------------------------------------
# Flags and config files
# ----------------------------------------------------------------------------------------------------


# Names of diffusers' calls and training scripts: ours.
_IN_DIFFUSERS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "num_images_per_prompt": "n",
    "pretrained_model_name_or_path": "init_from",
    "rank": "lora_rank",
    "output_dir": "output",
}


def parse(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> C:
    """Fill a frozen keyword-only dataclass from flags, a YAML file (``--config``) and a ``--preset``.

    Defaults < preset < config file < flags. Nested dataclasses are sections: their fields become plain flags,
    and a config file may write them flat or under the section's name, with ``-`` or ``_``. The docstring
    below a field is its help. ``Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]`` makes a
    positional, ``Annotated[str, tyro.conf.arg(aliases=["-o"])]`` a short name. ``--help`` prints the flags that are
    marked `Essential` where there are many, ``--help SECTION`` those of a section, ``--help-all`` all of them.

    Args:
        config_class: the dataclass to build.
        argv: the arguments after the program's name; ``sys.argv[1:]`` if None.
        prog: the name shown in the help, e.g. ``"latentflow train"``.
        description: the help's first words; the dataclass' docstring if empty.
        presets: name -> values, keyed as a config file is.

    Raises:
        UserError: a key or value of the config file or the preset is wrong; the file and the nearest key are
            named. A flag has the name that diffusers gives it; ours is named. A dataclass refuses its values.
        SystemExit: a flag is wrong (tyro names the nearest and exits with 2), or the help was asked for.
    """
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    presets = presets or {}
    values: dict[str, Any] = {}
    if (name := _peek(args, "preset")) is not None:
        if name not in presets:
            raise unknown("preset", name, presets) if presets else UserError(f"{prog} has no presets")
        values |= _checked(config_class, presets[name], f"preset '{name}'")
    if (file := _peek(args, "config")) is not None:
        values |= _checked(config_class, _read_yaml(Path(file)), file)
    program, default = _program(config_class, _defaults(config_class, values), list(presets))
    description = inspect.cleandoc(description or config_class.__doc__ or "")
    if wanted := [word for word in args if word in ("-h", "--help", "--help-all")]:
        following = args[args.index(wanted[0]) + 1 :][:1] if wanted[0] == "--help" else []
        print(
            help_text(
                program,
                default,
                prog=prog,
                description=description,
                group=next((word for word in following if not word.startswith("-")), None),
                everything=wanted[0] == "--help-all",
            )
        )
        sys.exit()
    _name_ours(config_class, args)
    read: Callable[..., Any] = partial(
        tyro.cli,
        program,
        args=_words_apart(config_class, args),
        prog=prog,
        description=description,
        default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            parsed = read(console_outputs=False)
    except SystemExit as stop:
        # tyro catches what a dataclass refuses, and would put names of ours in front of it.
        refused = getattr(stop.__context__, "__context__", None)
        if isinstance(refused, UserError):
            raise refused from None
        parsed = read()  # prints what is wrong with the flags, and exits
    settings: C = parsed.settings
    return settings


def _words_apart(config_class: type, args: Sequence[str]) -> list[str]:
    """Return the arguments with no positional behind a flag that takes some of several words, such as ``--control image
    labels``: tyro would read it as one more of them. DATA goes first, lest another flag take it; of several
    positionals, whose order says which is which, none is moved, and the words go last.

    Raises:
        UserError: such a flag has none of its words, where tyro may read it as none; or it is given twice, of which the
            last alone would count.
    """
    leaves, choices = flags_of(config_class), dict[str, tuple[str, ...]]()
    for leaf in leaves:
        for hint in (leaf.hint, *get_args(leaf.hint)):
            if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
                choices |= dict.fromkeys(leaf.names(None), get_args(get_args(hint)[0]))
    alone = sum(leaf.positional for leaf in leaves) == 1
    front: list[str] = []
    rest: list[str] = []
    words: list[str] = []
    given: dict[str, str] = {}
    taken: tuple[str, ...] = ()
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        flag, joined, value = arg.partition("=")
        if flag in choices:
            taken, word = choices[flag], value if joined else following
            if word not in taken:
                said = f"{flag} {word}" if word and not word.startswith("-") else flag
                raise UserError(
                    f"{said}: none of its words follows", f"Give one or more of {', '.join(taken)}."
                )
            if flag in given:
                raise UserError(f"{flag} is given twice", f"Give it once: {flag} {given[flag]} {word}")
            given[flag] = word
        elif arg not in taken:
            if taken and alone and not arg.startswith("-"):
                front, taken = [arg], ()
                continue
            taken = ()
        (words if taken and not alone else rest).append(arg)
    return [*args] if "--" in args else [*front, *rest, *words]


def _name_ours(config_class: type, args: Sequence[str]) -> None:
    """Refuse flags by their names in diffusers' calls and training scripts, where ours have other names."""
    keys = {leaf.key for leaf in flags_of(config_class)}
    for arg in args:
        key = normal(arg.partition("=")[0])
        if arg.startswith("--") and key not in keys and (ours := _IN_DIFFUSERS.get(key)) in keys:
            flag = flag_of(str(ours))
            raise UserError(f"unknown flag {arg.partition('=')[0]}", f"Here it is {flag}.")
        if arg.startswith("--") and key == "lora" and key not in keys:
            raise UserError(
                "--lora is no flag of this command",
                "Merge the adapter first, and give the result: latentflow export CHECKPOINT --lora FILE -o merged",
            )


def given(
    config_class: type, argv: Sequence[str] | None = None, *, flags_only: bool = False
) -> frozenset[str]:
    """Return the keys that flags or the file of ``--config`` set (not a preset): a program must not choose them itself.

    Args:
        config_class: the dataclass that `parse` builds of the same arguments.
        argv: the arguments after the program's name; ``sys.argv[1:]`` if None.
        flags_only: leave out those of the file, which may be a recipe of several programs.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    file = None if flags_only else _peek(args, "config")
    keys = set() if file is None else set(_checked(config_class, _read_yaml(Path(file)), file))
    flags = {normal(arg.partition("=")[0]) for arg in args if arg.startswith("-")}
    flags |= {flag.removeprefix("no_") for flag in flags}
    return frozenset(keys | (flags & {leaf.key for leaf in flags_of(config_class)}))


def write_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write a dataclass as flat YAML that :func:`parse` reads back to an equal dataclass."""
    import yaml

    values = {field.key: _plain(field.of(config)) for field in flags_of(type(config))}
    with replacing(Path(path)) as partial:  # a full disk must not destroy the earlier file
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _peek(args: Sequence[str], flag: str) -> str | None:
    """Return the last value of ``--flag VALUE`` or ``--flag=VALUE``, before the real parser sees ``args``."""
    found = None
    for i, arg in enumerate(args):
        if arg == f"--{flag}" and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"--{flag}="):
            found = arg.partition("=")[2]
    return found


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise UserError(
            f"--config {path} is a folder, not a YAML file with values for flags",
            "The pipeline folder of a checkpoint in one file is given as --checkpoint-config FOLDER.",
        )
    if not path.is_file():
        raise UserError(
            f"config file not found: {path}", f"{near_path(str(path))}Give --config the path of a YAML file."
        )
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(values).__name__}")
    return values


def _checked(config_class: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return field key -> value of its type, for the values of a config file, which may stand in sections.

    Raises:
        UserError: a key is unknown or occurs twice, or a value is not of its field's type.
    """
    leaves = {leaf.key: leaf for leaf in flags_of(config_class)}
    sections = {normal(name) for leaf in leaves.values() for name in leaf.path[:-1]}
    checked: dict[str, Any] = {}

    def visit(items: Mapping[Any, Any], section: str | None) -> None:
        for raw_key, value in items.items():
            key = normal(raw_key)
            if key in sections and isinstance(value, Mapping):
                visit(value, key)
            elif key in leaves and (section is None or section in map(normal, leaves[key].path[:-1])):
                if key in checked:
                    raise UserError(f"{where}: '{raw_key}' is given twice", "Keep one of them.")
                checked[key] = _convert(leaves[key], value, f"{where}: {raw_key}")
            else:
                raise _unknown_key(raw_key, where, section, [*leaves, *sections])

    visit(values, None)
    return checked


def _unknown_key(key: Any, where: str, section: str | None, known: list[str]) -> UserError:
    guess = nearest(normal(key), known)
    place = f"{where}: unknown key '{key}'" + (f" in section '{section}'" if section else "")
    return UserError(place, f"Did you mean '{guess}'?" if guess else f"Known keys: {', '.join(known)}")


def _convert(field: Flag, value: Any, where: str) -> Any:
    """Return a YAML value as the field's type, by the same rules as a flag's text."""
    import tyro

    if isinstance(value, str) and field.hint in (str, str | None):
        return value  # including the text "None", which as a flag means None
    positional: Any = tyro.conf.Positional
    leaf = dataclasses.make_dataclass("Leaf", [("value", positional[field.hint])])
    try:
        # tyro's own message would name a flag that does not exist
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            parsed: Any = tyro.cli(leaf, args=["--", *_tokens(value)], console_outputs=False)
    except SystemExit:
        expected = field.hint.__name__ if isinstance(field.hint, type) else str(field.hint)
        raise UserError(f"{where}: {shown(value)} is not a valid value", f"Expected: {expected}") from None
    return parsed.value


def _tokens(value: Any) -> list[str]:
    """Return a plain value as the words that a user would type after the flag."""
    if isinstance(value, Mapping):
        return [word for pair in value.items() for item in pair for word in _tokens(item)]
    if isinstance(value, list | tuple):
        return [word for item in value for word in _tokens(item)]
    return [str(value)]


def _plain(value: Any) -> Any:
    """Return a field's value in YAML's own types."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


def _defaults(
    config_class: type[C], values: Mapping[str, Any], path: tuple[str, ...] = (), outer: Any = None
) -> C:
    """Return an instance with the defaults, and ``values`` over them; a field without a default is marked missing.

    It is filled without ``__init__``, since a ``__post_init__`` that validates must see only the final values.

    Args:
        path: fields that lead to it, where it is a section.
        outer: the section as the outer class has it by default, whose values come before those of ``config_class``.
    """
    import tyro

    keys = {leaf.path: leaf.key for leaf in flags_of(config_class, path)}
    hints = get_type_hints(config_class, include_extras=True)
    instance = object.__new__(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        bare, _ = without_annotation(hints[field.name])
        here = (*path, field.name)
        default: Any = tyro.MISSING
        if outer is not None:
            default = getattr(outer, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(bare) and isinstance(bare, type):
            default = _defaults(bare, values, here, None if default is tyro.MISSING else default)
        elif keys.get(here) in values:
            default = values[keys[here]]
        object.__setattr__(instance, field.name, default)
    return instance


def _program(config_class: type, settings: Any, presets: list[str]) -> tuple[type, Any]:
    """Return one dataclass for tyro, of the config and the flags that every program has, and its defaults."""
    from tyro.conf import FlagCreatePairsOff, arg

    config_help = "YAML file with values for flags; flags win over it."
    preset_help = "Named set of values; --config and flags win over it."
    debug_help = "Show the whole traceback of an error."
    fields: list[Any] = [
        ("settings", Annotated[config_class, arg(name="")]),
        ("config", Annotated[str | None, arg(help=config_help, metavar="FILE"), Essential()], None),
        ("debug", Annotated[FlagCreatePairsOff[bool], arg(help=debug_help)], False),
    ]
    if presets:
        choice: Any = Literal[tuple(presets)]
        fields.insert(2, ("preset", Annotated[choice | None, arg(help=preset_help), Essential()], None))
    program = dataclasses.make_dataclass("Program", fields, kw_only=True, frozen=True)
    return program, program(settings=settings)


# ----------------------------------------------------------------------------------------------------
# Running a program
# ----------------------------------------------------------------------------------------------------


# Loggers of libraries that warn where torchao is installed and nobody uses it.
_IMPORTED_WITH_WARNINGS = ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and turn errors that users can mend into a few lines on stderr and an exit status.

    A ``UserError`` or a file that cannot be read or written exits with 2, a ``RunError`` with 1, Ctrl-C with 130.
    Any other exception is a defect and keeps its traceback; under ``--debug`` all do.
    """
    debug = "--debug" in sys.argv
    begin_program()
    for name in _IMPORTED_WITH_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main()
    except BrokenPipeError:  # the reader of our output is gone (`latentflow --help | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Interrupted.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"Error: {_message(error)}", file=sys.stderr)
        sys.exit(error.status if isinstance(error, UserError) else 2)


def _message(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.strerror}: {error.filename}")
    return printable(str(error))


# ----------------------------------------------------------------------------------------------------
# latentflow <command>
# ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the program that the first argument names with the other arguments: the `latentflow` command."""
    run(_dispatch)


def _dispatch() -> None:
    args = sys.argv[1:]
    while args and args[0] == "--debug":
        args = args[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(programs()))
    elif args[0] in ("-V", "--version"):
        print(f"latentflow {__version__}")
    else:
        found = programs()
        if args[0] not in found:
            raise unknown("command", args[0], found)
        program, rest = str(found[args[0]]), sys.argv[1:]
        rest.remove(args[0])
        sys.argv = [program, *rest]
        runpy.run_path(program, run_name="__main__")


def programs() -> dict[str, Path]:
    """Return command -> program file. `train/flow.py` is the command `train`; the others are named like their file."""
    found: dict[str, Path] = {}
    root = _programs_root()
    for folder in ("train", "pipelines"):
        for file in sorted((root / folder).glob("*.py")):
            if file.stem.startswith("_"):
                continue
            command = "train" if (folder, file.stem) == ("train", "flow") else file.stem.replace("_", "-")
            found[command] = file
    order = ["train", *(command for command in found if command != "train")]
    return {command: found[command] for command in order if command in found}


def _programs_root() -> Path:
    """Return the folder that holds the programs' folders.

    Raises:
        UserError: there are none.
    """
    if not any((PROGRAMS_ROOT / folder).is_dir() for folder in ("train", "pipelines")):
        raise UserError(
            f"no programs found in {PROGRAMS_ROOT}", "Install latentflow again, from its repository."
        )
    return PROGRAMS_ROOT


def _overview(found: Mapping[str, Path]) -> str:
    width = max(map(len, found), default=0)
    lines = [f"  {command:<{width}}  {_summary(file)}" for command, file in found.items()]
    return "\n".join(
        [
            "usage: latentflow <command> [arguments]",
            "",
            "Latent flow matching: from a folder of images to a generator.",
            "",
            "commands:",
            *lines,
            "",
            "`latentflow <command> --help` lists a command's flags; `latentflow --version` the version.",
        ]
    )


def _summary(file: Path) -> str:
    """Return the first line of a program's docstring, read without running it."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
