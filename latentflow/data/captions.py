"""Captions that are lists of tags, such as ``cat, sitting, outdoors``: the same image under other orders of
them."""

from __future__ import annotations

import dataclasses
import random

from ..errors import UserError
from .dataset import Example, Source


def with_tag_orders(source: Source, orders: int, keep: int) -> Source:
    """The source with captions in up to ``orders`` orders of their comma-separated tags, the first ``keep`` in place.

    The caption as it is written is the first of them; each use of the image draws one, as of several captions. The
    orders depend on the caption only.

    Raises:
        UserError: a number is out of range; the source has no captions, or none with tags to shuffle.
    """
    if orders < 0 or keep < 0 or orders == 1:
        raise UserError(
            f"--shuffle-tags {orders} --keep-tags {keep}",
            "Give the number of orders of each caption, from 2 on, and that of the tags that stay first, from 0 on.",
        )
    if orders == 0:
        if keep:
            raise UserError(f"--keep-tags {keep} without --shuffle-tags", "Add --shuffle-tags 8.")
        return source
    source.refuse_decided(f"--shuffle-tags {orders}")
    if source.kind != "text":
        raise UserError(f"--shuffle-tags {orders}: {source.name} has no captions", "Leave it out.")
    examples = tuple(_shuffled(example, orders, keep) for example in source.examples)
    changed = sum(len(one.texts) > len(old.texts) for one, old in zip(examples, source.examples, strict=True))
    if not changed:
        raise UserError(
            f"--shuffle-tags {orders}: no caption of {source.name} has tags to shuffle",
            "Tags are parted by commas: `cat, sitting, outdoors`. Or leave it out.",
        )
    kept = f", the first {keep} in place" if keep else ""
    note = f"tags of {changed} images in up to {orders} orders of each caption{kept}"
    return dataclasses.replace(source, examples=examples).noted(note)


def _shuffled(example: Example, orders: int, keep: int) -> Example:
    texts = [text for caption in example.captions for text in _orders(caption, orders, keep)]
    return dataclasses.replace(example, text=texts[0], texts=tuple(texts[1:]))


def _orders(caption: str, orders: int, keep: int) -> list[str]:
    """The caption, and others of its tags in another order: fewer than asked where there are not as many."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    rest, texts = tags[keep:], [caption]
    generator = random.Random(caption)  # the same in every process, which a hash of the text is not
    for _ in range(orders - 1):
        generator.shuffle(rest)
        text = ", ".join([*tags[:keep], *rest])
        if text != ", ".join(tags) and text not in texts:
            texts.append(text)
    return texts
