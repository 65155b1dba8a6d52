"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and what is made of them."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip, a table, a saved data set, hub:owner/name, a .yaml that mixes several, or
    the procedural set `shapes` (docs/data.md)."""
    resolution: int = 64
    """Side of the square that every image is resized and centre-cropped to (with --buckets, of about as many
    pixels)."""
    background: str = "white"
    """What lies behind transparent images: a colour name or #rrggbb."""
    condition: Literal["auto", "none", "class", "text"] = "auto"
    """What to condition on; auto: captions before classes before nothing (in a folder: metadata, .txt files,
    subfolders as classes)."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """What becomes of images without a caption."""
    masks: Literal["auto", "none", "alpha"] = "auto"
    """Your own masks; auto: a mask column in the metadata, then cat-mask.png beside cat.png; alpha: what is
    transparent is to be repainted."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of a table that are called otherwise, such as `image picture text caption`: our name, then theirs."""
    colours: Literal["srgb", "stored"] = "srgb"
    """Colour profiles: srgb converts the images that have another than sRGB, stored takes the numbers of all as they
    are."""
    shuffle_tags: int = 0
    """Captions are lists of tags parted by commas: train on this many orders of each. 0: as they are written."""
    keep_tags: int = 0
    """That many tags stay in front when the others are shuffled."""
    validation: float = 0.02
    """Share of the images held out for validation."""
    random_flip: bool = False
    """Mirror images at random (leave it off where left and right matter)."""

    def wanted(self) -> dict[str, Any]:
        """The keywords of `find_source`."""
        names = ("condition", "missing_caption", "masks", "columns", "colours", "shuffle_tags", "keep_tags")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class FramingConfig:
    """Which part of each image is trained on."""

    buckets: bool = False
    """Train at several aspect ratios, each image at the one nearest to its own, so that little is cut off."""
    crops: int = 1
    """Cut what is too long from this many random places of each image; 1: the centre."""
    mirror_captions: bool = False
    """With --random-flip: swap the words left and right in the captions of mirrored images."""
    size_conditioning: bool = False
    """Tell the network how large each image was and what was cut off (SDXL, arXiv:2307.01952)."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 64:
            raise UserError(f"--crops is {self.crops}", "Use 1 (the centre) to 64; each is encoded once.")
