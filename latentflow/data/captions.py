"""Captions that are lists of tags, such as ``cat, sitting, outdoors``, in other orders of their tags."""

from __future__ import annotations

import dataclasses
import random

from ..errors import UserError
from .dataset import Example, Source


def with_tag_orders(source: Source, orders: int, keep: int) -> Source:
    """Return the source with captions in up to ``orders`` orders of their comma-separated tags.

    The first ``keep`` tags stay in place. The caption as it is written comes first; each use of the image
    draws one, as of several captions. The orders depend on the caption only.

    Raises:
        UserError: a number is out of range; the source has no captions, or none with tags to shuffle.
    """
    if orders < 0 or keep < 0 or orders == 1:
        raise UserError(
            f"--shuffle-tags {orders} --keep-tags {keep}",
            "Give the number of orders of each caption, at least 2, and that of the tags that stay first, at least 0.",
        )
    if orders == 0:
        if keep:
            raise UserError(f"--keep-tags {keep} without --shuffle-tags", "Add --shuffle-tags 8.")
        return source
    source.refuse_decided(f"--shuffle-tags {orders}")
    if source.kind != "text":
        raise UserError(f"--shuffle-tags {orders}: {source.name} has no captions", "Leave it out.")
    examples = tuple(_shuffled(example, orders, keep) for example in source.examples)
    changed = sum(len(new.texts) > len(old.texts) for new, old in zip(examples, source.examples, strict=True))
    if not changed:
        raise UserError(
            f"--shuffle-tags {orders}: no caption of {source.name} has tags to shuffle",
            "Tags are separated by commas: `cat, sitting, outdoors`. Or leave it out.",
        )
    kept = f", the first {keep} in place" if keep else ""
    note = f"tags of {changed} images in up to {orders} orders of each caption{kept}"
    return dataclasses.replace(source, examples=examples).noted(note)


def _shuffled(example: Example, orders: int, keep: int) -> Example:
    texts = [text for caption in example.captions for text in _orders(caption, orders, keep)]
    return dataclasses.replace(example, text=texts[0], texts=tuple(texts[1:]))


def _orders(caption: str, orders: int, keep: int) -> list[str]:
    """Return the caption and other orders of its tags; fewer than ``orders`` where there are not as many."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    rest, texts = tags[keep:], [caption]
    generator = random.Random(caption)  # the same in every process, which a hash of the text is not
    for _ in range(orders - 1):
        generator.shuffle(rest)
        text = ", ".join([*tags[:keep], *rest])
        if text != ", ".join(tags) and text not in texts:
            texts.append(text)
    return texts
