"""The pictures of a run: found, split, framed, and cached as latents."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..autoencoder import downscale_factor
from ..data import (
    Framing,
    LatentFolder,
    Rows,
    Source,
    cached_latents,
    cached_masks,
    cached_pixels,
    find_source,
    frame,
    readable,
    split,
)
from ..data.config import DataConfig
from ..memory import memory_phase
from .base import base_resolution, with_base_classes
from .conditions import conditions_of
from .fine_tuning import held_out_share
from .latent_data import LatentData, Sized
from .processes import process_state
from .run_config import RunConfig
from .run_networks import Built


@dataclass(frozen=True)
class Examples:
    """What was found.

    Attributes:
        source: all of it, with the classes of the checkpoint that is fine-tuned.
        training, validation: its parts.
        data: the settings, with what cached latents or the checkpoint decide.
        autoencoder: folder or hub id of the one that is given; None: one is to be trained.
    """

    source: Source
    training: Source
    validation: Source
    data: DataConfig
    autoencoder: str | None


def find_examples(config: RunConfig, given_keys: Collection[str]) -> Examples:
    """Find and split the pictures.

    Raises:
        UserError: there are none, or they do not fit the checkpoint.
    """
    data, base = config.data, config.init_from
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


class Cache:
    """Cuts pictures as the network takes them, and caches them as latents.

    Args:
        config: of the run.
        examples: its pictures.
        vae: the autoencoder.
        built: what is trained on them.
    """

    def __init__(self, config: RunConfig, examples: Examples, vae: Any, built: Built) -> None:
        self._config, self._data, self._vae, self._built = config, examples.data, vae, built
        self._has_masks = examples.source.has_masks

    def framed(self, source: Source, *, crops: int | None = None) -> Framing:
        """How the pictures are cut; with another number of crops than the settings say, if given."""
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
        """The pictures as training data, computed where they are not cached."""
        seed = self._config.loop.seed
        conditions = conditions_of(
            framed.source, self._built.networks, seed, self._config.framing.mirror_captions
        )
        return LatentData(
            framed,
            [self._sized(framed, number) for number in range(len(framed.sizes))],
            conditions,
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
