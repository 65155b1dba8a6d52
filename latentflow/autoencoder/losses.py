"""Losses of autoencoder training beside L1: LPIPS or a distance of features, a PatchGAN with the hinge loss;
regularisation of the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..utils.libraries import missing

#: Smallest side in pixels that LPIPS (VGG halves it four times) and the discriminator (three times) can take.
SMALLEST_IMAGE = 16


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches as real (high) or reconstructed (low): Isola et al. 2017 (arXiv:1611.07004).

    Images (B, 3, H, W) -> (B, 1, H / 8 or so, W / 8 or so).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss of scores of any shape; scalar. Lim and Ye 2017 (arXiv:1705.02894), eq. 6."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Return the factor that gives both losses gradients of one size at the last layer; scalar, at most 1e4.

    Esser et al. 2021 (arXiv:2012.09841), eq. 7.
    """
    wanted = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0].norm()
    given = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0].norm()
    weight: Tensor = (wanted / (given + 1e-6)).clamp(0, 1e4)
    return weight.detach()


def lpips_loss() -> nn.Module:
    """LPIPS (Zhang et al. 2018) on VGG features, frozen: (images, images) in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        UserError: the library or its VGG weights are not available.
    """
    try:
        import lpips
    except ImportError as error:
        raise missing("--perceptual-weight needs", "lpips", instead="set it to 0") from error
    try:
        network: nn.Module = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:  # torchvision downloads VGG's weights on first use
        raise UserError(
            f"the VGG weights that LPIPS stands on cannot be downloaded: {error}",
            "Put vgg16-397923af.pth into torch's hub checkpoint folder, or set --perceptual-weight 0.",
        ) from error
    return network.requires_grad_(False).eval()


def stage_distance(stages: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of features (B, C, positions) of several stages; (B,), from 0 to 4.

    The features at each position are scaled to length 1, so that every stage counts alike. This is eq. 1 of Zhang et
    al. 2018 (arXiv:1801.03924) with all weights 1. It is not LPIPS, whose weights are fitted to what people see.
    """
    apart = [
        (F.normalize(a.float(), dim=1, eps=1e-6) - F.normalize(b.float(), dim=1, eps=1e-6))
        .square()
        .sum(1)
        .mean(1)
        for a, b in zip(stages, others, strict=True)
    ]
    return torch.stack(apart).mean(0)


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
