"""A latent variable z of a velocity network: its encoder q(z | ...), and its embedding beside that of the time.

One z for a whole trajectory lets a network give several answers at one point: the velocity under z is that of a part of
the data, whose paths cross less. Latent-CFM (Samaddar et al. 2025, arXiv:2505.04486) has q(z | x1); variational
rectified flow matching (Guo & Schwing 2025, arXiv:2502.09616) q(z | x0, x1, xt, t). Samples draw z from N(0, I), once.
"""

# mypy: disable-error-code=no-any-return
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from ..errors import lookup
from .inputs import TimeEmbed, linear

#: what q sees -> the number of latents: x1, or x0, x1 and xt (and the time)
SEEN = {"image": 1, "path": 3}
#: dimension of z where nobody asks for another
USUAL_DIM = 16
# Cells along a side of the grid that features are averaged to, and the largest log variance in size.
_GRID, _LARGEST = 2, 10.0


class Posterior(NamedTuple):
    """A normal distribution of z for each row, with independent dimensions.

    Attributes:
        mean, log_variance: (B, Z) float32.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return z (B, Z) of standard normal noise (B, Z)."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def rate(self) -> Tensor:
        """Return KL(q || N(0, I)), (B,) in nats: how much of its condition z tells, on average over the data."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).sum(1)


class LatentEncoder(nn.Module):
    """q(z | x1), or q(z | x0, x1, xt, t): three convolutions and two linear layers, for latents of any size.

    Args:
        kind: a key of ``SEEN``.
        channels: of the latents.
        dim: Z, of z.
        width: channels of the first convolution; the others have twice as many.

    Raises:
        UserError: there is no such kind.
    """

    def __init__(self, kind: str, channels: int, dim: int, width: int = 64) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim
        inputs, wide = lookup(SEEN, kind, "latent variable") * channels, 2 * width
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(c, wide, 3, stride=2, padding=1) for c in (width, wide))
        self.hidden = linear(wide * _GRID**2, wide)
        self.t_embedder = TimeEmbed(wide, 1000.0) if kind == "path" else None
        self.proj_out = linear(wide, 2 * dim)
        # PyTorch's own weights would leave means that hardly differ between images: z would start as noise alone.
        for layer in (self.conv_in, *self.down):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        with torch.no_grad():  # variances of 1 at first
            self.proj_out.weight[dim:] = 0.0

    def forward(
        self, x1: Tensor, x0: Tensor | None = None, xt: Tensor | None = None, t: Tensor | None = None
    ) -> Posterior:
        """Return q for latents (B, C, h, w); of kind "path" also for their noise, the point between and t (B,)."""
        seen = [x1]
        if self.t_embedder is not None:
            assert x0 is not None and xt is not None and t is not None
            seen = [x0, x1, xt]
        h = self.conv_in(torch.cat(seen, 1).to(get_parameter_dtype(self.conv_in)))
        for layer in self.down:
            h = layer(F.silu(h))
        h = self.hidden(F.adaptive_avg_pool2d(F.silu(h), _GRID).flatten(1))
        if self.t_embedder is not None and t is not None:
            h = h + self.t_embedder(t)
        mean, log_variance = self.proj_out(F.silu(h)).float().chunk(2, 1)
        return Posterior(mean, log_variance.clamp(-_LARGEST, _LARGEST))


class LatentEmbed(nn.Module):
    """z (B, Z) -> (B, width); zero at first, so that a network extended by it starts as it was."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(linear(dim, width), nn.SiLU(), linear(width, width, zero=True))

    def forward(self, z: Tensor | None, t: Tensor) -> Tensor:
        """Embed z; without one the mean of the prior, 0, for the rows of t (B,)."""
        dtype = get_parameter_dtype(self.mlp)
        z = torch.zeros(len(t), self.dim, device=t.device) if z is None else z
        return self.mlp(z.to(dtype))
