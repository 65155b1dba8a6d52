"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures, and what is made of them."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip, a table, a saved data set, hub:owner/name, a .yaml that mixes several, or
    the procedural set `shapes` (docs/data.md)."""
    resolution: int = 64
    """Side of the square that every picture is resized and centre-cropped to."""
    background: str = "white"
    """What lies behind transparent pictures: a colour name or #rrggbb."""
    condition: Literal["auto", "none", "class", "text"] = "auto"
    """What to condition on; auto: captions before classes before nothing (in a folder: metadata, .txt files,
    subfolders as classes)."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """What becomes of pictures without a caption."""
    masks: Literal["auto", "none", "alpha"] = "auto"
    """Your own masks; auto: a mask column in the metadata, then cat-mask.png beside cat.png; alpha: what is
    transparent is to be repainted."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of a table that are called otherwise, such as `image picture text caption`: our name, then theirs."""
    shuffle_tags: int = 0
    """Captions are lists of tags parted by commas: train on this many orders of each. 0: as they are written."""
    keep_tags: int = 0
    """That many tags stay in front when the others are shuffled."""
    validation: float = 0.02
    """Share of the pictures held out for validation."""
    random_flip: bool = False
    """Mirror pictures at random (leave it off where left and right matter)."""
