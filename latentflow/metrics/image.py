"""Similarity of reconstructions and their originals, and of edge maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIDE = 11  # pixels of the window


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (B,); infinite for an exact copy.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        originals: same shape.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = zip(_unit(images), _unit(originals), strict=True)
    return torch.stack(
        [peak_signal_noise_ratio(image, original, data_range=1.0) for image, original in pairs]
    )


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the structural similarity of each image, (B,), at most 1 (Wang et al. 2004, 11-pixel Gaussian window).

    Args:
        images: (B, 3, H, W) in [-1, 1], at least 11 pixels a side.
        originals: same shape.

    Raises:
        ValueError: the images are smaller than the window.
    """
    if min(images.shape[2:]) < SSIM_SIDE:
        raise ValueError(f"images of {tuple(images.shape[2:])} are smaller than the {SSIM_SIDE}-pixel window")
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        _unit(images), _unit(originals), data_range=1.0, reduction="none"
    )
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def edge_agreement(found: Tensor, asked: Tensor) -> Tensor:
    """Return the F1 of the edges of each image with those that are asked for, (B,) in [0, 1], at a pixel's tolerance.

    Precision is the share of the edges found that have one asked for among the nine pixels around them, recall the
    share of those asked for that have one found there. Where neither has any, F1 is 1.

    Args:
        found: (B, H, W) bool, True on an edge.
        asked: same shape.
    """

    def near(edges: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        around = F.max_pool2d(others[:, None].double(), 3, stride=1, padding=1)[:, 0]
        return (edges * around).sum((1, 2)), edges.sum((1, 2))

    (right, drawn), (covered, wanted) = near(found, asked), near(asked, found)
    precision, recall = right / drawn.clamp(min=1), covered / wanted.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where(drawn + wanted == 0, 1.0, score)


def _unit(images: Tensor) -> Tensor:
    return (images.detach().float().clamp(-1, 1) + 1) / 2
