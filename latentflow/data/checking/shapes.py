"""Sizes and shapes of pictures, counted in steps that a person reads."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SIDES = (32, 64, 128, 256, 512, 1024)
_ASPECTS = {  # width / height
    "1:2 or taller": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
    "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1 or wider": 2.0,
}  # fmt: skip


def aspect_histogram(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Pictures by the nearest (in ratio) of the usual shapes that occur, from tall to wide."""
    values = np.log([width / height for width, height in sizes])
    nearest = np.abs(values[:, None] - np.log(list(_ASPECTS.values()))).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(_ASPECTS)).tolist()
    return {name: count for name, count in zip(_ASPECTS, counts, strict=True) if count}


def reach(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """How many pictures have a short side of at least 32, 64, ... pixels."""
    short = np.array([min(size) for size in sizes], dtype=np.int64)
    return {str(side): int((short >= side).sum()) for side in SIDES}


def kept_by_square_crop(sizes: Iterable[tuple[int, int]]) -> float:
    """The share of their area that pictures keep when a square is cut from their centre, on average."""
    shares = [min(size) / max(size) for size in sizes]
    return float(np.mean(shares)) if shares else 1.0
