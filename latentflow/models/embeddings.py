"""Embeddings of a velocity network: positions, patches, time, class and text, each as vectors of one width."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .condition import Condition


def linear(inputs: int, outputs: int, *, std: float | None = None, zero: bool = False) -> nn.Linear:
    """A linear layer, as DiT initialises it: Xavier-uniform, or normal with ``std``, or zero; bias zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.bias)
    if zero:
        nn.init.zeros_(layer.weight)
    elif std is not None:
        nn.init.normal_(layer.weight, std=std)
    else:
        nn.init.xavier_uniform_(layer.weight)
    return layer


def _outer(positions: Tensor, frequencies: int, base: float) -> Tensor:
    """(N, frequencies): positions times base^(-i / frequencies), in float64."""
    exponents = torch.arange(frequencies, dtype=torch.float64, device=positions.device) / frequencies
    return positions.double()[:, None] * base ** -exponents[None]


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every token, both (height * width,), row by row."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return y, x


Table = TypeVar("Table", bound=Callable[..., Any])


def cached(table: Table) -> Table:
    """A table that depends on its arguments only: computed once per grid, shared by networks, never saved.

    A compiler makes the table a constant by itself, and does not look into the cache.
    """
    memory = lru_cache(maxsize=64)(table)

    @wraps(table)
    def function(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return table(*arguments)
        # Normal tensors even when first asked for under inference_mode: a training step may use them later.
        with torch.inference_mode(False):
            return memory(*arguments)

    return cast(Table, function)


@cached
def sincos_table(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """(height * width, channels) float32: the fixed 2-D sin-cos embedding of DiT (arXiv:2212.09748).

    The first half of the channels encodes the column, the second the row, each as [sin | cos].
    """
    y, x = _grid(height, width, device)
    column, row = _outer(x, channels // 4, 1e4), _outer(y, channels // 4, 1e4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


@cached
def rope_table(
    height: int, width: int, head_dim: int, registers: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (registers + height * width, 1, head_dim), of axial rotary positions (2403.13298).

    Half of the channel pairs turn with the row, half with the column. The base is 100, as the paper has it
    for images: with the 10000 of text, most pairs would hardly turn on a small grid. Register tokens stand
    nowhere, and are not turned. ``sin`` carries the signs of `rotate`.
    """
    y, x = _grid(height, width, device)
    angles = torch.cat([_outer(y, head_dim // 4, 100.0), _outer(x, head_dim // 4, 100.0)], dim=1)
    angles = F.pad(angles, (0, 0, registers, 0))[:, None]  # (N, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of x (..., N, heads, head_dim) as `rope_table` says."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * patch * patch), the channel slowest, as a convolution's weight has it."""
    batch, channels, height, width = x.shape
    if patch == 1:
        return x.flatten(2).transpose(1, 2)
    x = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N, patch^2 * C), feature (p * patch + q) * C + c, -> (B, C, height * patch, width * patch)."""
    batch = tokens.shape[0]
    tokens = tokens.reshape(batch, height, width, patch, patch, -1)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * patch, width * patch)


class PatchEmbed(nn.Module):
    """Patches of (B, channels + extra, H, W) -> tokens (B, N, width): a convolution, stride = kernel.

    The weights of the extra channels start at zero, so that a network extended by them starts as it was.
    """

    def __init__(self, channels: int, extra: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels + extra, width, kernel_size=patch, stride=patch)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.proj.weight.flatten(1))
            self.proj.weight[:, channels:] = 0.0
            if self.proj.bias is not None:
                nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        proj: nn.Module = self.proj
        if not isinstance(proj, nn.Conv2d):  # an adapter lies around it
            adapted: Tensor = proj(x)
            return adapted.flatten(2).transpose(1, 2)
        # The same product as a matrix product, which skips the convolution's layout changes.
        tokens = patchify(x, proj.kernel_size[0])
        return F.linear(tokens, proj.weight.flatten(1), proj.bias)


def fourier_features(values: Tensor, features: int) -> Tensor:
    """(N,) float32 -> (N, features): [cos | sin] with periods from 2 pi to nearly 2 pi 10000."""
    half = features // 2
    index = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[:, None] * torch.exp(-math.log(1e4) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbed(nn.Module):
    """t (B,) -> (B, width): Fourier features [cos | sin], periods up to 2 pi 10000, and two linear layers.

    ``zero``: the last starts at zero, so that a network extended by it starts as it was.
    """

    def __init__(self, width: int, scale: float, features: int = 256, *, zero: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.features = features
        self.mlp = nn.Sequential(
            linear(features, width, std=0.02), nn.SiLU(), linear(width, width, std=0.02, zero=zero)
        )

    def forward(self, t: Tensor) -> Tensor:
        features = fourier_features(t.float() * self.scale, self.features)
        out: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return out


class SizeEmbed(nn.Module):
    """Numbers of pixels (B, 6), see `Condition`, -> (B, width); zero at first, and where no sizes are given.

    Each number becomes Fourier features [cos | sin] with periods up to 2 pi 10000 pixels (arXiv:2307.01952).
    """

    def __init__(self, width: int, numbers: int = 6, features: int = 128) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.mlp = nn.Sequential(
            linear(numbers * features, width, std=0.02), nn.SiLU(), linear(width, width, zero=True)
        )

    def forward(self, sizes: Tensor | None, t: Tensor) -> Tensor:
        """``t`` (B,) says how many rows there are."""
        if sizes is None:
            return torch.zeros(len(t), self.width, dtype=next(self.mlp.parameters()).dtype, device=t.device)
        features = fourier_features(sizes.float().flatten(), self.features).view(len(sizes), -1)
        out: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbed(nn.Module):
    """Class labels -> (B, width). The last row of the table is the learned null."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor | None, drop: Tensor) -> Tensor:
        """``drop`` (B,) bool; no labels at all = every row is the null."""
        null = torch.full_like(drop, self.num_classes, dtype=torch.long)
        rows = null if labels is None else torch.where(drop, null, labels)
        out: Tensor = self.embedding_table(rows)
        return out


class TextEmbed(nn.Module):
    """Token embeddings of a text encoder -> tokens for cross-attention and one vector for the adaLN.

    The null is one learned token. A dropped row holds it at every position, which attention and the mean see
    as one token; so does a row whose mask is empty.
    """

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        # Encoders differ widely in scale (T5 has features in the hundreds).
        self.norm = nn.LayerNorm(text_dim)
        self.proj = linear(text_dim, width)
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.pool = linear(width, width)

    def forward(
        self, text: Tensor | None, mask: Tensor | None, drop: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """text (B, L, text_dim), mask (B, L), drop (B,) -> tokens (B, L, D), mask (B, L), pooled (B, D)."""
        if text is None:
            tokens = self.null.expand(drop.shape[0], 1, -1)
            mask = torch.ones_like(drop)[:, None]
        else:
            if mask is None:
                mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            mask = mask.bool()
            drop = drop | ~mask.any(dim=1)
            tokens = self.proj(self.norm(text.to(self.proj.weight.dtype)))
            tokens = torch.where(drop[:, None, None], self.null.to(tokens.dtype), tokens)
            mask = mask | drop[:, None]
        weights = mask / mask.sum(dim=1, keepdim=True)  # (B, L)
        pooled = torch.einsum("bl,bld->bd", weights.to(tokens.dtype), tokens)
        return tokens, mask, self.pool(pooled)


def embed_condition(
    labels: LabelEmbed | None, text: TextEmbed | None, sizes: SizeEmbed | None, cond: Condition, t: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Class, text and sizes of a condition for the rows of t (B,): one vector (B, D), text tokens, their mask."""
    drop = torch.zeros(t.shape, dtype=torch.bool, device=t.device) if cond.drop is None else cond.drop
    tokens, mask, vectors = None, None, []
    if labels is not None:
        vectors.append(labels(cond.class_labels, drop))
    if text is not None:
        tokens, mask, pooled = text(cond.text, cond.text_mask, drop)
        vectors.append(pooled)
    if sizes is not None:
        vectors.append(sizes(cond.sizes, t))
    return sum(vectors[1:], vectors[0]) if vectors else None, tokens, mask


def times_of_rows(t: Tensor | float, rows: int, device: torch.device) -> Tensor:
    """A time, or one per row, as (rows,) float32.

    Raises:
        ValueError: ``t`` has another shape.
    """
    times = torch.as_tensor(t, device=device).to(torch.float32)
    if times.ndim > 0 and tuple(times.shape) != (rows,):
        raise ValueError(f"t has shape {tuple(times.shape)}: give one time, or one per row, shape ({rows},)")
    return times.expand(rows)
