"""Inputs of a velocity network: the condition, its checks, and embeddings of all of it as vectors of one width."""

# mypy: disable-error-code=no-any-return
# Calling a module returns Any; so does every forward below.
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The condition of a batch; every field is optional, and all have the same B.

    Attributes:
        class_labels: (B,) int64, in [0, num_classes).
        text: (B, L, D) token embeddings of a text encoder.
        text_mask: (B, L) bool, True = token, False = padding. None = every position is a token.
        channels: (B, C', H, W), placed beside the channels of the latent (masks, masked images, ...).
        control: (B, C", H, W), latents of control images; a row of zeros has none.
        layout: (B, H f, W f) integers, label maps in pixels, f pixels to a cell; a row of -1 has none.
        z: (B, Z), the latent variable, see `latentflow.models.latent_variable`; None: its prior's mean.
        sizes: (B, 6), in pixels: height and width of the original image; what was cut off at the top and on the left
            after resizing; height and width of the result (arXiv:2307.01952, section 2.2).
        drop: (B,) bool. True = the class and the text of this row are replaced, inside the network, by its
            learned null (classifier-free guidance, arXiv:2207.12598). The other fields are never dropped.
    """

    class_labels: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    channels: Tensor | None = None
    control: Tensor | None = None
    layout: Tensor | None = None
    z: Tensor | None = None
    sizes: Tensor | None = None
    drop: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, or 0 when nothing is set."""
        return next((len(value) for value in self._tensors().values()), 0)

    def unconditional(self) -> Condition:
        """Return the same condition with every row dropped."""
        return self._dropping(True) if self._tensors() else self

    @staticmethod
    def cat(a: Condition, b: Condition) -> Condition:
        """The rows of ``a``, then those of ``b``; the shorter text is padded (and masked) to the longer.

        Raises:
            ValueError: only one of the two has class labels, text, channels, control images, label maps, latent
                variables or sizes.
        """
        for name in ("class_labels", "text", "channels", "control", "layout", "z", "sizes"):
            if (getattr(a, name) is None) != (getattr(b, name) is None):
                raise ValueError(
                    f"only one of the two conditions has {name}: give it to both, "
                    "with drop=True for the rows that should not see it"
                )
        length = max((c.text.shape[1] for c in (a, b) if c.text is not None), default=0)
        a, b = a._padded(length), b._padded(length)
        if a.drop is not None or b.drop is not None:
            a, b = (c if c.drop is not None else c._dropping(False) for c in (a, b))
        pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Condition)}
        return Condition(**{name: None if x is None else torch.cat([x, y]) for name, (x, y) in pairs.items()})

    def repeat_interleave(self, n: int) -> Condition:
        """Every row ``n`` times, copies of one row next to one another: (B * n, ...)."""
        return self._map(lambda value: value.repeat_interleave(n, dim=0))

    def rows(self, index: Tensor) -> Condition:
        """The rows of ``index``, (K,) int64 or (B,) bool."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move to ``device``; cast to ``dtype``, but not sizes, which half precision would change."""
        moved = self._map(lambda value: value.to(device, dtype if value.is_floating_point() else None))
        return moved if self.sizes is None else replace(moved, sizes=self.sizes.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: function(value) for name, value in self._tensors().items()})

    def _padded(self, length: int) -> Condition:
        if self.text is None:
            return self
        mask = self.text_mask
        if mask is None:
            mask = torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)
        missing = length - self.text.shape[1]
        return replace(self, text=F.pad(self.text, (0, 0, 0, missing)), text_mask=F.pad(mask, (0, missing)))

    def _dropping(self, rows: bool) -> Condition:
        given = next(iter(self._tensors().values()))
        return replace(self, drop=torch.full((len(given),), rows, device=given.device))


def check_sizes(
    sample_size: int | Sequence[int] | None, in_channels: int, out_channels: int | None, **sizes: float | None
) -> None:
    """Refuse sizes that are not above 0, a ``sample_size`` that is not one or two sides, and fewer output than input
    channels; None is not checked.

    Raises:
        UserError: a size is refused; it is named.
    """
    if sample_size is not None:
        sides = [sample_size] * 2 if isinstance(sample_size, int) else [*sample_size]
        if len(sides) != 2 or min(sides) <= 0:
            raise UserError(f"sample_size is {sample_size}", "It must be one side, or (height, width).")
    for name, size in {"in_channels": in_channels, **sizes}.items():
        if size is not None and not size > 0:
            raise UserError(f"{name} is {size}", "It must be above 0.")
    if out_channels is not None and out_channels < in_channels:
        raise UserError(
            f"out_channels {out_channels} is less than in_channels {in_channels}",
            "Leave out_channels empty, or give at least in_channels.",
        )


def check_inputs(config: Any, x: Tensor, cond: Condition, multiple: int = 1) -> None:
    """Refuse a call that does not fit the network's ``config``. Only shapes are read: nothing waits for the device.

    Raises:
        ValueError: a shape does not fit; the message says which, and what to do.
    """
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: this network takes (B, {config.in_channels}, H, W); for another "
            "number of channels, make one with in_channels="
        )
    batch, _, height, width = x.shape
    if height % multiple or width % multiple:
        raise ValueError(f"a latent of {height}x{width} does not divide into patches of {multiple}: pad it")
    control = config.control or {}
    needs = {
        "class_labels": ("num_classes", config.num_classes),
        "text": ("text_dim", config.text_dim),
        "channels": ("condition_channels", config.condition_channels),
        "control": ("control images", control.get("image")),
        "layout": ("labels of control images", control.get("labels")),
        "z": ("latent variable", config.latent_variable),
        "sizes": ("size_conditioning", config.size_conditioning),
    }
    for name, (key, needed) in needs.items():
        if getattr(cond, name) is not None and not needed:
            raise ValueError(f"the condition has {name}, but the network has no {key}: leave {name} out")
    cell = control.get("cell", 1)
    expected = {
        "class_labels": (batch,),
        "drop": (batch,),
        "text": (batch, None, config.text_dim),
        "text_mask": (batch, None if cond.text is None else cond.text.shape[1]),
        "channels": (batch, config.condition_channels, height, width),
        "control": (batch, control.get("image"), height, width),
        "layout": (batch, height * cell, width * cell),
        "z": (batch, config.latent_variable_dim),
        "sizes": (batch, 6),
    }
    for name, shape in expected.items():
        value = getattr(cond, name)
        if value is None:
            continue
        if value.ndim != len(shape) or any(
            b not in (None, a) for a, b in zip(value.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(f"the condition's {name} has shape {tuple(value.shape)}: it must be ({wanted})")


def linear(inputs: int, outputs: int, *, std: float | None = None, zero: bool = False) -> nn.Linear:
    """Make a linear layer, initialised as in DiT: Xavier-uniform, or normal with ``std``, or zero; bias zero."""
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
    """Return positions (N,) times base^(-i / frequencies): (N, frequencies), in float64."""
    exponents = torch.arange(frequencies, dtype=torch.float64, device=positions.device) / frequencies
    return positions.double()[:, None] * base ** -exponents[None]


def _grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every token, both (height * width,), row by row."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return y, x


Table = TypeVar("Table", bound=Callable[..., Any])


def cached(table: Table) -> Table:
    """Cache a table that depends on its arguments only: computed once per grid, shared by networks, never saved.

    A compiler makes the table a constant by itself, so the cache is left out there.
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
    """Return the fixed 2-D sin-cos embedding of DiT (arXiv:2212.09748), (height * width, channels) float32.

    The first half of the channels encodes the column, the second the row, each as [sin | cos].
    """
    y, x = _grid(height, width, device)
    column, row = _outer(x, channels // 4, 1e4), _outer(y, channels // 4, 1e4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


@cached
def rope_table(
    height: int,
    width: int,
    head_dim: int,
    registers: int,
    device: torch.device,
    dtype: torch.dtype,
    base: float = 100.0,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of axial rotary positions (arXiv:2403.13298), each (registers + height * width, 1, head_dim).

    Half of the channel pairs turn with the row, half with the column. The base of 100 is the paper's
    for images: with the 10000 of text, most pairs would hardly turn on a small grid. Register tokens have no
    position, and are not turned. ``sin`` holds the signs that `rotate` needs.
    """
    y, x = _grid(height, width, device)
    angles = torch.cat([_outer(y, head_dim // 4, base), _outer(x, head_dim // 4, base)], dim=1)
    angles = F.pad(angles, (0, 0, registers, 0))[:, None]  # (N, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of x (..., N, heads, head_dim) as `rope_table` says."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * patch * patch), the channel slowest, as in a convolution's weight."""
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


def with_channels(x: Tensor, channels: Tensor | None, count: int) -> Tensor:
    """Return ``x`` (B, C, H, W) with the condition's ``count`` channels behind its own; they are zero if not given."""
    if not count:
        return x
    if channels is None:
        channels = x.new_zeros(len(x), count, *x.shape[2:])
    return torch.cat([x, channels.to(x.dtype)], dim=1)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, as a matrix product, which skips its changes of layout.

    Attributes:
        extra: number of the last input channels whose part is added to that of the others.
    """

    extra = 0  # no argument: peft makes convolutions of this class as it makes others

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / patch, W / patch)."""
        patch, own = self.kernel_size[0], self.in_channels - self.extra
        tokens = F.linear(patchify(input[:, :own], patch), self.weight[:, :own].flatten(1), self.bias)
        if self.extra:
            tokens = tokens + F.linear(patchify(input[:, own:], patch), self.weight[:, own:].flatten(1))
        return tokens.transpose(1, 2).unflatten(2, (input.shape[2] // patch, input.shape[3] // patch))


class PatchEmbed(nn.Module):
    """Patches of (B, channels + extra, H, W) -> tokens (B, N, width): a convolution, stride = kernel.

    The weights of the extra channels start at zero, and what they make is added: so a network extended by them starts,
    to the last bit, as it was.
    """

    def __init__(self, channels: int, extra: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = PatchConv(channels + extra, width, patch, patch)
        self.proj.extra = extra
        with torch.no_grad():
            nn.init.xavier_uniform_(self.proj.weight.flatten(1))
            self.proj.weight[:, channels:] = 0.0
            if self.proj.bias is not None:
                nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def fourier_features(values: Tensor, features: int) -> Tensor:
    """Map (N,) float32 to (N, features): [cos | sin] with periods from 2 pi to nearly 2 pi 10000."""
    half = features // 2
    index = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values[:, None] * torch.exp(-math.log(1e4) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# Inputs are cast to `get_parameter_dtype(layer)`, the type in which a layer computes: under layerwise casting another
# than that of its weights.


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
        return self.mlp(features.to(get_parameter_dtype(self.mlp)))


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
        """Embed sizes (B, 6); without any, the number of rows is that of ``t`` (B,)."""
        if sizes is None:
            return torch.zeros(len(t), self.width, dtype=get_parameter_dtype(self.mlp), device=t.device)
        features = fourier_features(sizes.float().flatten(), self.features).view(len(sizes), -1)
        return self.mlp(features.to(get_parameter_dtype(self.mlp)))


class LabelEmbed(nn.Module):
    """Class labels -> (B, width). The last row of the table is the learned null."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor | None, drop: Tensor) -> Tensor:
        """Embed labels (B,); rows in ``drop`` (B,) bool, or all rows if there are no labels, are the null."""
        null = torch.full_like(drop, self.num_classes, dtype=torch.long)
        rows = null if labels is None else torch.where(drop, null, labels)
        return self.embedding_table(rows)


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
        """Map text (B, L, text_dim), mask (B, L), drop (B,) to tokens (B, L, D), mask (B, L), pooled (B, D)."""
        if text is None:
            tokens = self.null.expand(drop.shape[0], 1, -1)
            mask = torch.ones_like(drop)[:, None]
        else:
            if mask is None:
                mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            mask = mask.bool()
            drop = drop | ~mask.any(dim=1)
            tokens = self.proj(self.norm(text.to(get_parameter_dtype(self.proj))))
            tokens = torch.where(drop[:, None, None], self.null.to(tokens.dtype), tokens)
            mask = mask | drop[:, None]
        weights = mask / mask.sum(dim=1, keepdim=True)  # (B, L)
        pooled = torch.einsum("bl,bld->bd", weights.to(tokens.dtype), tokens)
        return tokens, mask, self.pool(pooled)


def embed_condition(
    labels: LabelEmbed | None,
    text: TextEmbed | None,
    sizes: SizeEmbed | None,
    latent: nn.Module | None,
    cond: Condition,
    t: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Embed a condition for the rows of t (B,): one vector (B, D) of class, text, sizes and latent variable; text
    tokens; their mask."""
    drop = torch.zeros(t.shape, dtype=torch.bool, device=t.device) if cond.drop is None else cond.drop
    tokens, mask, vectors = None, None, []
    if labels is not None:
        vectors.append(labels(cond.class_labels, drop))
    if text is not None:
        tokens, mask, pooled = text(cond.text, cond.text_mask, drop)
        vectors.append(pooled)
    if sizes is not None:
        vectors.append(sizes(cond.sizes, t))
    if latent is not None:
        vectors.append(latent(cond.z, t))
    return sum(vectors[1:], vectors[0]) if vectors else None, tokens, mask


def times_of_rows(t: Tensor | float, rows: int, device: torch.device) -> Tensor:
    """Return a time, or one per row, as (rows,) float32.

    Raises:
        ValueError: ``t`` has another shape.
    """
    times = torch.as_tensor(t, device=device).to(torch.float32)
    if times.ndim > 0 and tuple(times.shape) != (rows,):
        raise ValueError(f"t has shape {tuple(times.shape)}: give one time, or one per row, shape ({rows},)")
    return times.expand(rows)
