"""Settings of the data: which images, with which captions, classes and masks, and how they are cropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..errors import UserError
from ..utils.flags import Essential


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, with their captions, classes and masks."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip file, a table, a saved data set, hub:owner/name, a .yaml that mixes
    several, or `shapes` (docs/data.md)."""
    resolution: Annotated[int, Essential("data")] = 64
    """Side in pixels to which images are resized and centre-cropped (with --buckets: of a square of as many
    pixels)."""
    background: str = "white"
    """Colour behind transparent images: a name or #rrggbb."""
    condition: Annotated[Literal["auto", "none", "class", "text"], Essential("data")] = "auto"
    """Condition of the model. auto: captions if there are any, else classes (subfolders), else none."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """What to do with images that have no caption: stop with an error, train on an empty caption, or skip them."""
    masks: Annotated[Literal["auto", "none", "alpha"], Essential("data")] = "auto"
    """Your own inpainting masks. auto: the metadata's mask column, else cat-mask.png beside cat.png. alpha: repaint
    what is transparent."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns: pairs of our name and yours, such as `image photo text caption`."""
    colours: Literal["srgb", "stored"] = "srgb"
    """srgb converts images that have another colour profile to sRGB; stored takes all pixel values as they are."""
    shuffle_tags: int = 0
    """For captions that are lists of tags separated by commas: train on this many random orders of each list. 0
    keeps the order as it is."""
    keep_tags: int = 0
    """With --shuffle-tags: this many tags keep their place at the front."""
    validation: float = 0.02
    """Share of the images that is held out for validation."""
    random_flip: Annotated[bool, Essential("data")] = False
    """Mirror images at random."""

    def wanted(self) -> dict[str, Any]:
        """Return the keyword arguments of `find_source`."""
        names = ("condition", "missing_caption", "masks", "columns", "colours", "shuffle_tags", "keep_tags")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class FramingConfig:
    """Cropping of the images."""

    buckets: Annotated[bool, Essential("data")] = False
    """Train on several aspect ratios, each image on the one nearest to its own, so that little is cropped away."""
    crops: int = 1
    """Number of crops of each image, at random places along its longer side. 1: only the centre."""
    mirror_captions: bool = False
    """With --random-flip: swap the words left and right in the captions of mirrored images."""
    size_conditioning: bool = False
    """Condition the network on the original size of each image and on what was cropped away (SDXL,
    arXiv:2307.01952)."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 64:
            raise UserError(f"--crops is {self.crops}", "Use 1 (the centre) to 64; each is encoded once.")
