"""Replacing a result by a later one: files of the user that are kept, and cards that may be renewed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from ...utils.libraries import DISTRIBUTION

# Weights may be split into another number of files than before: old ones must not lie beside new ones.
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model([.-][\w.-]+)?\.safetensors(\.index\.json)?")

_SIGNATURE = (
    "<!-- Written by latentflow ({}). Change a word and this card is yours: no later export renews it. -->"
)


def carry_over(old: Path, new: Path) -> None:
    """Copy the user's files from the earlier result ``old`` to ``new``, its complete successor.

    These are all files that ``new`` does not have, except weights and model cards that we wrote.
    """
    for path in old.rglob("*"):
        copy = new / path.relative_to(old)
        if not path.is_file() or copy.exists() or _is_ours(path):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy, follow_symlinks=False)  # no copy: the old name is about to go
        except OSError:
            shutil.copy2(path, copy, follow_symlinks=False)


def signed(card: str) -> str:
    """Return a model card with a last line by which `is_generated` recognises it."""
    return f"{card}\n{_SIGNATURE.format(_digest(card))}\n"


def unsigned(card: str) -> str:
    """Return a card of `signed` without its last line."""
    return card.replace("\r\n", "\n").rstrip("\n").rpartition("\n")[0]


def is_generated(card: str) -> bool:
    """Return whether `signed` made a model card, and nobody has changed it since."""
    text, _, signature = card.replace("\r\n", "\n").rstrip("\n").rpartition("\n")
    return signature == _SIGNATURE.format(_digest(text))


def moved(card: str, where: str) -> str:
    """Return a model card of `signed` whose lines load from ``where``; any other card as it is.

    Earlier versions named diffusers as the library of our own pipelines, for which the hub shows a snippet that fails.
    """
    if not is_generated(card):
        return card
    text = unsigned(card)
    if not re.search(r"^- diffusers$", text, flags=re.M):  # the tag of diffusers' own pipelines
        text = re.sub(r"^library_name: diffusers$", f"library_name: {DISTRIBUTION}", text, flags=re.M)
    return signed(relocated(text, where))


def relocated(card: str, where: str, folder: Path | None = None) -> str:
    """Return the text of a card whose lines load the pipeline or the adapter from ``where``.

    Args:
        folder: where it is loaded from so far, in a card that may be the user's; a line that names another one stays.
    """
    string = r'("(?:[^"\\\n]|\\.)*")'  # of JSON
    found = re.search(rf"load_lora_weights\({string}", card) or re.search(rf"from_pretrained\({string}", card)
    try:
        before = json.loads(found[1]) if found else None
    except ValueError:  # in the user's own words
        before = None
    if found is None or before is None or (folder is not None and Path(before).resolve() != folder.resolve()):
        return card
    flag = "--lora" if found[0].startswith("load_lora") else "--checkpoint"
    card = card.replace(found[0], found[0].replace(found[1], json.dumps(where)))
    return card.replace(f"{flag} {shlex.quote(before)} ", f"{flag} {shlex.quote(where)} ")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    if re.fullmatch(r"README-step-\d+\.md", path.name):
        return is_generated(path.read_text(encoding="utf-8", errors="replace"))
    return _WEIGHTS.fullmatch(path.name) is not None
