"""The data of a run: found and split, cut and cached as latents, with each sample's condition."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ..autoencoder import downscale_factor
from ..autoencoder.latents import Autoencoder
from ..config import DataConfig, RunConfig
from ..data import (
    Framing,
    LatentFolder,
    Rows,
    Source,
    cached_latents,
    cached_masks,
    cached_pixels,
    cached_text,
    find_source,
    frame,
    readable,
    split,
)
from ..data.sources.latent_folder import is_latent_folder
from ..utils.files import read_yaml
from ..utils.memory import memory_phase
from .fine_tune.base import base_classes, base_resolution, with_base_classes
from .fine_tune.defaults import held_out_share
from .loop.data_order import seeded
from .loop.distributed import process_state
from .losses.latent_data import Conditions, LatentData, Sized, is_flipped, rows_of
from .networks import Networks
from .trained_model import Built


def conditions_of(source: Source, networks: Networks, seed: int, mirror: bool = False) -> Conditions:
    """What `FlowStage` makes its condition of, for rows of ``source``.

    Classes become ids, captions token ids (for an encoder that is trained along) or cached embeddings (frozen). Of
    several captions each use of an image draws one, by ``seed`` and its running number; with ``mirror`` those of
    mirrored images say left for right.
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
    """All captions of a source, one after the other: eight bytes for each image, texts where they are asked for.

    With ``mirror`` those of each image are followed by those of its mirror image.
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
        """An image's captions, and then those of its mirror image."""
        return (*captions, *map(mirrored, captions)) if self._mirror else captions

    def drawn(self, rows: list[int], numbers: list[int]) -> list[int]:
        """Places of one caption of each of the images at ``rows``, as the uses' running numbers decide."""
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


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """What was found.

    Attributes:
        source: all of it, with the classes of the checkpoint that is fine-tuned.
        training, validation: its parts.
        data: the settings with what cached latents or the checkpoint decide: here, not in the run's config, is the
            resolution that counts.
        autoencoder: folder or hub id of the one that is given; None: one is to be trained.
    """

    source: Source
    training: Source
    validation: Source
    data: DataConfig
    autoencoder: str | None


def find_examples(config: RunConfig, given_keys: Collection[str]) -> Examples:
    """Find and split the images.

    Raises:
        UserError: there are none, or they do not fit the checkpoint.
    """
    data, base = config.data, config.init_from
    if base:
        base_classes(base)  # refuses what is no checkpoint, before every image is looked at
    source = readable(find_source(data.data, **data.wanted()))
    autoencoder = config.vae or base
    if isinstance(source, LatentFolder):
        data, autoencoder = source.adopt(data), autoencoder or source.autoencoder
    if base:
        source = with_base_classes(source, base, config.output)
        data = replace(data, validation=held_out_share(given_keys, data.validation, len(source)))
        if "resolution" not in given_keys and not isinstance(source, LatentFolder):
            data = replace(data, resolution=base_resolution(base) or data.resolution)
    training, validation = (source.subset(rows) for rows in split(source, data.validation, config.loop.seed))
    return Examples(source, training, validation, data, autoencoder)


def as_begun(data: DataConfig, output: str | Path, given_keys: Collection[str]) -> DataConfig:
    """The settings with the colours that the run in ``output`` was begun with, where none are given.

    Runs from before colour profiles were converted say nothing of colours in their config.yaml: what they have learnt
    are the numbers as they are stored, and so they go on.

    Raises:
        UserError: the config.yaml there is no YAML.
    """
    file = Path(output) / "config.yaml"
    if "colours" in given_keys or is_latent_folder(data.data) or not file.is_file():
        return data
    begun = read_yaml(file, "Restore it, or use another folder.")
    if not isinstance(begun, dict):
        return data
    if "colours" not in begun:
        log.info(
            f"the run in {output} was begun before colour profiles were converted to sRGB: it goes on with the colours "
            "as they are stored"
        )
    colours = begun.get("colours", "stored")
    return replace(data, colours=colours) if colours in ("srgb", "stored") else data


class LatentCache:
    """Cuts images as the network takes them, and caches them as latents.

    Args:
        config: of the run.
        examples: its images.
        vae: the autoencoder.
        built: what is trained on them.
    """

    def __init__(self, config: RunConfig, examples: Examples, vae: Autoencoder, built: Built) -> None:
        self._config, self._data, self._vae, self._built = config, examples.data, vae, built
        self._has_masks = examples.source.has_masks

    def framed(self, source: Source, *, crops: int | None = None) -> Framing:
        """How the images are cut; with another number of crops than the settings say, if given."""
        framing = self._config.framing
        patch = self._built.networks.network.config.get("patch_size", 1)
        return frame(
            source,
            config=framing if crops is None else replace(framing, crops=crops),
            resolution=self._data.resolution,
            unit=downscale_factor(self._vae) * patch,
            told=self._built.told,
        )

    def latents(self, framed: Framing) -> LatentData:
        """The images as training data, computed where they are not cached."""
        seed = self._config.loop.seed
        return LatentData(
            framed,
            [self._sized(framed, number) for number in range(len(framed.sizes))],
            conditions_of(framed.source, self._built.networks, seed, self._config.framing.mirror_captions),
            flips=self._data.random_flip,
            told=self._built.told,
            seed=seed,
        )

    def _sized(self, framed: Framing, number: int) -> Sized:
        part, size, data = framed.part(number), framed.sizes[number], self._data
        views: dict[str, Tensor | Rows] = {}
        if self._built.stage.needs_pixels:
            views["pixels"] = cached_pixels(part, size, data.background)
        if self._has_masks:
            own = cached_masks(part, size)
            views |= {"masks": own.masks, "has_mask": own.has_mask}
        with memory_phase("encode"), process_state().main_process_first():
            table = cached_latents(
                part,
                self._vae,
                size,
                background=data.background,
                flips=data.random_flip,
                device=process_state().device,
                progress=process_state().is_main_process,
            )
        return Sized(table, views)
