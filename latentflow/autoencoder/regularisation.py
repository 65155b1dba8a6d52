"""Regularisation that makes latents easier to model: transformed alike with their image, and noisy when decoded."""

from __future__ import annotations

import math
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor


def transformed(x: Tensor, scale: Fraction, quarter_turns: int) -> Tensor:
    """Scale down and turn images or latents (B, C, H, W): the tau of EQ-VAE (arXiv:2502.09509).

    Both sides times ``scale`` must be whole. Bilinear as in the paper, without a filter before it.
    """
    size = [int(side * scale) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear").rot90(quarter_turns, (2, 3))


def scales(height: int, width: int, smallest: int = 1) -> list[Fraction]:
    """List the factors from 1/4 to below 1 that leave whole sides of at least ``smallest``; [1] if there are none."""
    whole = math.gcd(height, width)
    factors = [Fraction(side, whole) for side in range(math.ceil(whole / 4), whole)]
    return [factor for factor in factors if factor * min(height, width) >= smallest] or [Fraction(1)]


def noisy(latents: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Add ``noise`` (B, C, h, w) of ``level`` (B,) times the standard deviation of its channel in this batch.

    Gradients go through the spread: latents cannot escape the noise by growing.
    """
    spread = latents.var((0, 2, 3), correction=0, keepdim=True).clamp_min(1e-12).sqrt()  # (1, C, 1, 1)
    return latents + level.view(-1, 1, 1, 1).to(latents) * spread * noise
