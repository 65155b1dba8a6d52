"""Hiding a part of each training image, for a network that learns to inpaint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...autoencoder import Autoencoder, downscale_factor, latent_channels, latent_mask, masked_condition
from ...data import pixels_to_images
from ...data.masks import DEFAULT_SHAPES, OWN, check_shapes, random_masks


class Masked(NamedTuple):
    """A batch with holes.

    Attributes:
        channels: (B, f^2 + C, h, w), what the network is told (`masked_condition`).
        known: (B, C, h, w), the latents of the images with their holes in grey: the last C of the channels.
        hole: (B, 1, h, w) in {0, 1}; 1 = a cell with pixels to repaint.
    """

    channels: Tensor
    known: Tensor
    hole: Tensor


class Masking:
    """Draws a mask for every sample and hides what is under it.

    Which mask is a pure function of the seed and the sample's running number.

    Args:
        vae: the frozen autoencoder.
        shapes: share of each of ``MASK_SHAPES``; "data" is the image's own mask, where it has one.
        seed: of the run.
    """

    def __init__(self, vae: Autoencoder, shapes: Mapping[str, float], seed: int) -> None:
        check_shapes(shapes, more=[OWN])
        self._vae, self._seed = vae, seed
        self._own = shapes.get(OWN, 0.0) / sum(shapes.values())
        drawn = {name: share for name, share in shapes.items() if name != OWN and share > 0}
        self._shapes = drawn or dict(DEFAULT_SHAPES)

    def __deepcopy__(self, memo: object) -> Masking:
        return self  # a sharded copy of the network shares the autoencoder, which is frozen

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Masked:
        """Of ``pixels`` (B, 3, H, W) uint8, ``numbers``, and perhaps ``masks`` (B, 1, H, W) with ``has_mask`` (B,)."""
        pixels = batch["pixels"]
        self._vae.to(pixels.device)
        generators = [np.random.default_rng([self._seed, 3, number]) for number in batch["numbers"]]
        own = torch.tensor([rng.uniform() < self._own for rng in generators])
        masks = random_masks(self._shapes, (pixels.shape[2], pixels.shape[3]), generators).to(pixels.device)
        if "masks" in batch:
            rows = own.to(pixels.device) & batch["has_mask"]
            masks = torch.where(rows[:, None, None, None], (batch["masks"] > 127).to(masks), masks)
        channels = masked_condition(self._vae, pixels_to_images(pixels), masks)
        known = channels[:, -latent_channels(self._vae) :]
        return Masked(channels, known, latent_mask(masks, downscale_factor(self._vae)))
