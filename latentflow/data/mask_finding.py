"""Which files of a folder are masks, and of which pictures: metadata, then ``cat-mask.png`` beside ``cat.png``."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from latentflow.errors import UserError

from .metadata import Metadata

Masks = Literal["auto", "none", "alpha"]

_ENDING = "-mask"


@dataclass(frozen=True)
class MaskFiles:
    """The masks of a folder, by the name of their picture; all paths relative to ``root`` in posix form.

    Attributes:
        root: the folder.
        listed: from the metadata's ``mask`` column.
        beside: named like the picture with ``-mask`` added, in any format; hardly ever more than one.
    """

    root: Path
    listed: Mapping[str, str]
    beside: Mapping[str, list[str]]

    @property
    def named(self) -> set[str]:
        """The files that their name makes masks."""
        return {mask for masks in self.beside.values() for mask in masks}

    def paths(self) -> dict[str, Path]:
        """The mask of every picture that has one.

        Raises:
            UserError: a picture has several, and they differ.
        """
        found = {name: self.root / mask for name, mask in self.listed.items()}
        for name, masks in self.beside.items():
            for mask in masks:
                path = self.root / mask
                if not filecmp.cmp(found.setdefault(name, path), path, shallow=False):
                    raise UserError(
                        f"{self.root / name} has two masks that differ: {found[name]} and {path}",
                        "Keep one of them (move the other away), or use --masks none.",
                    )
        return found


def find_masks(root: Path, files: Iterable[str], metadata: Metadata | None) -> MaskFiles:
    """The masks among ``files`` and in the metadata. What the metadata list as a picture is no mask by its name."""
    rows = metadata.rows if metadata is not None else {}
    by_stem: dict[str, list[str]] = {}
    for name in files:
        by_stem.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    pictures: set[str] = set()
    beside: dict[str, list[str]] = {}
    for stem in sorted(by_stem, key=len):  # a picture's stem is shorter than its mask's
        base = stem.removesuffix(_ENDING)
        if base != stem and base in pictures and not any(name in rows for name in by_stem[stem]):
            beside |= dict.fromkeys(by_stem[base], by_stem[stem])
        else:
            pictures.add(stem)
    listed = {name: row.mask for name, row in rows.items() if row.mask}
    return MaskFiles(root, listed, beside)
