"""Several sets as one: a YAML file that lists them, with repeats and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, few, shown, unknown
from ...utils.arguments import is_number, whole
from ...utils.files import read_yaml
from ..cache.store import refuse_inside
from ..dataset import Source
from .annotations import HEAVIEST
from .assemble import Wanted, source_of
from .latent_folder import is_latent_folder

MOST_REPEATS = 1_000_000  # every use of an image in an epoch takes some bytes
_KEYS = ("data", "repeats", "weight", "regularisation")
_FIX = "Write: sources: [{data: cats, repeats: 2}, {data: more, weight: 0.5}]"

Find = Callable[[str, Wanted], Source]


@dataclass(frozen=True)
class Part:
    """One entry of the list."""

    data: str
    repeats: int | None
    weight: float
    regularisation: bool


def is_mix(data: str) -> bool:
    """Whether DATA is a YAML file."""
    path = Path(data).expanduser()
    return path.suffix.lower() in (".yaml", ".yml") and path.is_file()


def read_mix(data: str, wanted: Wanted, find: Find) -> Source:
    """The sets that a YAML file lists, as one; ``find`` finds each. Relative paths start at the file's folder.

    ``repeats`` is how often an epoch uses each image of a set, ``weight`` a factor on their loss. Images of a set
    with ``regularisation: true`` (prior preservation) are used about as often as all others together.

    Raises:
        UserError: the file cannot be understood; the sets are of several kinds of condition, or share images.
    """
    path = Path(data).expanduser()
    parts = _parts(path)
    places = [_located(path.parent, part.data) for part in parts]
    for place in places:
        if is_mix(place):
            raise UserError(f"{path} is a list of lists: {place}", "Name the sets themselves.")
        if is_latent_folder(place):
            raise UserError(f"{path} mixes in latents: {place}", "Mix the images, and precompute the mix.")
    sources = [find(place, wanted) for place in places]
    _refuse_kinds(path, parts, sources)
    for source in sources:
        refuse_inside(source.root)
    repeats = _repeats(parts, sources)
    examples, notes = [], [f"{len(parts)} sets"]
    for part, source, times in zip(parts, sources, repeats, strict=True):
        said = f"{part.data}: {len(source)} images, each used {times} times an epoch"
        said += f", their loss times {part.weight:g}" if part.weight != 1 else ""
        notes += [
            said + (" (regularisation)" if part.regularisation else ""),
            *(f"  {n}" for n in source.notes),
        ]
        examples += [
            dataclasses.replace(
                example,
                name=f"{part.data}/{example.name}",
                repeats=example.repeats * times,
                weight=example.weight * part.weight,
            )
            for example in source.examples
        ]
    return source_of(data, examples, sources[0].kind, wanted, notes)


def _parts(path: Path) -> list[Part]:
    content = read_yaml(path, _FIX)
    listed = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path} lists no sources", _FIX)
    for key in content:
        if key != "sources":
            raise unknown(f"key in {path}", str(key), ["sources"])
    parts = [_part(f"{path}, source {number}", entry) for number, entry in enumerate(listed, start=1)]
    names = [part.data for part in parts]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} lists {twice[0]} twice", "Use `repeats: 2`.")
    if all(part.regularisation for part in parts):
        raise UserError(f"{path} lists nothing but regularisation", "Add the set that is to be learnt.")
    return parts


def _part(where: str, entry: Any) -> Part:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("data"), str):
        raise UserError(f"{where} has no data", _FIX)
    for key in entry:
        if key not in _KEYS:
            raise unknown(f"key in {where}:", str(key), _KEYS)
    repeats, weight = entry.get("repeats"), entry.get("weight", 1.0)
    regularisation = entry.get("regularisation", False)
    if repeats is not None:
        whole(f"{where}: repeats", repeats, 1, MOST_REPEATS)
    if not is_number(weight) or not 0 < weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(weight)}", f"Give a number above 0, at most {HEAVIEST:,.0f}."
        )
    if not isinstance(regularisation, bool):
        raise UserError(f"{where}: regularisation is {shown(regularisation)}", "Write true or false.")
    return Part(entry["data"], repeats, float(weight), regularisation)


def _located(folder: Path, data: str) -> str:
    """DATA as seen from the YAML file."""
    return data if data == "shapes" or data.startswith("hub:") else str(folder / Path(data).expanduser())


def _repeats(parts: list[Part], sources: list[Source]) -> list[int]:
    """Repeats of every set; regularisation without any is balanced with the rest, in whole numbers."""
    uses = [len(s.uses()) * (p.repeats or 1) for p, s in zip(parts, sources, strict=True)]
    learnt = sum(n for n, part in zip(uses, parts, strict=True) if not part.regularisation)
    kept = sum(n for n, part in zip(uses, parts, strict=True) if part.regularisation)
    balance = max(1, round(learnt / kept)) if kept else 1
    return [part.repeats or (balance if part.regularisation else 1) for part in parts]


def _refuse_kinds(path: Path, parts: list[Part], sources: list[Source]) -> None:
    if len({source.kind for source in sources}) > 1:
        told = few([f"{part.data} ({source.kind})" for part, source in zip(parts, sources, strict=True)])
        raise UserError(
            f"{path} mixes sets with different conditions: {told}",
            "Describe all images in one way, or use --condition none (or text, class) for all.",
        )
