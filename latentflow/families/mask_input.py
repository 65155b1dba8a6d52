"""Input channels for masks in a pretrained network that was made without them: it learns to inpaint, and still draws.

What the new channels bring is added to what the network's first layer makes of the noisy latent, which equals further
input channels of that layer. Their weights start at zero, so that the network computes, to the last bit, what it
computed before; and without known images it skips them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, with_article
from .extra_channels import checked_holes
from .pretrained import PretrainedModel
from .rows import Rows, keep

#: what rows keep of known images
CHANNELS = "channels"


class MaskInput(nn.Module):
    """Channels of masks and known latents -> what is added to the features of the noisy latent; zero at first.

    The weight is in float32, whatever the network's precision: its steps are too small for 16 bits. It computes in the
    precision of its input, as it will when images are drawn.

    Args:
        first: the network's first layer, linear or a convolution.
        ratio: new channels for each of the latent.
        cells: parts of a token that each hold all channels; 1: it holds one channel after the other.

    Attributes:
        adapter: name of the adapter that it belongs to; None: it is the network's own.
    """

    def __init__(self, first: Any, ratio: float, cells: int = 1) -> None:
        super().__init__()
        self.adapter: str | None = None
        self.cells = cells
        base: Any = getattr(first, "base_layer", first)  # of an adapter
        convolves = isinstance(base, nn.Conv2d)
        self.own: int = base.in_channels if convolves else base.in_features
        self.stride: Any = base.stride if convolves else None
        width, kernel = (base.out_channels, base.kernel_size) if convolves else (base.out_features, ())
        shape = (width, round(ratio * self.own), *kernel)
        self.weight = nn.Parameter(torch.zeros(shape, device=base.weight.device))

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's own channels of its wide input, and the others."""
        if self.stride is not None:
            return x[:, : self.own], x[:, self.own :]
        cells = x.unflatten(-1, (self.cells, -1))
        own = self.own // self.cells
        return cells[..., :own].flatten(-2), cells[..., own:].flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', h, w) or (B, N, C') -> features (B, width, h', w') or (B, N, width)."""
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if self.stride is None else F.conv2d(x, weight, stride=self.stride)


class _Widened:
    """A network's first layer with a `MaskInput`: its last input channels, if there are more than its own."""

    mask_input: MaskInput

    def forward(self, x: Tensor) -> Tensor:
        side, own = (-1 if self.mask_input.stride is None else 1), self.mask_input.own
        if x.shape[side] == own:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        plain, further = self.mask_input.parted(x)
        return super().forward(plain) + self.mask_input(further)  # type: ignore[misc,no-any-return]


@cache
def _widened(kind: Any) -> type:
    return type(kind.__name__, (_Widened, kind), {"__module__": kind.__module__})


class MaskLearningModel(PretrainedModel):
    """Family whose network can be given a `MaskInput`; its rows then may keep channels (B, f^2 + C, h, w).

    They are those of networks of our own (`masked_condition`): which pixels of each cell are kept, and the latent of
    the image with its hole in grey.
    """

    optional_extra = (CHANNELS,)
    #: the network's layer that takes the noisy latent; None: it cannot
    first_layer: str | None = None
    #: the network's tokens hold one cell after the other, each with all channels; else one channel after the other
    cells_in_order: bool = False

    @property
    def mask_input(self) -> MaskInput | None:
        """The input for masks, where the network has one."""
        if self.first_layer is None:
            return None
        found: MaskInput | None = getattr(self.network.get_submodule(self.first_layer), "mask_input", None)
        return found

    @property
    def takes_masks(self) -> bool:
        """True for a network that was trained to inpaint, by an adapter that is in effect."""
        found = self.mask_input
        if found is None or found.adapter is None:
            return found is not None
        layers = (layer for layer in self.network.modules() if hasattr(layer, "lora_A"))
        layer: Any = next(layers, None)
        return layer is not None and not layer.disable_adapters and found.adapter in layer.active_adapters

    def add_mask_input(self, weight: Tensor | None = None, adapter: str | None = None) -> None:
        """Give the network an input for masks, which learns.

        Args:
            weight: its trained weight, which is frozen; default: zero.
            adapter: name of the adapter that brings it, and without which it has no effect.

        Raises:
            UserError: the network has one, or cannot have one; the weight is of another shape.
        """
        kind = with_article(type(self.pipeline).__name__)
        if self.first_layer is None:
            raise UserError(
                f"{kind} cannot be given input channels for masks",
                "Steer it: LatentFlowInpaintPipeline fills holes with every checkpoint.",
            )
        if self.mask_input is not None:
            raise UserError(
                "the network has input channels for masks already",
                "Load one such adapter at a time: pipe.unload_lora_weights() takes it away.",
            )
        first: Any = self.network.get_submodule(self.first_layer)
        channels, *_ = self.latent_shape(self.size_multiple, self.size_multiple)
        cells = self.patch**2 if self.cells_in_order else 1
        made = MaskInput(first, (self._cell**2 + channels) / channels, cells)
        if weight is not None:
            if weight.shape != made.weight.shape:
                raise UserError(
                    f"its input channels for masks have shape {tuple(weight.shape)}, and those of this {kind[2:]} "
                    f"would have {tuple(made.weight.shape)}",
                    "Load it onto the base that it was trained on.",
                )
            made.weight = nn.Parameter(weight.to(made.weight), requires_grad=False)
        made.adapter = adapter
        first.mask_input = made
        plain: Any = type(first)
        first.__class__ = _widened(plain)

    def remove_mask_input(self) -> None:
        """Take the input for masks away, if there is one: the network is as it was."""
        if self.mask_input is not None:
            first: Any = self.network.get_submodule(self.first_layer or "")
            del first.mask_input
            first.__class__ = type(first).__mro__[2]

    @property
    def _cell(self) -> int:
        """Pixels of a cell of the latent along a side."""
        return self.size_multiple // self.latent_shape(self.size_multiple, self.size_multiple)[1]

    def with_known(self, rows: Rows, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Rows:
        """See `Rows.with_known`.

        Args:
            known: latents (P, C, h, w) of the images with their holes hidden; default: made from them.
        """
        if not self.takes_masks:
            return super().with_known(rows, images, masks, known)
        holes = checked_holes(rows, images, masks).to(self.device)
        return keep(rows, **{CHANNELS: self.mask_condition(images.to(self.device), holes, known)})

    def known_latents(self, rows: Rows) -> Tensor:
        """Return the latents (B, C, h, w) of the images that `with_known` has added, their holes hidden."""
        channels = rows.kept.get(CHANNELS)
        return channels[:, self._cell**2 :] if isinstance(channels, Tensor) else super().known_latents(rows)

    def mask_condition(self, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Tensor:
        """Return the channels (B, f^2 + C, h, w) of masked images; see `latentflow.autoencoder.masked_condition`.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            masks: (B, 1, H, W) in {0, 1}, 1 = repaint.
            known: as of `with_known`.
        """
        kept = 1.0 - masks.float()
        if known is None:
            known = self.encode(images.float() * kept)
        some = kept.flatten(1).amax(1)[:, None, None, None]
        return torch.cat([F.pixel_unshuffle(kept, self._cell), known.to(kept) * some], 1)
