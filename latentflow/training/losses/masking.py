"""Hiding a part of each training image, for a network that learns to inpaint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...autoencoder import Autoencoder, masked_condition
from ...data import pixels_to_images
from ...data.masks import DEFAULT_SHAPES, OWN, check_shapes, random_masks
from ..loop.data_order import Stream


class Masking:
    """Draw a mask for every sample and hide what is under it.

    The mask is a pure function of the seed and the sample's id.

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
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Return `masked_condition` (B, f^2 + C, h, w): which pixels are kept, and the latents with holes in grey.

        The batch holds ``pixels`` (B, 3, H, W) uint8, ``sample_ids``, and perhaps ``masks`` (B, 1, H, W) with
        ``has_mask`` (B,).
        """
        pixels = batch["pixels"]
        self._vae.to(pixels.device)
        generators = [
            np.random.default_rng([self._seed, Stream.MASKS, number]) for number in batch["sample_ids"]
        ]
        own = torch.tensor([rng.uniform() < self._own for rng in generators])
        masks = random_masks(self._shapes, (pixels.shape[2], pixels.shape[3]), generators).to(pixels.device)
        if "masks" in batch:
            rows = own.to(pixels.device) & batch["has_mask"]
            masks = torch.where(rows[:, None, None, None], (batch["masks"] > 127).to(masks), masks)
        return masked_condition(self._vae, pixels_to_images(pixels), masks)
