"""The pictures of a run as its network takes them: cut, and cached as latents."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...autoencoder import downscale_factor
from ...autoencoder.latents import Autoencoder
from ...data import Framing, Rows, Source, cached_latents, cached_masks, cached_pixels, frame
from ...memory import memory_phase
from ..loop.processes import process_state
from ..stages.latent_data import LatentData, Sized
from .built import Built
from .conditions import conditions_of
from .config import RunConfig
from .examples import Examples


class LatentCache:
    """Cuts pictures as the network takes them, and caches them as latents.

    Args:
        config: of the run.
        examples: its pictures.
        vae: the autoencoder.
        built: what is trained on them.
    """

    def __init__(self, config: RunConfig, examples: Examples, vae: Autoencoder, built: Built) -> None:
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
