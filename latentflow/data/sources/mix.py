"""Several data sets as one: a YAML file that lists them, with repeats and weights."""

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
from ..dataset import Example, Source
from .annotations import HEAVIEST
from .assemble import DataRequest, build_source
from .latent_folder import is_latent_folder

MOST_REPEATS = 1_000_000  # every use of an image in an epoch takes some bytes
_FIX = "Write: sources: [{data: cats, repeats: 2}, {data: more, weight: 0.5}]"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of the list; the names of its fields are the keys of the file."""

    data: str
    repeats: int | None = None
    weight: float = 1.0
    regularisation: bool = False


def is_mix(data: str) -> bool:
    """Return whether DATA is a YAML file."""
    path = Path(data).expanduser()
    return path.suffix.lower() in (".yaml", ".yml") and path.is_file()


def read_mix(data: str, request: DataRequest, find: Callable[[str, DataRequest], Source]) -> Source:
    """Return the sets that a YAML file lists as one; ``find`` finds each. Relative paths start at the file's folder.

    ``repeats`` is how often an epoch uses each image of a set, ``weight`` a factor on their loss. Images of a set
    with ``regularisation: true`` (prior preservation) are used about as often as all others together.

    Raises:
        UserError: the file cannot be understood; the sets have different kinds of condition, or share images.
    """
    path = Path(data).expanduser()
    parts = _parts(path)
    places = [_place(path.parent, part.data) for part in parts]
    for place in places:
        if is_mix(place):
            raise UserError(f"{path} is a list of lists: {place}", "Name the sets themselves.")
        if is_latent_folder(place):
            raise UserError(f"{path} mixes in latents: {place}", "Mix the images, and precompute the mix.")
    sources = [find(place, request) for place in places]
    kinds = [f"{part.data} ({source.kind})" for part, source in zip(parts, sources, strict=True)]
    if len({source.kind for source in sources}) > 1:
        raise UserError(
            f"{path} mixes sets with different conditions: {few(kinds)}",
            "Describe all images in one way, or use --condition none (or text, class) for all.",
        )
    for source in sources:
        refuse_inside(source.root)
    examples: list[Example] = []
    notes = [f"{len(parts)} sets"]
    for part, source, repeats in zip(parts, sources, _repeats(parts, sources), strict=True):
        factor = f", their loss times {part.weight:g}" if part.weight != 1 else ""
        role = " (regularisation)" if part.regularisation else ""
        notes.append(f"{part.data}: {len(source)} images, each used {repeats} times an epoch{factor}{role}")
        notes += [f"  {note}" for note in source.notes]
        examples += [
            dataclasses.replace(
                example,
                name=f"{part.data}/{example.name}",
                repeats=example.repeats * repeats,
                weight=example.weight * part.weight,
            )
            for example in source.examples
        ]
    found = dataclasses.replace(request, masks="auto", colours="srgb")  # the sets are as requested already
    return build_source(data, examples, sources[0].kind, found, notes)


def _parts(path: Path) -> list[Part]:
    content = read_yaml(path, _FIX)
    entries = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no sources", _FIX)
    for key in content:
        if key != "sources":
            raise unknown(f"key in {path}", str(key), ["sources"])
    parts = [_part(f"{path}, source {number}", entry) for number, entry in enumerate(entries, start=1)]
    names = [part.data for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} lists {twice[0]} twice", "Use `repeats: 2`.")
    if all(part.regularisation for part in parts):
        raise UserError(f"{path} lists nothing but regularisation", "Add the set that is to be learnt.")
    return parts


def _part(where: str, entry: Any) -> Part:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("data"), str):
        raise UserError(f"{where} has no data", _FIX)
    keys = [field.name for field in dataclasses.fields(Part)]
    for key in entry:
        if key not in keys:
            raise unknown(f"key in {where}:", str(key), keys)
    part = Part(**entry)
    if part.repeats is not None:
        whole(f"{where}: repeats", part.repeats, 1, MOST_REPEATS)
    if not is_number(part.weight) or not 0 < part.weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(part.weight)}", f"Give a number above 0, at most {HEAVIEST:,.0f}."
        )
    if not isinstance(part.regularisation, bool):
        raise UserError(f"{where}: regularisation is {shown(part.regularisation)}", "Write true or false.")
    return part


def _place(folder: Path, data: str) -> str:
    """Return DATA as seen from the YAML file."""
    return data if data == "shapes" or data.startswith("hub:") else str(folder / Path(data).expanduser())


def _repeats(parts: list[Part], sources: list[Source]) -> list[int]:
    """Return the repeats of every set; regularisation without any is balanced with the rest, in whole numbers."""
    uses = [len(s.uses()) * (p.repeats or 1) for p, s in zip(parts, sources, strict=True)]
    regularising = sum(n for n, part in zip(uses, parts, strict=True) if part.regularisation)
    balance = max(1, round((sum(uses) - regularising) / regularising)) if regularising else 1
    return [part.repeats or (balance if part.regularisation else 1) for part in parts]
