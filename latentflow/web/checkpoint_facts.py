"""Facts about a checkpoint that the page shows, and the adapters that it offers, read from files without torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, printable
from ..inference.opening import split_adapter
from ..utils.files import parse_yaml
from ..utils.single_files import is_single_file

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors")  # diffusers' name and peft's
FAST = "fast"  # folder of a checkpoint's few-step adapter
MOST_ADAPTERS = 50
LARGEST_WEIGHT = 2.0  # the weights of adapters lie between its negative and it
LONGEST_FACT = 220  # characters
MOST_PROMPTS = 8


# ---------------------------------------------------------------- name and card


def checkpoint_name(source: str) -> str:
    """Return the name of a checkpoint: that of its folder (of the run, for RUN/pipeline) or file, or the hub id."""
    if is_single_file(source):
        return Path(source).stem
    if not Path(source).is_dir():
        return source
    folder = Path(source).resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name


@dataclass(frozen=True)
class Card:
    """Facts from a checkpoint's model card (README.md).

    Attributes:
        data: a sentence about its training data, or "".
        prompts: example prompts.
    """

    data: str = ""
    prompts: tuple[str, ...] = ()


def read_card(folder: Path) -> Card:
    """Read a checkpoint's model card: its section on data, and the prompts of its ``widget`` and of its commands.

    The card is somebody's prose: what cannot be found in it is left out.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return Card()
    header, body = _split_header(text)
    prompts = [*_widget_prompts(header), *_command_prompts(body)]
    return Card(_data_sentence(body), tuple(dict.fromkeys(prompts))[:MOST_PROMPTS])


def _split_header(text: str) -> tuple[str, str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (match[1], text[match.end() :]) if match else ("", text)


def _widget_prompts(header: str) -> list[str]:
    """Return the example prompts in a card's header, in the hub's format: ``widget: [{text: red apple}]``."""
    try:
        settings = parse_yaml(header, "the card")
    except UserError:
        return []
    widget = settings.get("widget") if isinstance(settings, dict) else None
    texts = [entry.get("text") for entry in widget or [] if isinstance(entry, dict)]
    return [text for text in texts if isinstance(text, str)]


def _command_prompts(body: str) -> list[str]:
    """Return the prompts in a card's lines ``latentflow generate "red apple" ...``."""
    found: list[str] = []
    for line in re.findall(r"^latentflow generate (.*)", body, re.MULTILINE):
        try:
            words = shlex.split(line)
        except ValueError:  # an open quotation mark
            continue
        flags = [i for i, word in enumerate(words) if word.startswith("-")]
        found += words[: flags[0]] if flags else words
    return found


def _data_sentence(body: str) -> str:
    """Return the first sentence, of the section on data, that has a number in it."""
    section = re.search(r"^## (?:Training )?Data\s*\n(.*?)(?=^## |\Z)", body, re.DOTALL | re.MULTILINE | re.I)
    blocks = re.split(r"\n\s*\n|^- ", section[1], flags=re.MULTILINE) if section else []
    block = next((block for block in blocks if re.search(r"\d", block)), "")
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block)  # links
    text = printable(" ".join(re.sub(r"\\([\W_])|[*`_]", r"\1", text).split())).removeprefix("data: ")
    sentence = re.split(r"(?<=\w[.;]) ", text, maxsplit=1)[0].rstrip(".;")
    return sentence if len(sentence) <= LONGEST_FACT else f"{sentence[:LONGEST_FACT].rpartition(' ')[0]} ..."


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True)
class OfferedAdapter:
    """An adapter that visitors of the page may choose.

    Attributes:
        source: a folder, file or hub id, without a weight.
        weight: the weight that it is given first.
        chosen: it is in use when the page is opened.
    """

    source: str
    weight: float = 1.0
    chosen: bool = False


def offered_adapters(
    checkpoint: Path | None, named: Sequence[str] = (), folder: str | None = None
) -> dict[str, OfferedAdapter]:
    """Return the adapters that the page offers, by name; nothing is loaded.

    They are those that the user named, those in the folder that the user named, and those in the checkpoint's own
    folder other than its few-step adapter.

    Args:
        checkpoint: pipeline folder, if it is local.
        named: values of ``--lora``, which are chosen when the page is opened.
        folder: value of ``--lora-folder``.

    Raises:
        UserError: an adapter is not there, or its weight is out of range; the folder holds none, or too many.
    """
    found: dict[str, OfferedAdapter] = {}
    for text in named:
        source, weight = split_adapter(text)
        if abs(weight) > LARGEST_WEIGHT:
            raise UserError(
                f"--lora {text}: the weight is {weight:g}",
                f"The page takes -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}.",
            )
        _add(found, OfferedAdapter(source, weight, chosen=True))
    if folder is not None:
        inside = adapters_in(Path(folder))
        if not inside:
            raise UserError(
                f"--lora-folder {folder}: no adapter is in it",
                f"Give a folder of runs, of adapters (NAME/{ADAPTER_FILE}) or of .safetensors files.",
            )
        for path in inside:
            _add(found, OfferedAdapter(str(path)))
    if checkpoint is not None:
        for file in sorted(checkpoint.glob(f"*/{ADAPTER_FILE}")):
            if file.parent.name != FAST:
                _add(found, OfferedAdapter(str(file.parent)))
    if len(found) > MOST_ADAPTERS:
        raise UserError(
            f"{len(found)} adapters are more than the page offers ({MOST_ADAPTERS})", "Name some: --lora."
        )
    return found


def adapters_in(folder: Path) -> list[Path]:
    """Return the adapters in a folder of runs, of adapters or of files, in the order of their names."""
    runs = [file.parent for file in folder.glob(f"*/adapter/{ADAPTER_FILE}")]
    folders = {file.parent for name in _ADAPTER_FILES for file in folder.glob(f"*/{name}")}
    return sorted([*runs, *folders, *folder.glob("*.safetensors")])


def _add(found: dict[str, OfferedAdapter], adapter: OfferedAdapter) -> None:
    """Add an adapter under a free name, unless it is there already."""
    if any(_same(adapter.source, other.source) for other in found.values()):
        return
    found[_free_name(_name_of(adapter.source), found)] = adapter


def _same(a: str, b: str) -> bool:
    return a == b or Path(a).resolve() == Path(b).resolve()


def _name_of(source: str) -> str:
    path = Path(source)
    if not path.exists():
        return printable(source)  # a hub id
    path = path.resolve()
    if path.name in _ADAPTER_FILES:
        path = path.parent
    return printable(
        path.parent.name if path.name == "adapter" else path.stem if path.is_file() else path.name
    )


def _free_name(name: str, taken: Iterable[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free
