"""Drawing rows of conditions, each from a seed of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..arguments import whole
from .conditions import Condition

if TYPE_CHECKING:
    from PIL.Image import Image

# Images at a time. Each has a generator of its own, so this changes an image by rounding only: a network's matrix
# products round otherwise in a batch of another size, which is at most one level of 255.
BATCH = 16
LARGEST_SEED = 2**64 - 1


def check_room(count: int, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse more images, or larger ones, than the machine has memory for, before the first is drawn.

    Args:
        size: (height, width) of each, which is then enlarged ``scale`` times.

    Raises:
        UserError: says what would be needed.
    """
    from ..memory import require_memory

    height, width = (side * scale for side in size)
    bytes_of_pillow = 4 * count * height * width
    require_memory(f"{count} images of {width} x {height} pixels", bytes_of_pillow)


def generators(seed: int, count: int) -> list[Any]:
    """Generators of the seeds from ``seed`` on, on the CPU: the same seed is the same noise on every device.

    Raises:
        UserError: a seed is negative, or larger than torch takes.
    """
    import torch

    whole("--seed", seed, 0, LARGEST_SEED - count + 1)
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw(pipe: Any, rows: list[Condition], seed: int, **settings: Any) -> list[Image]:
    """Draw image i of ``rows[i]`` and from ``seed + i``, whatever else is drawn.

    In a batch of another size it differs by rounding, at most one level of 255.

    Args:
        settings: the rest of the pipeline's call.

    Raises:
        UserError: as the pipeline; a seed out of range.
    """
    whole("--seed", seed, 0, LARGEST_SEED - len(rows) + 1)  # of the last picture too
    pictures: list[Image] = []
    for start in range(0, len(rows), BATCH):
        pictures += _draw_batch(pipe, rows[start : start + BATCH], seed + start, settings)
    return pictures


def _draw_batch(pipe: Any, rows: list[Condition], seed: int, settings: dict[str, Any]) -> list[Image]:
    from ..memory import memory_phase

    condition: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if not condition:
        condition = {"num_images_per_prompt": len(rows)}
    with memory_phase("draw"):
        pictures: list[Image] = pipe(**condition, generator=generators(seed, len(rows)), **settings).images
    return pictures
