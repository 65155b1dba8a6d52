"""What goes with each sample as its condition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ...data import Source, cached_text
from ..loop.order import seeded
from ..stages.images import is_flipped
from ..stages.latent_data import Conditions, rows_of
from .start import Networks


def conditions_of(source: Source, networks: Networks, seed: int, mirror: bool = False) -> Conditions:
    """What `FlowStage` makes its condition of, for rows of ``source``.

    Classes become ids, captions token ids (for an encoder that is trained along) or cached embeddings (frozen). Of
    several captions each use of a picture draws one, by ``seed`` and its running number; with ``mirror`` those of
    mirrored pictures say left for right.
    """
    if source.kind == "class":
        return rows_of({"class_labels": torch.as_tensor(source.class_ids())})
    if source.kind != "text":
        return rows_of({})
    captions = Captions(source, seed, mirror)
    if not networks.trained_text:
        table = cached_text(captions, networks.tokenizer, networks.text_encoder)

        def embeddings(rows: list[int], numbers: list[int]) -> dict[str, Tensor]:
            text, mask = table.batch(captions.drawn(rows, numbers))
            return {"text": text, "text_mask": mask}

        return embeddings
    tokenizer = networks.tokenizer

    def tokens(rows: list[int], numbers: list[int]) -> dict[str, Tensor]:
        texts = [captions[place] for place in captions.drawn(rows, numbers)]
        limit = tokenizer.model_max_length
        made = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    return tokens


class Captions(Sequence[str]):
    """All captions of a source, one after the other: eight bytes for each picture, texts where they are asked for.

    With ``mirror`` those of each picture are followed by those of its mirror image.
    """

    def __init__(self, source: Source, seed: int = 0, mirror: bool = False) -> None:
        self._source, self._seed, self._mirror = source, seed, mirror
        counts = (len(captions) * (1 + mirror) for captions in source.all_captions())
        self._ends = np.fromiter(accumulate(counts), np.int64, len(source))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(len(self))[place]]
        row = int(np.searchsorted(self._ends, place, side="right"))
        captions = self._told(self._source.examples[row].captions or ("",))
        return captions[int(place - self._ends[row])]

    def __iter__(self) -> Iterator[str]:
        return (caption for captions in self._source.all_captions() for caption in self._told(captions))

    def _told(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """A picture's captions, and then those of its mirror image."""
        return (*captions, *map(mirrored, captions)) if self._mirror else captions

    def drawn(self, rows: list[int], numbers: list[int]) -> list[int]:
        """Places of one caption of each of the pictures at ``rows``, as the uses' running numbers decide."""
        return [self._drawn(row, number) for row, number in zip(rows, numbers, strict=True)]

    def _drawn(self, row: int, number: int) -> int:
        start = int(self._ends[row - 1]) if row else 0
        count = (int(self._ends[row]) - start) // (1 + self._mirror)
        if self._mirror and is_flipped(number):
            start += count
        if count == 1:
            return start
        return start + int(torch.randint(count, (), generator=seeded(self._seed, 3, number)))


def mirrored(caption: str) -> str:
    """The caption of the mirror image: the words left and right change places, in the case that they have."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return re.sub(r"\b(left|right)\b", other, caption, flags=re.IGNORECASE)
