"""Sampling images for prompts or classes, each image with a seed of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError, whole

if TYPE_CHECKING:
    from PIL.Image import Image


#: Condition of one image, as keywords of a pipeline's call.
Condition = dict[str, Any]


def conditions(
    pipe: Any,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    negative: str | None = None,
    *,
    optional: bool = False,
) -> list[Condition]:
    """Return one condition for each prompt or class.

    Args:
        classes: names, or numbers written out.
        negative: negative prompt, the same for every prompt.
        optional: use the empty prompt where nothing is given and the checkpoint takes prompts.

    Raises:
        UserError: the checkpoint does not take these; the message names the flags that it takes.
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
        raise UserError(f"a {'prompt' if pipe.takes_text else 'class'} is needed", _instead(pipe))
    if prompts:
        extra: Condition = {} if negative is None else {"negative_prompt": negative}
        return [{"prompt": prompt} | extra for prompt in prompts]
    ids = pipe.class_ids([_number_or_name(pipe, name) for name in classes]) if classes else []
    return [{"class_labels": number} for number in ids] or [{}]


def warn_unknown_words(pipe: Any, *texts: str | None) -> None:
    """Print once, on stderr, the words that the checkpoint's vocabulary lacks."""
    from ..models.text import UnknownWords
    from ..pipeline.sampling import unknown_words_text

    if words := pipe.unknown_words([text for text in texts if text]):
        print(f"Warning: {unknown_words_text(words)}.", file=sys.stderr)
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again


def _instead(pipe: Any) -> str:
    """Return what this checkpoint takes, as flags."""
    if pipe.takes_text:
        return 'It takes a prompt, such as "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {', '.join(pipe.labels) or 'a number'}"
    return "It is unconditional: leave it out."


def _number_or_name(pipe: Any, text: str) -> int | str:
    return int(text) if text.isdecimal() and text not in pipe.labels else text


# Images per call of the pipeline. Each has its own generator, so the batch size changes an image by rounding only:
# matrix products round differently in a batch of another size, by at most one level of 255.
BATCH = 16
LARGEST_SEED = 2**64 - 1


def check_memory(count: int, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse more images, or larger ones, than fit into the machine's memory.

    Args:
        size: (height, width) of each image, which is then enlarged ``scale`` times.

    Raises:
        UserError: says how much memory would be needed.
    """
    from ..utils.memory import require_memory

    height, width = (side * scale for side in size)
    bytes_of_pillow = 4 * count * height * width
    require_memory(f"{count} images of {width} x {height} pixels", bytes_of_pillow)


def generators(seed: int, count: int) -> list[Any]:
    """Return generators for ``seed``, ``seed + 1``, ..., on the CPU: a seed gives the same noise on every device.

    Raises:
        UserError: a seed is negative, or larger than torch takes.
    """
    import torch

    whole("--seed", seed, 0, LARGEST_SEED - count + 1)
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def sample_images(pipe: Any, rows: list[Condition], seed: int, **settings: Any) -> list[Image]:
    """Sample one image for each row; image i uses ``seed + i``, whatever else is sampled with it.

    In a batch of another size it differs by rounding, at most one level of 255.

    Args:
        settings: further arguments of the pipeline's call.

    Raises:
        UserError: a seed is out of range, or the pipeline refuses its arguments.
    """
    from ..utils.memory import memory_phase

    whole("--seed", seed, 0, LARGEST_SEED - len(rows) + 1)  # so that the last image's seed is in range too
    images: list[Image] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        condition: dict[str, Any] = {name: [row[name] for row in batch] for name in batch[0]}
        if not condition:
            condition = {"num_images_per_prompt": len(batch)}
        with memory_phase("draw"):
            images += pipe(**condition, generator=generators(seed + start, len(batch)), **settings).images
    return images
