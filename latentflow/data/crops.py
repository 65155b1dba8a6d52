"""The part of each image that is trained on: one size for all, or several aspect ratios ("buckets"), and its crops."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ..config import Control, FramingConfig
from ..errors import UserError, check_resolution, one_line
from .cache.store import Array
from .checking.inspect_images import inspect_images
from .dataset import Example, Source, StoredSizes, hash_text

Size: TypeAlias = tuple[int, int]  # (height, width) in pixels

_STEPS = 16  # sides of buckets are this share of the resolution apart, where the network's unit allows it
_MUCH = 0.25  # share of an image that is cut off, from which the report names it


def bucket_sizes(resolution: int, unit: int) -> list[Size]:
    """Return sizes of at most ``resolution`` ** 2 pixels, and about as many, from 4:1 to 1:4; wide ones first.

    Args:
        resolution: side of the square among them.
        unit: number that every side must be a multiple of.

    Raises:
        UserError: ``resolution`` is not one of its multiples.
    """
    check_resolution(resolution, unit, "autoencoder and network need")
    step = unit * max(1, round(resolution / _STEPS / unit))
    shorts = [resolution - step * i for i in range(resolution) if resolution - step * i >= resolution / 2]
    wide = [(short, resolution**2 // short // step * step) for short in shorts]
    wide = [size for size in wide if size[1] > size[0] and not size[1] % unit]
    return [*reversed(wide), (resolution, resolution), *((width, height) for height, width in wide)]


@dataclass(frozen=True)
class Cropping:
    """The images of a source, each brought to one of a few sizes by cutting off what is too long.

    Attributes:
        source: N images.
        sizes: the sizes that are used.
        bucket: (N,), the index of each image's size in ``sizes``.
        natural: (N, 2), heights and widths of the images as they are; None where nothing needs them.
        crops: number of places from which each image is cut, of which every use draws one; 1: the centre.
    """

    source: Source
    sizes: tuple[Size, ...]
    bucket: Array
    natural: Array | None
    crops: int = 1

    @cached_property
    def members(self) -> list[Array]:
        """The images of each size, ascending."""
        return [np.flatnonzero(self.bucket == number) for number in range(len(self.sizes))]

    def part(self, number: int) -> Source:
        """Return the images of size ``number``; every crop of an image is an example, next to one another."""
        whole = self.source.subset(self.members[number].tolist()) if len(self.sizes) > 1 else self.source
        return whole if self.crops == 1 else with_crops(whole, self.crops)

    @cached_property
    def centres(self) -> Array:
        """Positions (N, crops, 2) of the crops, of the images as they are when this is first asked for."""
        centres = np.full((len(self.source), self.crops, 2), 0.5, dtype=np.float32)
        for row, example in enumerate(self.source.examples) if self.crops > 1 else ():
            centres[row] = [crop_position(example, crop) for crop in range(self.crops)]
        return centres

    def size_conditioning(self, rows: Array, crops: Array, flips: Array) -> Array:
        """Return the numbers that SDXL gives its network (arXiv:2307.01952, section 2.2): (B, 6) float32.

        Height and width of the image as it is; how many pixels were cut off above and on the left, once it was
        resized; height and width of what is left.

        Args:
            rows, crops, flips: (B,) integers: the images, which crop of each, and 1 where it is mirrored.
        """
        assert self.natural is not None
        natural, sizes = self.natural[rows], np.asarray(self.sizes)[self.bucket[rows]]
        cut = natural * (sizes / natural).max(1, keepdims=True) - sizes
        across, down = self.centres[rows, crops].astype(np.float64).T
        places = np.stack([down, np.where(flips, 1 - across, across)], axis=1)
        return np.concatenate([natural, np.rint(cut * places), sizes], axis=1).astype(np.float32)

    def lines(self) -> list[str]:
        """Report how the images are spread over the sizes, and how much is cut off."""
        if self.natural is None:
            return []
        lost = _cut_off(self.natural, np.asarray(self.sizes)[self.bucket])
        shares = ", ".join(
            f"{width}x{height}: {len(rows)}"
            for (height, width), rows in zip(self.sizes, self.members, strict=True)
        )
        lines = [
            f"sizes (width x height: images): {shares}; none left out",
            f"cut off: {lost.mean():.1%} of an image on average, {lost.max():.1%} of "
            f"{one_line(self.source.examples[int(lost.argmax())].name)} at most; a square would cut off "
            f"{_cut_off(self.natural, np.ones((1, 2))).mean():.1%} on average",
        ]
        if much := int((lost > _MUCH).sum()):
            lines.append(f"WARNING: {much} images lose more than {_MUCH:.0%} of themselves")
        return lines


def _cut_off(natural: Array, sizes: Array) -> Array:
    """Return the share (N,) that is lost of images of (height, width) ``natural`` brought to the shapes ``sizes``."""
    ratio = natural[:, 1] / natural[:, 0] / (sizes[:, 1] / sizes[:, 0])
    return 1 - np.minimum(ratio, 1 / ratio)


def one_size(source: Source, size: Size, crops: int = 1) -> Cropping:
    """Bring every image to the same size."""
    return Cropping(source, (size,), np.zeros(len(source), dtype=np.int32), None, crops)


def crop(
    source: Source, resolution: int, unit: int, config: FramingConfig, size_conditioning: bool = False
) -> Cropping:
    """Choose a size for every image: the bucket whose aspect ratio is nearest to its own.

    The images of a folder of latents were cut when it was made.

    Args:
        source: readable images.
        resolution: side of the square, or of a square of as many pixels.
        unit: number that the sides of an image must be multiples of.
        config: buckets and crops.
        size_conditioning: whether the network is given sizes and crops.

    Raises:
        UserError: a wrong setting, or one that does not fit a folder of latents.
    """
    if (stored := source.stored_sizes()) is not None:
        return _as_stored(source, stored, unit, config)
    square = ((resolution, resolution),)
    if not (config.buckets or size_conditioning):
        return one_size(source, square[0], config.crops)
    natural = _natural_sizes(source)
    sizes = bucket_sizes(resolution, unit) if config.buckets else square
    ratios = np.log([width / height for height, width in sizes])
    nearest = np.abs(np.log(natural[:, 1] / natural[:, 0])[:, None] - ratios).argmin(1)
    return _cropping(source, sizes, nearest, natural, config.crops)


def _as_stored(source: Source, stored: StoredSizes, unit: int, config: FramingConfig) -> Cropping:
    if config.crops > 1 or (config.buckets and all(height == width for height, width in stored.sizes)):
        raise UserError(
            f"{source.name} is a folder of latents: how images are cut was decided when it was made",
            "Leave --crops and --buckets out (`latentflow precompute --buckets` stores several aspect ratios), or "
            "train on the images.",
        )
    for size in stored.sizes:
        if size[0] % unit or size[1] % unit:
            raise UserError(
                f"{source.name} holds images of {size[1]} x {size[0]} pixels; the network needs multiples of {unit}",
                "Use a smaller --patch-size, or precompute again with a multiple of the resolution.",
            )
    return _cropping(source, *stored)


def _cropping(
    source: Source, sizes: Sequence[Size], bucket: Array, natural: Array, crops: int = 1
) -> Cropping:
    """Return the cropping with those of ``sizes`` that are used."""
    used, inverse = np.unique(bucket, return_inverse=True)
    chosen = tuple(sizes[number] for number in used.tolist())
    return Cropping(source, chosen, inverse.astype(np.int32), natural, crops)


def _natural_sizes(source: Source) -> Array:
    """Return the height and width (N, 2) of every image.

    Raises:
        UserError: one cannot be read.
    """
    sizes = np.empty((len(source), 2), dtype=np.int32)
    for row, info in enumerate(inspect_images(source)):
        if info.error is not None:
            raise UserError(f"{source.examples[row].name}: {info.error}", "Start again: it is left out then.")
        sizes[row] = info.height, info.width
    return sizes


# ---------------------------------------------------------------- crops


@dataclass(frozen=True)
class CroppedExample(Example):
    """An image of which another part than the middle is used."""

    whole: Example = field(kw_only=True)
    crop: int = field(kw_only=True)

    @property
    def centering(self) -> tuple[float, float]:
        return crop_position(self.whole, self.crop)

    def open(self) -> Image.Image:
        return self.whole.open()

    def open_mask(self) -> Image.Image | None:
        return self.whole.open_mask()

    def content_key(self) -> str:
        return hash_text(f"{self.whole.content_key()} cut at {self.centering}")

    def pixel_key(self) -> str:
        return hash_text(f"{self.whole.pixel_key()} cut at {self.centering}")

    def mask_key(self) -> str:
        return self.whole.mask_key()

    @property
    def control_kinds(self) -> tuple[Control, ...]:
        return self.whole.control_kinds

    def open_control(self, kind: Control, size: tuple[int, int] | None = None) -> Image.Image | None:
        return self.whole.open_control(kind, size)

    def control_key(self, kind: Control) -> str:
        return self.whole.control_key(kind)


def with_crops(source: Source, crops: int) -> Source:
    """Return a source with ``crops`` examples for each of ``source``, next to one another, the middle first."""
    examples: Any = _Crops(source.examples, crops)
    return dataclasses.replace(source, examples=examples)


@dataclass(frozen=True)
class _Crops(Sequence[Example]):
    """The crops of all images; each is made when it is asked for, as there may be many millions."""

    wholes: Sequence[Example]
    crops: int

    def __len__(self) -> int:
        return len(self.wholes) * self.crops

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        whole, crop = self.wholes[place // self.crops], place % self.crops
        if crop == 0:
            return whole
        shared = {f.name: getattr(whole, f.name) for f in dataclasses.fields(Example)}
        return CroppedExample(**shared, whole=whole, crop=crop)


def crop_position(example: Example, crop: int) -> tuple[float, float]:
    """Return the position of crop number ``crop``, from left and from top in [0, 1]; 0 is the middle."""
    if crop == 0:
        return example.centering
    digest = hashlib.sha256(f"{example.content_key()} {crop}".encode()).digest()
    across, down = (int.from_bytes(part, "big") / 2**32 for part in (digest[:4], digest[4:8]))
    return across, down
