"""The data of a run: find and split images, crop and cache them as latents, with each sample's condition."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..autoencoder import downscale_factor, has_statistics, load_autoencoder, measure_statistics
from ..autoencoder.latents import Autoencoder
from ..config import ControlConfig, DataConfig, FramingConfig, LoopConfig
from ..data import (
    Cropping,
    LazyTable,
    Source,
    cached_latents,
    cached_masks,
    cached_pixels,
    cached_text,
    crop,
    find_source,
    pixels_to_images,
    readable,
    split,
)
from ..data.cache.store import digests
from ..data.cache.tensors import Encoding, LatentTable, latent_transform
from ..data.control import cached_layouts, control_images, with_control_checked
from ..data.dataset import NO_CLASS
from ..data.labels import read_label_file
from ..data.sources.kinds import is_latent_folder
from ..errors import UserError, check_resolution, few, lookup
from ..families import FlowModel
from ..utils.files import check_types, read_settings, read_yaml
from ..utils.memory import memory_phase
from ..utils.names import composed
from .fine_tune.base import base_classes, base_labels, base_resolution, with_base_classes
from .fine_tune.defaults import held_out_share
from .loop.data_order import Stream, seeded
from .loop.distributed import process_state
from .loop.random_numbers import RANDOM_NUMBERS
from .losses.latent_data import BucketData, Conditions, LatentData, is_flipped, rows_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSplits:
    """The images of a run.

    Attributes:
        source: all of them, with the classes of the checkpoint that is fine-tuned.
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


def load_data(
    data: DataConfig,
    given_keys: Collection[str],
    *,
    seed: int,
    vae: str | None = None,
    checkpoint: str | None = None,
    control: ControlConfig | None = None,
) -> DataSplits:
    """Find and split the images.

    Args:
        given_keys: keys of the settings that no default may change.
        seed: of the split.
        vae: the autoencoder that is given.
        checkpoint: the pipeline that a fine-tune starts from.
        control: the control images.

    Raises:
        UserError: there are none, or they do not fit the checkpoint; control images are missing or cannot be used.
    """
    if checkpoint:
        base_classes(checkpoint)  # refuses what is no checkpoint, before every image is looked at
    control = control or ControlConfig()
    source = readable(find_source(data.data, **data.wanted(), **control.wanted()))
    if control.control:
        labels = read_label_file(control.control_labels) if control.control_labels else source.labels
        source = with_control_checked(source, labels or base_labels(checkpoint))
    data, autoencoder = source.adopt(data), vae or checkpoint or source.autoencoder
    if checkpoint:
        source = with_base_classes(source, checkpoint)
        data = replace(data, validation=held_out_share(given_keys, data.validation, len(source)))
        if "resolution" not in given_keys and not source.precomputed:
            data = replace(data, resolution=base_resolution(checkpoint) or data.resolution)
    rows = split(source, data.validation, seed, stratify=data.stratify)
    training, validation = map(source.subset, rows)
    training = training.with_balanced_classes() if data.balance_classes else training
    return DataSplits(source, training, validation, data, autoencoder)


def as_begun(data: DataConfig, output: str | Path, given_keys: Collection[str]) -> DataConfig:
    """Return the settings with the colours and the split that the run in ``output`` was begun with, if none are given.

    Earlier versions did not convert colour profiles, and held images out whatever their classes. The config.yaml of
    their runs says nothing of either, and the runs go on as they were begun.

    Raises:
        UserError: the config.yaml there is no YAML.
    """
    begun = _begun(output)
    if begun is None:
        return data
    if "stratify" not in given_keys and isinstance(stratify := begun.get("stratify", False), bool):
        data = replace(data, stratify=stratify)
    if "colours" in given_keys or is_latent_folder(data.data):
        return data
    if "colours" not in begun:
        log.info(
            f"the run in {output} was begun before colour profiles were converted to sRGB: it goes on with the colours "
            "as they are stored"
        )
    colours = begun.get("colours", "stored")
    return replace(data, colours=colours) if colours in ("srgb", "stored") else data


def generator_as_begun(loop: LoopConfig, output: str | Path, given_keys: Collection[str]) -> LoopConfig:
    """Return the settings with the generator of noise and times that the run in ``output`` was begun with, if none is
    given. Earlier versions had another one, and their config.yaml does not name it.

    Raises:
        UserError: the config.yaml there is no YAML, or names no generator.
    """
    begun = _begun(output)
    if begun is None or "random_numbers" in given_keys:
        return loop
    name: Any = begun.get("random_numbers", "mersenne-twister")
    lookup(RANDOM_NUMBERS, name, "random_numbers")
    return replace(loop, random_numbers=name)


def _begun(output: str | Path) -> dict[str, Any] | None:
    """Return the settings that the run in a folder was begun with; None: no run was."""
    file = Path(output) / "config.yaml"
    begun = read_yaml(file, "Restore it, or use another folder.") if file.is_file() else None
    return begun if isinstance(begun, dict) else None


def refuse_renumbered_classes(pipeline: Path, source: Source) -> None:
    """Refuse to go on with a run whose ``pipeline`` has another id for a class that the data still have.

    Raises:
        UserError: it has. ``--allow-changes`` is no remedy: every image would be trained under another class.
    """
    file = pipeline / "model_index.json"
    if source.kind != "class" or not file.is_file():
        return
    index = read_settings(file)
    check_types(file, index, {"id2label": dict[str, str] | None})
    numbers = {
        composed(name): int(number)
        for number, name in (index.get("id2label") or {}).items()
        if number.isdecimal()
    }
    moved = [
        f"'{name}' was {numbers[composed(name)]}, is {number}"
        for number, name in enumerate(source.classes)
        if numbers.get(composed(name), number) != number
    ]
    if moved:
        raise UserError(
            f"the classes of {pipeline} have other numbers than those of {source.name}: {few(moved)}",
            f"Use another output folder; there, --init-from {pipeline} keeps what was learnt, class by class.",
        )


def given_autoencoder(
    checkpoint: str, training: Source, data: DataConfig, *, measured: bool = True
) -> Autoencoder:
    """Load an autoencoder, frozen. If it has no per-channel statistics, they are measured on the training images.

    Args:
        measured: False: for a plan, which needs no statistics; or to keep the scaling that its config has.

    Raises:
        UserError: the resolution is not divisible by its downscale factor; the nearest valid one is named.
    """
    vae = load_autoencoder(checkpoint).requires_grad_(False)
    check_resolution(data.resolution, downscale_factor(vae))
    if measured and not has_statistics(vae):
        log.info("autoencoder: measuring its latent statistics on the data")
        rows = torch.linspace(0, len(training) - 1, min(len(training), 512)).long().tolist()
        pixels = cached_pixels(training.subset(rows), data.resolution, data.background)[:]
        measure_statistics(vae, pixels_to_images(pixels).split(16))
    return vae


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Crops images as the network takes them, and caches them as latents.

    Attributes:
        data: the settings, with the resolution that counts. framing: how images are cut.
        model: the flow model that is trained on the latents. trains_text: with its text encoder.
        has_masks, needs_pixels: masks and pixels are cached as well.
        seed: of the crops, and of the caption that is drawn.
        encode_batch: images that are encoded at once.
    """

    data: DataConfig
    framing: FramingConfig
    model: FlowModel
    trains_text: bool
    has_masks: bool
    needs_pixels: bool
    seed: int
    encode_batch: int = 64

    @property
    def _own_encoding(self) -> Encoding | None:
        """The encoding of a family whose latents are not plainly those of its autoencoder."""
        kind = type(self.model)
        plain = kind.posterior is FlowModel.posterior
        return None if plain else Encoding(f"{kind.__name__}.posterior", self.model.posterior)

    def framed(self, source: Source, *, crops: int | None = None) -> Cropping:
        """Return how the images are cut; with another number of crops than the settings say, if given."""
        return crop(
            source,
            config=self.framing if crops is None else replace(self.framing, crops=crops),
            resolution=self.data.resolution,
            unit=self.model.size_multiple,
            size_conditioning=self.model.takes_sizes,
        )

    def latents(
        self, framed: Cropping, conditions: Conditions | None = None, *, sampled: bool = True
    ) -> LatentData:
        """Return the images as training data, computed where they are not cached.

        Args:
            conditions: what goes with them; default: `conditions_of` the model.
            sampled: each use draws a sample of the autoencoder's posterior; else it is the mode.
        """
        buckets = [self._sized(framed.part(number), size) for number, size in enumerate(framed.sizes)]
        if not sampled:
            buckets = [replace(bucket, table=replace(bucket.table, std=None)) for bucket in buckets]
        return LatentData(
            framed,
            buckets,
            conditions
            or conditions_of(
                framed.source,
                self.seed,
                self.model.pipeline.tokenizer,
                None if self.trains_text else self.model.pipeline.text_encoder,
                mirror=self.framing.mirror_captions,
            ),
            flips=self.data.random_flip,
            size_conditioning=self.model.takes_sizes,
            seed=self.seed,
        )

    def missing(self, framed: Cropping, *, scaled: bool) -> int:
        """Return how many latents of the images are not cached; each crop and each mirror image has one.

        Args:
            scaled: the model's autoencoder is the one that will encode. None are cached of one that is still to be
                trained, or to be measured.
        """
        if not scaled:
            return len(framed.source) * framed.crops * (1 + self.data.random_flip)
        count = 0
        for number, size in enumerate(framed.sizes):
            part, flips = framed.part(number), self.data.random_flip
            transform = latent_transform(
                size, self.data.background, self.model.vae, flips, 64, "cpu", self._own_encoding
            )
            keys = digests({*part.pixel_keys()})
            count += int((part.shards("latents", transform.settings).find(keys)[:, 0] < 0).sum())
        return count * (1 + self.data.random_flip)

    def _sized(self, part: Source, size: tuple[int, int]) -> BucketData:
        control: LatentTable | None = None
        views: dict[str, Tensor | LazyTable] = {}
        if self.needs_pixels:
            views["pixels"] = cached_pixels(part, size, self.data.background)
        if self.has_masks:
            own = cached_masks(part, size)
            views |= {"masks": own.masks, "has_mask": own.has_mask}
        if "labels" in part.control:
            views["layout"] = cached_layouts(part, size)
        state = process_state()
        with memory_phase("encode"), state.main_process_first():
            latents = partial(
                cached_latents,
                vae=self.model.vae,
                resolution=size,
                own_encoding=self._own_encoding,
                batch_size=self.encode_batch,
                background=self.data.background,
                flips=self.data.random_flip,
                device=state.device,
                progress=state.is_main_process,
            )
            table = latents(part)
            if "image" in part.control:
                control = latents(control_images(part))
        return BucketData(table, views, control)


def shown_by(source: Source, rows: list[int], model: FlowModel) -> list[str]:
    """Return what the images at ``rows`` show, for `FlowModel.call_arguments`: their captions or classes.

    Of data without them, the empty caption, or the model's classes in turn.
    """
    if source.kind == "text":
        return [(source.examples[row].captions or ("",))[0] for row in rows]
    if source.kind == "class":
        class_ids = source.class_ids()  # of an image without a class any will do
        return [source.classes[max(class_ids[row], 0)] for row in rows]
    names = ("",) if model.takes_text else model.classes or ("",)
    return [names[index % len(names)] for index in range(len(rows))]


def conditions_of(
    source: Source,
    seed: int,
    tokenizer: Any = None,
    text_encoder: Any = None,
    *,
    mirror: bool = False,
) -> Conditions:
    """Return what a flow loss makes its condition of, for rows of ``source``.

    Classes become ids, captions cached embeddings of ``text_encoder``, which is frozen, or without it token ids. Images
    without a class or a caption are ``unlabelled``: they get the null, as an empty prompt does. If an image has several
    captions, each use of it gets one of them, by ``seed`` and sample id; with ``mirror`` the captions of mirrored
    images say left for right.
    """
    if source.kind == "class":
        ids = torch.as_tensor(source.class_ids())
        without = ids == NO_CLASS
        given = {"class_labels": ids.clamp(min=0)}
        return rows_of(given | {"unlabelled": without} if bool(without.any()) else given)
    if source.kind != "text":
        return rows_of({})
    captions = Captions(source, seed, mirror)

    def unlabelled(places: list[int]) -> dict[str, Tensor]:
        empty = torch.tensor([not captions[place].strip() for place in places])
        return {"unlabelled": empty} if bool(empty.any()) else {}

    if text_encoder is not None:
        table = cached_text(captions, tokenizer, text_encoder)

        def embeddings(rows: list[int], sample_ids: list[int]) -> dict[str, Tensor]:
            text, mask = table.batch(places := captions.choose(rows, sample_ids))
            return {"text": text, "text_mask": mask, **unlabelled(places)}

        return embeddings

    def tokens(rows: list[int], sample_ids: list[int]) -> dict[str, Tensor]:
        places = captions.choose(rows, sample_ids)
        texts = [captions[place] for place in places]
        limit = tokenizer.model_max_length
        made = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        found = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        return found | unlabelled(places)

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
            return [self[index] for index in range(len(self))[place]]
        row = int(np.searchsorted(self._ends, place, side="right"))
        captions = self._with_mirrored(self._source.examples[row].captions or ("",))
        return captions[int(place - self._ends[row])]

    def __iter__(self) -> Iterator[str]:
        return (text for captions in self._source.all_captions() for text in self._with_mirrored(captions))

    def _with_mirrored(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        return (*captions, *map(mirrored, captions)) if self._mirror else captions

    def choose(self, rows: list[int], sample_ids: list[int]) -> list[int]:
        """Return the place of one caption of each of the images at ``rows``, as the sample ids decide."""
        return [self._choose(row, sample_id) for row, sample_id in zip(rows, sample_ids, strict=True)]

    def _choose(self, row: int, sample_id: int) -> int:
        start = int(self._ends[row - 1]) if row else 0
        count = (int(self._ends[row]) - start) // (1 + self._mirror)
        if self._mirror and is_flipped(sample_id):
            start += count
        if count == 1:
            return start
        return start + int(torch.randint(count, (), generator=seeded(self._seed, Stream.CAPTIONS, sample_id)))


def mirrored(caption: str) -> str:
    """Return the caption of the mirror image: the words left and right change places and keep their case."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = "right" if word.lower() == "left" else "left"
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return re.sub(r"\b(left|right)\b", other, caption, flags=re.IGNORECASE)
