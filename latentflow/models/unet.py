"""`UNet`: diffusers' U-Nets behind the interface of `DiT`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import (
    ModelMixin,  # diffusers' loader looks for this name in this module
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..errors import UserError
from ..utils.components import Checked
from .control import ControlEmbed, ControlInputs, ExtendedConv
from .inputs import (
    Condition,
    LabelEmbed,
    SizeEmbed,
    TextEmbed,
    check_inputs,
    check_sizes,
    embed_condition,
    times_of_rows,
    with_channels,
)
from .latent_variable import USUAL_DIM, LatentEmbed, LatentEncoder
from .mixins import LayerwiseCastingMixin


class UNet(Checked, LayerwiseCastingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A convolutional velocity network, with attention at every resolution but the first.

    Class and text become one vector, added to the time embedding; with text, the attention also looks at its
    tokens (`UNet2DConditionModel`; without text, `UNet2DModel`).

    Args:
        in_channels, out_channels, num_classes, text_dim, condition_channels, time_scale, sample_size,
            size_conditioning, control, latent_variable, latent_variable_dim: as in `DiT`.
        channels: one number per resolution, each half the previous one; multiples of ``head_dim``.
        layers_per_block: residual blocks per resolution.
        head_dim: channels of one attention head.

    Raises:
        UserError: a size is not above 0, ``channels`` are not multiples of ``head_dim``, or there are fewer output
            than input channels.
    """

    _supports_gradient_checkpointing = True
    # the whole of diffusers' U-Net would be one group of block-level offloading
    _group_offload_block_modules: ClassVar[list[str]] = ["unet"]
    # on the way up a block joins what it is given with what the way down has left
    _no_split_modules: ClassVar[list[str]] = [
        "BasicTransformerBlock", "ResnetBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D",
    ]  # fmt: skip

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        channels: Sequence[int] = (128, 256),
        layers_per_block: int = 2,
        head_dim: int = 32,
        num_classes: int | None = None,
        text_dim: int | None = None,
        condition_channels: int = 0,
        time_scale: float = 1000.0,
        sample_size: int | Sequence[int] | None = None,
        size_conditioning: bool = False,
        control: dict[str, Any] | None = None,
        latent_variable: str | None = None,
        latent_variable_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            sample_size, in_channels, out_channels, channels=min(channels, default=0), head_dim=head_dim,
            layers_per_block=layers_per_block, num_classes=num_classes, text_dim=text_dim, time_scale=time_scale,
            latent_variable_dim=latent_variable_dim,
        )  # fmt: skip
        if any(width % head_dim for width in channels):
            raise UserError(
                f"channels {tuple(channels)} are not all multiples of head_dim {head_dim}",
                "Change one of the two.",
            )
        self.time_scale = time_scale
        self.condition_channels = condition_channels
        self.multiple = 2 ** (len(channels) - 1)
        width = 4 * channels[0]  # of diffusers' time embedding
        self.y_embedder = LabelEmbed(num_classes, width) if num_classes is not None else None
        self.text_embedder = TextEmbed(text_dim, width) if text_dim is not None else None
        self.size_embedder = SizeEmbed(width) if size_conditioning else None

        text = text_dim is not None
        vectors = (num_classes, text_dim, size_conditioning or None, latent_variable)
        attention = len(channels) - 1
        block = "CrossAttn{}Block2D" if text else "Attn{}Block2D"
        arguments = {
            "in_channels": in_channels + condition_channels,
            "out_channels": out_channels or in_channels,
            "block_out_channels": tuple(channels),
            "layers_per_block": layers_per_block,
            "down_block_types": ("DownBlock2D", *[block.format("Down")] * attention),
            "up_block_types": (*[block.format("Up")] * attention, "UpBlock2D"),
            "norm_num_groups": math.gcd(32, *channels, *(c // 4 for c in channels)),
            "resnet_time_scale_shift": "scale_shift",
            "class_embed_type": None if vectors == (None,) * 4 else "identity",
        }
        if text:  # here attention_head_dim is, in diffusers, the number of heads
            heads = tuple(c // head_dim for c in channels)
            self.unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, **arguments)
        else:
            self.unet = UNet2DModel(attention_head_dim=head_dim, **arguments)
        self.unet._no_split_modules = self._no_split_modules
        # A new network returns zero, as DiT does, and ignores the channels of the condition.
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        with torch.no_grad():
            self.unet.conv_in.weight[:, in_channels:] = 0.0
        self.unet.conv_in = ExtendedConv.around(self.unet.conv_in, condition_channels)
        self.set_control_embedder(self.new_control_embedder(control))
        # Last: the other weights start as they do without.
        kind, dim = latent_variable, latent_variable_dim or USUAL_DIM
        self.z_embedder = LatentEmbed(dim, width) if kind is not None else None
        self.z_encoder = LatentEncoder(kind, in_channels, dim) if kind is not None else None

    @property
    def _first(self) -> ExtendedConv:
        first: ExtendedConv = getattr(self.unet.conv_in, "base_layer", self.unet.conv_in)  # of an adapter
        return first

    @property
    def control_embedder(self) -> ControlEmbed | None:
        """The part that takes control images, within the first convolution."""
        return self._first.control

    def set_control_embedder(self, embedder: ControlEmbed | None) -> None:
        """Let the network take control images by this part; None: it takes none."""
        self._first.control = embedder
        if embedder is not None:
            skipped = [*self._skip_layerwise_casting_patterns, "conv_in"]
            self._skip_layerwise_casting_patterns = skipped  # type: ignore[misc]

    def new_control_embedder(self, control: Mapping[str, Any] | None) -> ControlEmbed | None:
        """Return the embedder that ``control`` adds; it is zero at first."""
        if control is None:
            return None
        width = self._first.out_channels
        return ControlEmbed(
            ControlInputs.of(control), lambda count: nn.Conv2d(count, width, 3, padding=1, bias=False)
        )

    def forward(
        self, x: Tensor, t: Tensor | float, cond: Condition | None = None, return_dict: bool = False
    ) -> Tensor | UNet2DOutput:
        """Return the velocity at ``x`` and time ``t``; arguments, result and errors as in `DiT.forward`.

        Sides that the downscaling does not divide are padded with zeros inside, and cropped again.
        """
        cond = cond or Condition()
        check_inputs(self.config, x, cond)
        batch, in_channels, height, width = x.shape
        times = times_of_rows(t, batch, x.device) * self.time_scale
        vector, text, mask = embed_condition(
            self.y_embedder, self.text_embedder, self.size_embedder, self.z_embedder, cond, times
        )
        latent = with_channels(
            x.to(get_parameter_dtype(self.unet.conv_in)), cond.channels, self.condition_channels
        )
        if self.control_embedder is not None:
            control = self.control_embedder.channels(cond.control, cond.layout, latent)
            latent = torch.cat([latent, control], dim=1)
        latent = F.pad(latent, (0, -width % self.multiple, 0, -height % self.multiple))
        tokens = {} if text is None else {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        (out,) = self.unet(latent, times, class_labels=vector, return_dict=False, **tokens)
        velocity = out[:, :in_channels, :height, :width].to(x.dtype)
        return UNet2DOutput(sample=velocity) if return_dict else velocity
