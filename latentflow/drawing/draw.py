"""Drawing rows of conditions, each from a seed of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .conditions import Condition

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16  # pictures at a time; each has a generator of its own, so this changes no picture


def draw(pipe: Any, rows: list[Condition], seed: int, **settings: Any) -> list[Image]:
    """Picture i shows ``rows[i]`` and is drawn from ``seed + i``, whatever else is drawn.

    Args:
        settings: the rest of the pipeline's call.
    """
    pictures: list[Image] = []
    for start in range(0, len(rows), BATCH):
        pictures += _draw_batch(pipe, rows[start : start + BATCH], seed + start, settings)
    return pictures


def _draw_batch(pipe: Any, rows: list[Condition], seed: int, settings: dict[str, Any]) -> list[Image]:
    import torch

    from ..memory import memory_phase

    # One generator per picture, on the CPU: the same seed is the same picture on every device, in any batch.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    condition: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if not condition:
        condition = {"num_images_per_prompt": len(rows)}
    with memory_phase("draw"):
        pictures: list[Image] = pipe(**condition, generator=generators, **settings).images
    return pictures
