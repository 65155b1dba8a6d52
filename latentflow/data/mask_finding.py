"""Which files of a folder are masks, and of which pictures: metadata, then ``cat-mask.png`` beside ``cat.png``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentflow.errors import UserError

from .folder import Folder
from .members import File, file_key
from .metadata import Metadata

Masks = Literal["auto", "none", "alpha"]

_ENDING = "-mask"


@dataclass(frozen=True)
class MaskFiles:
    """The masks of a folder, by the name of their picture; all names relative to the folder in posix form.

    Attributes:
        folder: the folder.
        listed: from the metadata's ``mask`` column.
        beside: named like the picture with ``-mask`` added, in any format; hardly ever more than one.
    """

    folder: Folder
    listed: Mapping[str, str]
    beside: Mapping[str, list[str]]

    @property
    def named(self) -> set[str]:
        """The files that their name makes masks."""
        return {mask for masks in self.beside.values() for mask in masks}

    def files(self) -> dict[str, File]:
        """The mask of every picture that has one.

        Raises:
            UserError: a picture has several, and they differ.
        """
        found, root = dict(self.listed), self.folder.root
        for name, masks in self.beside.items():
            for mask in masks:
                first = found.setdefault(name, mask)
                if first != mask and file_key(self.folder.file(first)) != file_key(self.folder.file(mask)):
                    raise UserError(
                        f"{root / name} has two masks that differ: {root / first} and {root / mask}",
                        "Keep one of them (move the other away), or use --masks none.",
                    )
        return {name: self.folder.file(mask) for name, mask in found.items()}


def find_masks(folder: Folder, metadata: Metadata | None) -> MaskFiles:
    """The masks of a folder. What the metadata list as a picture is no mask by its name."""
    rows = metadata.rows if metadata is not None else {}
    by_stem: dict[str, list[str]] = {}
    for name in folder.images:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)  # noqa: PTH122 (as in folder.py)
    pictures: set[str] = set()
    beside: dict[str, list[str]] = {}
    for stem in sorted(by_stem, key=len):  # a picture's stem is shorter than its mask's
        base = stem.removesuffix(_ENDING)
        if base != stem and base in pictures and not any(name in rows for name in by_stem[stem]):
            beside |= dict.fromkeys(by_stem[base], by_stem[stem])
        else:
            pictures.add(stem)
    listed = {name: row.mask for name, row in rows.items() if row.mask}
    return MaskFiles(folder, listed, beside)
