"""Regularisation that makes latents easier to model: transformed alike with their image, and noisy when decoded."""

from __future__ import annotations

import math
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor


def transformed(x: Tensor, scale: Fraction, quarter_turns: int) -> Tensor:
    """Images or latents (B, C, H, W), made smaller by ``scale`` and turned: the tau of EQ-VAE (arXiv:2502.09509).

    Both sides times ``scale`` must be whole. As there, bilinear, without a filter before it.
    """
    size = [int(side * scale) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear").rot90(quarter_turns, (2, 3))


def scales(height: int, width: int, smallest: int = 1) -> list[Fraction]:
    """The factors from 1/4 to below 1 that leave latents whole sides of at least ``smallest``; 1 if there are none."""
    whole = math.gcd(height, width)
    factors = [Fraction(side, whole) for side in range(math.ceil(whole / 4), whole)]
    return [factor for factor in factors if factor * min(height, width) >= smallest] or [Fraction(1)]


def noisy(latents: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, C, h, w) with ``noise`` (B, C, h, w) of ``level`` (B,) times the spread of its channel here.

    Gradients go through the spread: latents cannot escape the noise by growing.
    """
    spread = latents.var((0, 2, 3), correction=0, keepdim=True).clamp_min(1e-12).sqrt()  # (1, C, 1, 1)
    return latents + level.view(-1, 1, 1, 1).to(latents) * spread * noise
