"""Sampling images for the rows of a request, each from a seed of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..utils.arguments import whole

if TYPE_CHECKING:
    from PIL.Image import Image


#: What one image shows, as keywords of a pipeline's call.
Condition = dict[str, Any]


def conditions(
    pipe: Any,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    negative: str | None = None,
    *,
    optional: bool = False,
) -> list[Condition]:
    """One row for each prompt or class.

    Args:
        classes: names, or numbers written out.
        negative: what to keep away from, the same for every prompt.
        optional: where nothing is given, a checkpoint of captions takes the empty one.

    Raises:
        UserError: the checkpoint does not take these; what it takes is said in flags.
    """
    if prompts and classes:
        raise UserError("a prompt and --class are both given", "Give one of them.")
    if prompts and not pipe.takes_text:
        raise UserError(f"this checkpoint takes no prompt such as '{prompts[0]}'", _instead(pipe))
    if classes and not pipe.takes_classes:
        raise UserError("this checkpoint takes no --class", _instead(pipe))
    if optional and pipe.takes_text and not prompts and not classes:
        prompts = ("",)
    if not prompts and not classes and (pipe.takes_text or pipe.takes_classes):
        raise UserError("nothing says what to draw", _instead(pipe))
    if prompts:
        extra: Condition = {} if negative is None else {"negative_prompt": negative}
        return [{"prompt": prompt} | extra for prompt in prompts]
    ids = pipe.class_ids([_number_or_name(pipe, name) for name in classes]) if classes else []
    return [{"class_labels": number} for number in ids] or [{}]


def tell_unknown_words(pipe: Any, *texts: str | None) -> None:
    """Say once on stderr, before anything is drawn, which words the checkpoint does not know."""
    from ..models.text import UnknownWords
    from ..pipeline.conditioning import unknown_words_text

    if words := pipe.unknown_words([text for text in texts if text]):
        print(f"Warning: {unknown_words_text(words)}.", file=sys.stderr)
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again


def _instead(pipe: Any) -> str:
    """What this checkpoint takes, in flags."""
    if pipe.takes_text:
        return 'It takes a prompt, such as "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {', '.join(pipe.labels) or 'a number'}"
    return "It draws without being told what: leave it out."


def _number_or_name(pipe: Any, text: str) -> int | str:
    return int(text) if text.isdecimal() and text not in pipe.labels else text


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
    from ..utils.memory import require_memory

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
    whole("--seed", seed, 0, LARGEST_SEED - len(rows) + 1)  # of the last image too
    images: list[Image] = []
    for start in range(0, len(rows), BATCH):
        images += _draw_batch(pipe, rows[start : start + BATCH], seed + start, settings)
    return images


def _draw_batch(pipe: Any, rows: list[Condition], seed: int, settings: dict[str, Any]) -> list[Image]:
    from ..utils.memory import memory_phase

    condition: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if not condition:
        condition = {"num_images_per_prompt": len(rows)}
    with memory_phase("draw"):
        images: list[Image] = pipe(**condition, generator=generators(seed, len(rows)), **settings).images
    return images
