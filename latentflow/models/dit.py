"""`DiT`, a diffusion transformer that predicts velocities: its block, the network, its configurations by name."""

# mypy: disable-error-code=no-any-return
# Calling a module returns Any; so does every forward below.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # diffusers' loader looks for this name in this module
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from ..errors import UserError, lookup
from ..utils.components import Checked
from .control import ControlEmbed, ControlInputs
from .inputs import (
    Condition,
    LabelEmbed,
    PatchConv,
    PatchEmbed,
    SizeEmbed,
    TextEmbed,
    TimeEmbed,
    check_inputs,
    check_sizes,
    embed_condition,
    linear,
    rope_table,
    rotate,
    sincos_table,
    times_of_rows,
    unpatchify,
    with_channels,
)
from .latent_variable import USUAL_DIM, LatentEmbed, LatentEncoder
from .mixins import BlockCacheMixin, LayerwiseCastingMixin
from .norms import NORMS, Norm, has_tangent, normalised_and_turned, rms_norm
from .routing import Route


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D) * (1 + scale) + shift, both (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d); ``mask`` (B, L) bool, True = the key is seen.

    Differentiable backwards and forwards; forwards it holds the N x L scores and their tangents.
    """
    # Fused kernels have no forward derivative. On short sequences the CPU's is slower than plain matrix products in
    # half precision (2.5 times forward, 5 times with its gradient, 64 tokens), and up to 40 % faster in float32.
    slower = q.device.type == "cpu" and q.dtype.itemsize < 4 and k.shape[-2] <= 256
    if not slower and not has_tangent(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Self-attention over (B, N, D), optionally with rotary positions and normalised queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)
        # The weights of the queries' and keys' RMSNorm (arXiv:2302.05442), separate for every head.
        self.qk_scale = nn.Parameter(torch.ones(2 * width)) if qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, width = x.shape
        qk, v = self.qkv(x).split([2 * width, width], dim=-1)
        qk = qk.unflatten(-1, (2 * self.heads, -1))
        if self.qk_scale is not None and rope is not None:
            qk = normalised_and_turned(qk, self.qk_scale, *rope)
        elif self.qk_scale is not None:
            qk = rms_norm(qk) * self.qk_scale.view(qk.shape[-2:]).to(qk.dtype)
        elif rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # (B, heads, N, head_dim)
        out = attention(q, k, v.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class CrossAttention(nn.Module):
    """Attention of (B, N, D) to text tokens (B, L, D); padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.proj = linear(width, width, zero=True)  # starts closed

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(text).view(batch, text.shape[1], 2 * self.heads, -1).transpose(1, 2).chunk(2, dim=1)
        out = attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class GeluMlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = linear(width, int(width * ratio))
        self.fc2 = linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGluMlp(nn.Module):
    """SwiGLU (arXiv:2002.05202) with two thirds of the hidden width, which keeps the number of parameters."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = -(-int(width * ratio * 2 / 3) // 32) * 32  # rounded up, for the matrix units
        self.fc1 = linear(width, 2 * hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


MLPS: dict[str, Callable[[int, float], nn.Module]] = {"swiglu": SwiGluMlp, "gelu": GeluMlp}


class DiTBlock(nn.Module):
    """One block of DiT (arXiv:2212.09748, figure 3, adaLN-zero); cross-attention to text in the middle."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, norm: Norm, activation: str, qk_norm: bool, text: bool
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attn = Attention(width, heads, qk_norm)
        self.cross_attn = CrossAttention(width, heads) if text else None
        self.mlp = MLPS[activation](width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True))

    def forward(
        self,
        hidden_states: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, D), c (B, D), text (B, L, D), text_mask (B, L) -> (B, N, D)."""
        x = hidden_states  # which diffusers' caches look for by this name
        vectors = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        x = torch.addcmul(x, gate_attn, self.attn(modulate(self.norm(x), shift_attn, scale_attn), rope))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm(x), text, text_mask)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp)))


TransformerBlockRegistry.register(DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> features of their patches (B, N, features)."""

    def __init__(self, width: int, features: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear(width, features, zero=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, zero=True))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class WithFeatures(NamedTuple):
    """Velocity and features of a `DiT`, returned in training if features are asked for.

    Attributes:
        velocity: (B, in_channels, H, W); None if only the features were asked for.
        features: (B, N, width), the tokens of the latent after some block; on a route, only those that pass.
    """

    velocity: Tensor | None
    features: Tensor


class DiT(Checked, LayerwiseCastingMixin, BlockCacheMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Diffusion transformer with adaLN-zero (arXiv:2212.09748), for any rectangular latent.

    The default is the modern block (arXiv:2501.01423): RMSNorm, SwiGLU, rotary positions, normalised queries
    and keys. ``norm="layer", activation="gelu", position="sincos", qk_norm=False, time_scale=1.0`` is SiT
    (arXiv:2401.08740), parameter by parameter and name by name; see `DIT_PRESETS`.

    Args:
        in_channels: channels of the latent, and of the velocity.
        out_channels: channels that the network computes; those beyond ``in_channels`` (SiT's learned sigma)
            are not returned, unless a call asks for all. None = ``in_channels``.
        patch_size: side of the square of latent pixels that is one token.
        width, depth, heads: of the transformer.
        mlp_ratio: hidden width of the feed-forward part over ``width`` (SwiGLU takes two thirds of it).
        norm: "rms" or "layer".
        activation: "swiglu" or "gelu".
        position: "sincos" = the fixed table, added to the tokens; "rope" = that and rotary attention.
        qk_norm: normalise queries and keys (keeps training stable at high learning rates).
        num_classes: None = no class embedding.
        text_dim: features of the text encoder's tokens; None = no text.
        condition_channels: additional input channels; their weights start at zero.
        registers: learned tokens that attend and are dropped at the end (arXiv:2309.16588).
        time_scale: t in [0, 1] is multiplied by it before its Fourier features are taken.
        sample_size: side, or (height, width), of the latents it was trained on; other sizes work as well.
        size_conditioning: take ``sizes`` in the condition.
        interval_conditioning: take the end of an interval, and predict the average velocity up to there.
        rope_base: base of the rotary positions' frequencies; LightningDiT (arXiv:2501.01423) has 10000.
        control: control images that it takes, see `ControlInputs`; None = none.
        latent_variable: what the encoder of its latent variable sees, a key of ``latent_variable.SEEN``; None: it has
            none.
        latent_variable_dim: Z, of that variable; None: 16.

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
        rope_base: float = 100.0,
        control: dict[str, Any] | None = None,
        latent_variable: str | None = None,
        latent_variable_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            sample_size, in_channels, out_channels, patch_size=patch_size, width=width, depth=depth, heads=heads,
            mlp_ratio=mlp_ratio, num_classes=num_classes, text_dim=text_dim, time_scale=time_scale,
            latent_variable_dim=latent_variable_dim,
        )  # fmt: skip
        check_shape(width, heads, position)
        lookup(MLPS, activation, "activation")
        norm_function = lookup(NORMS, norm, "norm")
        self.patch_size = patch_size
        self.heads = heads
        self.position, self.rope_base = position, rope_base
        self.condition_channels = condition_channels
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(in_channels, condition_channels, width, patch_size)
        self.control_embedder = self.new_control_embedder(control)
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
        # SiT keeps its fixed table, of one size, among the parameters, without gradient. So does this class in that
        # case, to have the same 132 keys and the same count. Otherwise the table is computed, and never saved.
        self.grid: tuple[int, int] | None = None
        self.pos_embed = None
        if position == "sincos" and sample_size is not None:
            sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            self.grid = (sides[0] // patch_size, sides[1] // patch_size)
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), width), requires_grad=False)
            with torch.no_grad():
                self.pos_embed.copy_(sincos_table(self.grid[0], self.grid[1], width, torch.device("cpu")))
        # Last: the other weights start as they do without.
        kind, dim = latent_variable, latent_variable_dim or USUAL_DIM
        self.z_embedder = LatentEmbed(dim, width) if kind is not None else None
        self.z_encoder = LatentEncoder(kind, in_channels, dim) if kind is not None else None

    def new_control_embedder(self, control: Mapping[str, Any] | None) -> ControlEmbed | None:
        """Return the embedder that ``control`` adds; it is zero at first."""
        width, patch = int(self.config["width"]), self.patch_size
        if control is None:
            return None
        return ControlEmbed(
            ControlInputs.of(control), lambda count: PatchConv(count, width, patch, patch, bias=False)
        )

    def set_control_embedder(self, embedder: ControlEmbed | None) -> None:
        """Let the network take control images by this part; None: it takes none."""
        self.control_embedder = embedder

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
        all_channels: bool = False,
    ) -> Tensor | Transformer2DModelOutput | WithFeatures:
        """Return the velocity at ``x`` and time ``t``.

        Args:
            x: (B, in_channels, H, W) noisy latent; H and W are multiples of ``patch_size``.
            t: in [0, 1], 0 = noise, 1 = data; a scalar or (B,).
            cond: None = every row is the learned null.
            return_dict: return diffusers' `Transformer2DModelOutput` instead of the tensor.
            end: in [t, 1], a scalar or (B,): return the average velocity from ``t`` to ``end``. None = ``t``: return
                the velocity.
            route: let some tokens skip the middle blocks (training only).
            features: also return the tokens after this many blocks, 1 .. ``depth``; see `WithFeatures`.
            only_features: stop after those blocks.
            all_channels: return all ``out_channels``: of a network that predicts codes their logits.

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
            self.y_embedder, self.text_embedder, self.size_embedder, self.z_embedder, cond, times
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
        tokens = self._embed_latent(x, cond, height, width)
        registers, rope = tokens.shape[1] - height * width, None
        if self.position == "rope":
            head_dim, place = tokens.shape[-1] // self.heads, (x.device, tokens.dtype)
            rope = rope_table(height, width, head_dim, registers, *place, self.rope_base)
        all_rope, everything, seen = rope, tokens, tokens
        recompute = torch.is_grad_enabled() and self.gradient_checkpointing
        for number, block in enumerate(self.blocks):
            if route is not None and number == route.first:
                everything = tokens
                tokens, rope = route.leave(tokens, all_rope, registers)
            given = tokens, c, rope, text, text_mask
            tokens = self._gradient_checkpointing_func(block, *given) if recompute else block(*given)
            if route is not None and number + 1 == route.last:
                tokens, rope = route.come_back(everything, tokens, registers), all_rope
            if number + 1 == features:
                seen = tokens[:, registers:]
                if only_features:
                    return WithFeatures(None, seen)
        patches = self.final_layer(tokens[:, registers:], c)
        velocity = unpatchify(patches, patch, height, width).to(x.dtype)
        velocity = velocity if all_channels else velocity[:, : x.shape[1]]
        if features is not None:
            return WithFeatures(velocity, seen)
        return Transformer2DModelOutput(sample=velocity) if return_dict else velocity

    def _embed_latent(self, x: Tensor, cond: Condition, height: int, width: int) -> Tensor:
        """Return the tokens of a latent, (B, registers + height * width, D)."""
        x = with_channels(x.to(get_parameter_dtype(self.x_embedder)), cond.channels, self.condition_channels)
        tokens: Tensor = self.x_embedder(x)
        if self.control_embedder is not None:
            tokens = tokens + self.control_embedder(cond.control, cond.layout, x).flatten(2).transpose(1, 2)
        stored = self.pos_embed if self.grid == (height, width) else None
        table = sincos_table(height, width, tokens.shape[-1], x.device) if stored is None else stored
        tokens = tokens + table.to(tokens.dtype)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(tokens.dtype).expand(x.shape[0], -1, -1)
            tokens = torch.cat([registers, tokens], dim=1)
        return tokens


def check_shape(width: int, heads: int, position: str) -> None:
    """Refuse a configuration that cannot be built, or would fail in the first step."""
    step = lookup({"rope": heads * 4, "sincos": math.lcm(heads, 4)}, position, "position")
    if width % step:
        raise UserError(
            f"width {width} cannot be divided among {heads} heads with position '{position}'",
            f"Use a multiple of {step}: {max(1, width // step) * step} or {(width // step + 1) * step}.",
        )


# The parts of a block and of its inputs. Both kinds have about the same number of parameters.
BLOCKS: dict[str, dict[str, Any]] = {
    # LightningDiT's (arXiv:2501.01423): RMSNorm, SwiGLU, rotary positions, normalised queries and keys.
    "modern": {"norm": "rms", "activation": "swiglu", "position": "rope", "qk_norm": True, "time_scale": 1e3},
    # DiT's (arXiv:2212.09748) with the times of SiT (arXiv:2401.08740).
    "plain": {"norm": "layer", "activation": "gelu", "position": "sincos", "qk_norm": False, "time_scale": 1.0},
}  # fmt: skip
# SiT (arXiv:2401.08740, table 1) for ImageNet-256, 4 x 32 x 32 latents. The upper half of what it returns is the
# learned sigma of DiT, which SiT computes and ignores.
_SIT: dict[str, Any] = {
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "mlp_ratio": 4.0, "num_classes": 1000, "sample_size": 32,
    **BLOCKS["plain"],
}  # fmt: skip
#: Configurations by name; tiny and small, of the default block, are for latents of small autoencoders.
DIT_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 6, "heads": 3},
    "small": {"width": 256, "depth": 8, "heads": 4},
    "S": {**_SIT, "width": 384, "depth": 12, "heads": 6},
    "B": {**_SIT, "width": 768, "depth": 12, "heads": 12},
    "L": {**_SIT, "width": 1024, "depth": 24, "heads": 16},
    "XL": {**_SIT, "width": 1152, "depth": 28, "heads": 16},
}


def dit_config(preset: str, block: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `DiT` for a preset on other data: ``DiT(**dit_config("B", in_channels=16))``.

    ``block``, one of ``BLOCKS``, replaces the preset's own. Other ``in_channels`` also drop the preset's
    ``out_channels``, unless ``changes`` give them.

    Raises:
        UserError: there is no such preset, or no such block.
    """
    config = dict(lookup(DIT_PRESETS, preset, "preset"))
    if block is not None:
        config |= lookup(BLOCKS, block, "block")
    if changes.get("in_channels", config.get("in_channels")) != config.get("in_channels"):
        config.pop("out_channels", None)
    return config | changes
