"""Masked images as a network sees them: the kept pixels, and the latent of the image without the masked ones.

A mask is (B, 1, H, W): 1 = repaint, 0 = keep. No pixel under a mask has any influence on what these functions return.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .latents import Autoencoder, downscale_factor, encode, latent_channels


def mask_channels(vae: Autoencoder) -> int:
    """Channels of `masked_condition`: one for each pixel of a latent cell, and those of the latent."""
    return downscale_factor(vae) ** 2 + latent_channels(vae)


def masked_condition(vae: Autoencoder, images: Tensor, masks: Tensor) -> Tensor:
    """Return the condition of a network trained to inpaint: the mask, and the latent of the masked image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        masks: (B, 1, H, W) in {0, 1}; H and W are multiples of the downscale factor f.

    Returns:
        (B, f^2 + C, H / f, W / f): first the pixels of each cell that are kept (1) or not (0), at the full
        resolution of the mask; then the latent of the image with its hole in mid-grey. A row of which nothing
        is kept is zero, as is the condition of plain generation: so one network generates and inpaints.
    """
    kept = 1.0 - masks.float()
    mask = F.pixel_unshuffle(kept, downscale_factor(vae))
    latent = mask.new_zeros(len(mask), latent_channels(vae), *mask.shape[2:])
    some = kept.flatten(1).any(1).nonzero()[:, 0]  # the others need no encoding
    if len(some):
        latent[some] = encode(vae, images[some].float() * kept[some]).to(latent)
    return torch.cat([mask, latent], 1)


def latent_mask(masks: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) -> (B, 1, H / factor, W / factor): a cell is repainted if any of its pixels is."""
    return F.max_pool2d(masks.float(), factor)


def masked_source(noise: Tensor, known: Tensor, hole: Tensor) -> Tensor:
    """Return the start of a flow that only fills the hole: the known latents, with noise in the hole.

    The data-dependent coupling of Albergo et al. 2023 (arXiv:2310.03725), section 3.2. Training and sampling both start
    here.

    Args:
        noise, known: (B, C, h, w).
        hole: (B, 1, h, w), above 0 = repaint.
    """
    return torch.where(hole > 0, noise, known)


def masked_latents(vae: Autoencoder, images: Tensor, masks: Tensor) -> Tensor:
    """Encode images whose holes are filled from the nearest kept pixel: latents (B, C, h, w).

    An autoencoder looks around each cell: next to such a filling the kept cells stay close to what they would be
    beside the true content, closer than next to a grey hole. Arguments as in `masked_condition`.
    """
    return encode(vae, filled(images, masks))


def filled(images: Tensor, masks: Tensor) -> Tensor:
    """Return images (B, 3, H, W) with each masked pixel replaced by the kept pixel nearest to it; grey if none is
    kept. Arguments as in `masked_condition`."""
    return torch.stack([_filled(image, mask) for image, mask in zip(images, masks, strict=True)])


def _filled(image: Tensor, mask: Tensor) -> Tensor:
    from scipy.ndimage import distance_transform_edt  # scipy is slow to import

    hole = (mask[0] > 0).cpu().numpy()
    if hole.all():
        return torch.zeros_like(image)
    rows, columns = distance_transform_edt(hole, return_distances=False, return_indices=True).astype(np.int64)
    return image[:, torch.from_numpy(rows).to(image.device), torch.from_numpy(columns).to(image.device)]
