"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures, and what is made of them."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, or the procedural set `shapes`."""
    resolution: int = 64
    """Side of the square that every picture is resized and centre-cropped to."""
    background: str = "white"
    """What lies behind transparent pictures: a colour name or #rrggbb."""
    condition: Literal["auto", "none", "class", "text"] = "auto"
    """What to condition on; auto: metadata, then .txt files, then subfolders as classes, then nothing."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """What becomes of pictures without a caption."""
    masks: Literal["auto", "none", "alpha"] = "auto"
    """Your own masks; auto: a mask column in the metadata, then cat-mask.png beside cat.png; alpha: what is
    transparent is to be repainted."""
    validation: float = 0.02
    """Share of the pictures held out for validation."""
    random_flip: bool = False
    """Mirror pictures at random (leave it off where left and right matter)."""
