"""`DiT`: a diffusion transformer that predicts velocities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from diffusers import ModelMixin  # as a name of this module: diffusers' loader looks for it here
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import UserError, lookup
from ..utils.components import Checked
from .blocks import MLPS, NORMS, DiTBlock, FinalLayer
from .condition import Condition
from .embeddings import (
    LabelEmbed,
    PatchEmbed,
    SizeEmbed,
    TextEmbed,
    TimeEmbed,
    embed_condition,
    rope_table,
    sincos_table,
    times_of_rows,
    unpatchify,
)
from .inputs import check_inputs, check_sizes
from .routing import Rope, Route

POSITIONS = ("rope", "sincos")


class WithFeatures(NamedTuple):
    """Velocity and features of a `DiT`, as training may ask for them.

    Attributes:
        velocity: (B, in_channels, H, W); None if only the features were asked for.
        features: (B, N, width), the tokens of the latent behind some block; with a route, of those that pass.
    """

    velocity: Tensor | None
    features: Tensor


class DiT(Checked, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Diffusion transformer with adaLN-zero (arXiv:2212.09748), for any rectangular latent.

    The default is the modern block (arXiv:2501.01423): RMSNorm, SwiGLU, rotary positions, normalised queries
    and keys. ``norm="layer", activation="gelu", position="sincos", qk_norm=False, time_scale=1.0`` is SiT
    (arXiv:2401.08740), parameter by parameter and name by name; see `DIT_PRESETS`.

    Args:
        in_channels: channels of the latent, and of the velocity.
        out_channels: channels that the network computes; those beyond ``in_channels`` (SiT's learned sigma)
            are not returned. None = ``in_channels``.
        patch_size: side of the square of latent pixels that is one token.
        width, depth, heads: of the transformer.
        mlp_ratio: hidden width of the feed-forward part over ``width`` (SwiGLU takes two thirds of it).
        norm: "rms" or "layer".
        activation: "swiglu" or "gelu".
        position: "sincos" = the fixed table, added to the tokens; "rope" = that and rotary attention.
        qk_norm: normalise queries and keys (keeps training stable at high learning rates).
        num_classes: None = no class embedding.
        text_dim: features of the text encoder's tokens; None = no text.
        condition_channels: channels beside the latent's; their weights start at zero.
        registers: learned tokens that attend and are dropped at the end (arXiv:2309.16588).
        time_scale: t in [0, 1] is multiplied by it before its Fourier features are taken.
        sample_size: side, or (height, width), of the latents it was trained on; other sizes work as well.
        size_conditioning: take ``sizes`` in the condition.
        interval_conditioning: take the end of an interval, and predict the average velocity up to there.

    Raises:
        UserError: the configuration contradicts itself, or names something unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: int = 1,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        norm: str = "rms",
        activation: str = "swiglu",
        position: str = "rope",
        qk_norm: bool = True,
        num_classes: int | None = None,
        text_dim: int | None = None,
        condition_channels: int = 0,
        registers: int = 0,
        time_scale: float = 1000.0,
        sample_size: int | Sequence[int] | None = None,
        size_conditioning: bool = False,
        interval_conditioning: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            sample_size, in_channels=in_channels, patch_size=patch_size, width=width, depth=depth, heads=heads,
            mlp_ratio=mlp_ratio, num_classes=num_classes, text_dim=text_dim, time_scale=time_scale,
        )  # fmt: skip
        check_shape(in_channels, out_channels, width, heads, position)
        lookup(MLPS, activation, "activation")
        norm_function = lookup(NORMS, norm, "norm")
        self.patch_size = patch_size
        self.heads = heads
        self.position = position
        self.condition_channels = condition_channels
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(in_channels, condition_channels, width, patch_size)
        self.t_embedder = TimeEmbed(width, time_scale)
        self.y_embedder = LabelEmbed(num_classes, width) if num_classes is not None else None
        self.text_embedder = TextEmbed(text_dim, width) if text_dim is not None else None
        self.size_embedder = SizeEmbed(width) if size_conditioning else None
        self.length_embedder = self.new_length_embedder() if interval_conditioning else None
        self.register_tokens = nn.Parameter(torch.randn(registers, width) * 0.02) if registers else None
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, mlp_ratio, norm_function, activation, qk_norm, text_dim is not None)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size**2 * (out_channels or in_channels), norm_function)
        # SiT keeps its fixed table among the parameters, without gradient. So do we where it is SiT's, of one
        # size: the same 132 keys and the same count. Everywhere else it is computed, and never saved.
        self.grid: tuple[int, int] | None = None
        self.pos_embed = None
        if position == "sincos" and sample_size is not None:
            sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            self.grid = (sides[0] // patch_size, sides[1] // patch_size)
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), width), requires_grad=False)
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.grid[0], self.grid[1], width, torch.device("cpu")))

    def new_length_embedder(self) -> TimeEmbed:
        """Return the embedder that ``interval_conditioning`` adds; it is zero at first.

        MeanFlow's ablation (arXiv:2505.13447, table 1c) found t and the length best, better than start and end.
        """
        return TimeEmbed(int(self.config["width"]), 1.0, zero=True)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        return_dict: bool = False,
        *,
        end: Tensor | float | None = None,
        route: Route | None = None,
        features: int | None = None,
        only_features: bool = False,
    ) -> Tensor | Transformer2DModelOutput | WithFeatures:
        """The velocity at ``x`` and time ``t``.

        Args:
            x: (B, in_channels, H, W) noisy latent; H and W are multiples of ``patch_size``.
            t: in [0, 1], 0 = noise, 1 = data; a scalar or (B,).
            cond: None = every row is the learned null.
            return_dict: return diffusers' `Transformer2DModelOutput` instead of the tensor.
            end: in [t, 1], a scalar or (B,): return the average velocity from ``t`` to it. None = ``t``, where that
                is the velocity.
            route: spare some tokens the middle blocks (training only).
            features: also return the tokens behind this many blocks, 1 .. ``depth``, see `WithFeatures`.
            only_features: stop there.

        Returns:
            (B, in_channels, H, W), in the type of ``x``.

        Raises:
            ValueError: shapes that do not fit, or a condition that the network was not built for.
        """
        cond = cond or Condition()
        check_inputs(self.config, x, cond, multiple=self.patch_size)
        patch, batch = self.patch_size, x.shape[0]
        height, width = x.shape[2] // patch, x.shape[3] // patch

        times = times_of_rows(t, batch, x.device)
        vector, text, text_mask = embed_condition(
            self.y_embedder, self.text_embedder, self.size_embedder, cond, times
        )
        c = self.t_embedder(times)
        c = c if vector is None else c + vector
        if self.length_embedder is not None:
            length = torch.zeros_like(times) if end is None else times_of_rows(end, batch, x.device) - times
            c = c + self.length_embedder(length)
        elif end is not None:
            raise ValueError(
                "end is given, but the network has no interval_conditioning: it predicts velocities at t only"
            )
        tokens = self._embed_latent(x, cond.channels, height, width)
        rope = all_rope = self._rope(height, width, tokens)
        registers, everything, seen = tokens.shape[1] - height * width, tokens, tokens
        for number, block in enumerate(self.blocks):
            if route is not None and number == route.first:
                everything = tokens
                tokens, rope = route.leave(tokens, all_rope, registers)
            tokens = self._block(block, tokens, c, rope, text, text_mask)
            if route is not None and number + 1 == route.last:
                tokens, rope = route.come_back(everything, tokens, registers), all_rope
            if number + 1 == features:
                seen = tokens[:, registers:]
                if only_features:
                    return WithFeatures(None, seen)
        patches = self.final_layer(tokens[:, registers:], c)
        velocity = unpatchify(patches, patch, height, width)[:, : x.shape[1]].to(x.dtype)
        if features is not None:
            return WithFeatures(velocity, seen)
        return Transformer2DModelOutput(sample=velocity) if return_dict else velocity

    def _block(
        self,
        block: nn.Module,
        tokens: Tensor,
        c: Tensor,
        rope: Rope | None,
        text: Tensor | None,
        text_mask: Tensor | None,
    ) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            recomputed: Tensor = self._gradient_checkpointing_func(block, tokens, c, rope, text, text_mask)
            return recomputed
        out: Tensor = block(tokens, c, rope, text, text_mask)
        return out

    def _embed_latent(self, x: Tensor, channels: Tensor | None, height: int, width: int) -> Tensor:
        """-> (B, registers + height * width, D)."""
        x = x.to(self.x_embedder.proj.weight.dtype)
        if self.condition_channels:
            if channels is None:
                channels = x.new_zeros(x.shape[0], self.condition_channels, *x.shape[2:])
            x = torch.cat([x, channels.to(x.dtype)], dim=1)
        tokens: Tensor = self.x_embedder(x)
        tokens = tokens + self._positions(height, width, tokens)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(tokens.dtype).expand(x.shape[0], -1, -1)
            tokens = torch.cat([registers, tokens], dim=1)
        return tokens

    def _positions(self, height: int, width: int, tokens: Tensor) -> Tensor:
        if self.pos_embed is not None and self.grid == (height, width):
            return self.pos_embed.to(tokens.dtype)
        return sincos_table(height, width, tokens.shape[-1], tokens.device).to(tokens.dtype)

    def _rope(self, height: int, width: int, tokens: Tensor) -> Rope | None:
        if self.position != "rope":
            return None
        registers = tokens.shape[1] - height * width
        head_dim = tokens.shape[-1] // self.heads
        return rope_table(height, width, head_dim, registers, tokens.device, tokens.dtype)


def check_shape(in_channels: int, out_channels: int | None, width: int, heads: int, position: str) -> None:
    """Refuse what could not be built, or would fail in the first step."""
    lookup({name: name for name in POSITIONS}, position, "position")
    step = heads * 4 if position == "rope" else math.lcm(heads, 4)
    if out_channels is not None and out_channels < in_channels:
        raise UserError(
            f"out_channels {out_channels} is less than in_channels {in_channels}",
            "Leave out_channels empty, or give at least in_channels.",
        )
    if width % step:
        raise UserError(
            f"width {width} cannot be divided among {heads} heads with position '{position}'",
            f"Use a multiple of {step}: {max(1, width // step) * step} or {(width // step + 1) * step}.",
        )
