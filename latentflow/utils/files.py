"""Files: text, JSON and YAML of strangers are read here, with a `UserError` that names the file for what is wrong in
them; and files are written whole or not at all.

Imports errors and names only. Settings of a checkpoint are checked against the types that its classes declare.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
import types
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from ..errors import UserError, did_you_mean, few, is_number, nearest, reading, shown
from .names import find_path, near_path

if TYPE_CHECKING:
    from torch import Tensor
    from yaml import Node


os.umask(_UMASK := os.umask(0o022))  # the only way to read it is to set it

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "programs"
#: Programs and checkpoints are in ``latentflow/programs/`` in an installed wheel, beside ``latentflow/`` in a clone.
PROGRAMS_ROOT = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent
SHIPPED_CHECKPOINTS = PROGRAMS_ROOT / "checkpoints"

DEPTH = 64  # most levels of values inside values
VALUES = 1_000_000  # most values of a document; those that YAML's aliases repeat are counted each time
# PyYAML's exceptions besides its own: its constructors of numbers, dates and the like pass on what they meet.
_YAML = (ValueError, RecursionError, AttributeError, LookupError, TypeError)


def decode(raw: bytes, where: str) -> str:
    """Return the UTF-8 text in ``raw``, without a byte order mark, line ends as they are.

    Raises:
        UserError: it is not UTF-8, or holds NUL characters as UTF-16 read so does; ``where`` names it.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        why = "it begins as UTF-16 does" if is_utf16 else str(error)
        raise UserError(f"{where} is not UTF-8 text: {why}", "Save it as UTF-8.") from None
    refuse_no_text(text, where)
    return text


def read_prompts(file: str, flag: str) -> list[str]:
    """Return the lines of a text file that are not empty; ``flag`` names it in errors.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    with reading(f"{flag} {file}", OSError, fix="Give a text file with one caption per line."):
        raw = Path(file).expanduser().read_bytes()
    lines = [line.strip() for line in decode(raw, f"{flag} {file}").splitlines()]
    if not any(lines):
        raise UserError(f"{flag} {file} holds no caption", "Write one per line.")
    return [line for line in lines if line]


def refuse_no_text(text: str, where: str) -> None:
    r"""Refuse a string that holds half a character (a lone surrogate, ``\ud83c``) or a NUL: nothing can store it.

    Raises:
        UserError: it does; ``where`` names it.
    """
    if "\0" in text:
        raise UserError(
            f"{where} holds NUL characters", "It may be UTF-16 or no text at all: save it as UTF-8."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where} holds {half}, half of a character", "Write the whole character.") from None


def storable(text: str) -> str:
    """Return ``text`` with lone surrogates, as names of files hold that are not UTF-8, written as escapes."""
    return text.encode(errors="backslashreplace").decode()


def parse_json(text: str, where: str, fix: str = "") -> Any:
    """Return the value of the JSON in ``text``. ``NaN`` and ``Infinity`` are numbers, as Python writes them.

    Args:
        where: name of the document in messages: the file, with the line where it holds several documents.
        fix: advice for the user.

    Raises:
        UserError: it is not JSON; a key is there twice; it is nested more than ``DEPTH`` deep or holds more than
            ``VALUES`` values.
    """
    try:
        # For numbers that are too long Python raises a ValueError as well.
        value = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, "JSON", error, fix) from None
    _refuse_excess(value, where, fix)
    return value


def parse_yaml(text: str, where: str, fix: str = "") -> Any:
    """Return the value of the YAML in ``text``: plain values, no objects.

    Args, Raises: as for ``parse_json``.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, *_YAML) as error:
        raise _invalid(where, "valid YAML", error, fix) from None
    if node is None:
        return None
    if twice := _repeated_key(node):
        raise UserError(f"{where}: '{twice}' is there twice: keep one of them", fix)
    try:
        value = loader.construct_document(node)
    except (yaml.YAMLError, *_YAML) as error:
        raise _invalid(where, "valid YAML", error, fix) from None
    _refuse_excess(value, where, fix)
    return value


def read_json(file: Path, fix: str = "") -> Any:
    """Return the value of a JSON file; see ``parse_json``.

    Raises:
        UserError: also where the file cannot be read.
    """
    return parse_json(_read(file, fix), str(file), fix)


def read_yaml(file: Path, fix: str = "") -> Any:
    """Return the value of a YAML file; see ``parse_yaml``.

    Raises:
        UserError: also where the file cannot be read.
    """
    return parse_yaml(_read(file, fix), str(file), fix)


def _read(file: Path, fix: str) -> str:
    with reading(file, OSError, fix=fix):
        raw = file.read_bytes()
    return decode(raw, str(file))


class _TwiceError(ValueError):
    """A key occurs twice in an object."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _TwiceError(f"'{twice}' is there twice: keep one of them")
    return found


def _repeated_key(root: Node) -> str | None:
    """Return a key that a mapping of a YAML document holds twice; what merge keys (<<) bring does not count."""
    import yaml

    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        inside = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = Counter((key.tag, key.value) for key, _ in inside if isinstance(key, yaml.ScalarNode))
            for (tag, key), count in keys.items():
                if count > 1 and tag != "tag:yaml.org,2002:merge":
                    return str(key)
            inside = [child for pair in inside for child in pair]
        waiting += [child for child in inside if id(child) not in seen]
        seen |= {id(child) for child in inside}
    return None


def _refuse_excess(value: Any, where: str, fix: str) -> None:
    """Refuse a document that is too deep or too large to be walked through and printed."""
    level, depth, count = [value], 0, 1
    while level:
        if depth > DEPTH:
            raise UserError(f"{where} is nested more than {DEPTH} deep", fix)
        inside: list[Any] = []
        for item in level:
            held = (
                item.values() if isinstance(item, Mapping) else item if isinstance(item, list | set) else ()
            )
            count += len(held)
            if count > VALUES:
                raise UserError(f"{where} holds more than {VALUES:,} values", fix)
            inside += held
        level, depth = inside, depth + 1


def _invalid(where: str, kind: str, error: BaseException, fix: str) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{where} is nested too deep", fix)
    # PyYAML's messages take several lines: the problem, then its place.
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
    if "integer string conversion" in message:  # Python's own limit
        message = f"it holds a number of more than {sys.get_int_max_str_digits():,} digits"
    if isinstance(error, _TwiceError):
        return UserError(f"{where}: {message}", fix)
    return UserError(f"{where} is not {kind}: {message or type(error).__name__}", fix)


MEND = "Restore the file from where it came from, or train the checkpoint again."
#: the same for checkpoints that others have trained
FETCH_AGAIN = "Copy or download the checkpoint again."
CONFIG = "config.json"
#: largest accepted value of sizes that the file of weights does not bound, or too late
LARGEST = {
    "condition_channels": 2**16,
    "latent_variable_dim": 2**12,
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
            raise UserError(
                f"{file}: {kind.__name__} has no setting '{name}'",
                f"{did_you_mean(nearest(name, hints))}{MEND}",
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


def pipeline_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Return the pipeline folder of this path, or None for a hub id. Nothing is loaded.

    Raises:
        UserError: the folder holds no pipeline (one found inside it is named), or there is no folder and the name is no
            hub id.
    """
    folder, index = Path(name_or_path), "model_index.json"
    if folder.is_dir() and not (folder / index).is_file():
        inside = [file.parent for file in sorted(folder.glob(f"*/{index}"))]
        # In a folder that holds runs, each of them is found by its own name.
        runs = [file.parent for file in sorted(folder.glob("*/config.yaml"))]
        found = list(dict.fromkeys([*inside, *runs]))
        fix = "A run's pipeline is in RUN/pipeline."
        if len(found) == 1:
            fix = f"Did you mean '{found[0]}'?"
        elif found:
            fix = f"Give one of the folders in it: {few([str(path) for path in found])}."
        raise UserError(f"'{folder}' is not a pipeline folder: it holds no {index}", fix)
    if folder.is_file():
        raise UserError(
            f"'{folder}' is a file, not a pipeline folder",
            "A model in one file is opened by from_single_file.",
        )
    if not folder.is_dir() and (len(folder.parts) != 2 or folder.is_absolute()):
        fix = f"{near_path(str(folder))}Check the path; a hub id has the form 'owner/name'."
        raise UserError(f"no folder '{folder}'", fix)
    return folder if folder.is_dir() else None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file."""
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata=metadata)
    restore_permissions(file)


def restore_permissions(written: Path) -> None:
    """Give the safetensors file, or those below the folder, the permissions of any other new file.

    safetensors 0.8 makes them readable by their owner alone, whatever the umask is (its issue 782): on a shared disk
    nobody else could open the checkpoint.
    """
    for file in [written] if written.is_file() else written.rglob("*.safetensors"):
        with suppress(OSError):  # a disk without permissions
            file.chmod(0o666 & ~_UMASK)


def result_of(name_or_path: str) -> str:
    """Return the pipeline folder of a finished run folder, or of a shipped checkpoint that is named as in a clone,
    ``checkpoints/emoji-64``, or by its name; any other folder, or a hub id, as it is."""
    if (spelled := find_path(Path(name_or_path))) != Path(name_or_path):
        name_or_path = str(spelled)
    shipped = SHIPPED_CHECKPOINTS / Path(name_or_path).name
    names = (shipped.name, f"{SHIPPED_CHECKPOINTS.name}/{shipped.name}")
    if name_or_path in names and not Path(name_or_path).exists() and (shipped / "model_index.json").is_file():
        return str(shipped)
    inside = Path(name_or_path) / "pipeline"
    return str(inside) if (inside / "model_index.json").is_file() else name_or_path


def unfinished_run(name_or_path: str) -> bool:
    """Return whether this is a run folder that holds no pipeline yet."""
    folder = Path(result_of(name_or_path))
    return (folder / "config.yaml").is_file() and not (folder / "model_index.json").is_file()


@contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place once it is written; if writing fails it is removed.

    Args:
        suffix: ending of the temporary file, for writers that choose their format by it.
    """
    partial = path.with_name(f".latentflow-{os.getpid()}{suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # it has moved, or was never made
            partial.unlink()
