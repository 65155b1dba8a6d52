"""Prepared pictures as training data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...data import Rows, Source, pixels_to_images
from ..loop.order import Draw


class PixelData:
    """uint8 pictures (N, 3, H, W), in memory or cached; a batch holds ``images`` (B, 3, H, W) in [-1, 1].

    With ``flips`` every other use of a picture, on average, is mirrored; which one depends on the draw only.
    """

    def __init__(self, source: Source, pixels: Tensor | Rows, *, flips: bool) -> None:
        self._source, self._pixels, self._flips = source, pixels, flips

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        images = pixels_to_images(self._pixels[[draw.index for draw in draws]])
        if self._flips:
            mirrored = torch.tensor([is_flipped(draw.number) for draw in draws])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"images": images}

    def name(self, index: int) -> str:
        return self._source.examples[index].name


def is_flipped(number: int) -> bool:
    """A fair coin for a draw's running number (the parity of a multiplicative hash)."""
    return bool((number * 0x9E3779B1 >> 15) & 1)
