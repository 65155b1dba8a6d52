"""Control of a velocity network by a second image: the latent of an image, or a label map with an embedding per label.

What the network makes of it is added to what its first layer makes of the noisy latent, which equals further input
channels of that layer. The new weights start at zero, so that a network extended by them computes, to the last bit,
what it computed before.
"""

# mypy: disable-error-code=no-any-return
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from ..errors import UserError, few, is_number, plural, shown

#: (name, "#rrggbb" or "") of every label, in the order of their ids
Labels: TypeAlias = tuple[tuple[str, str], ...]
#: features of a label's embedding; each cell of the latent grid has those of all its pixels
LABEL_WIDTH = 8
#: a pixel without a label
NO_LABEL = -1
#: labels that a map in one byte can tell apart
MOST_LABELS = 255
_LARGEST = {"image": 2**12, "cell": 2**6, "label_width": 2**6}


@dataclass(frozen=True)
class ControlInputs:
    """The control images that a network takes; kept in its config as plain values.

    Attributes:
        image: channels of a control image's latent; 0: it takes none.
        labels: (name, "#rrggbb" or "") of every label of its label maps in the order of their ids; empty: it takes
            none.
        cell: pixels of an image along a side of a cell of the latent grid.
        label_width: features of a label's embedding.
    """

    image: int = 0
    labels: Labels = ()
    cell: int = 8
    label_width: int = LABEL_WIDTH

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Self:
        """Return what a network's config says; None: it takes no control image.

        Raises:
            UserError: it says something else than `plain` returns.
        """
        if config is None:
            return cls()
        fix = "It is {'image': channels, 'labels': [[name, '#rrggbb'], ...], 'cell': pixels, 'label_width': features}."
        if not isinstance(config, Mapping) or not config.keys() <= cls.__dataclass_fields__.keys():
            raise UserError(f"control is {shown(config)}", fix)
        for name, most in _LARGEST.items():
            value = config.get(name, 1)
            whole = is_number(value) and value == int(value)
            if not whole or not (0 if name == "image" else 1) <= value <= most:
                raise UserError(f"control: {name} is {shown(value)}", fix)
        labels = config.get("labels", ())
        if (
            not isinstance(labels, list | tuple)
            or len(labels) > MOST_LABELS
            or not all(map(_is_label, labels))
        ):
            raise UserError(f"control: labels is {shown(labels)}", fix)
        made = cls(**{**config, "labels": tuple((name, colour) for name, colour in labels)})
        if not made.kinds:
            raise UserError("control has neither an image nor labels", "Leave it out.")
        return made

    def plain(self) -> dict[str, Any] | None:
        """Return plain values, as `of` takes them; None where no control image is taken."""
        if not self.kinds:
            return None
        labels = [list(label) for label in self.labels]
        return {"image": self.image, "labels": labels, "cell": self.cell, "label_width": self.label_width}

    def joined(self, other: Self) -> Self:
        """Return the inputs of both; those of ``other`` where both take label maps or images.

        Raises:
            UserError: both take label maps, of different labels.
        """
        if self.labels and other.labels and self.labels != other.labels:
            raise UserError(
                f"the label maps have {_few_labels(other.labels)}, and those of the checkpoint "
                f"{_few_labels(self.labels)}",
                "Use the checkpoint's labels, ids and colours: it knows no others.",
            )
        return replace(other, image=other.image or self.image, labels=other.labels or self.labels)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of control images that it takes: "image", "labels"."""
        return ("image",) * bool(self.image) + ("labels",) * bool(self.labels)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of the control image of each kind on the latent grid."""
        counts = {"image": self.image, "labels": self.label_width * self.cell**2}
        return {kind: counts[kind] for kind in self.kinds}


def _few_labels(labels: Labels) -> str:
    return f"{plural(len(labels), 'label')} ({few(' '.join(label).strip() for label in labels)})"


def _is_label(label: Any) -> bool:
    if (
        not isinstance(label, list | tuple)
        or len(label) != 2
        or not all(isinstance(part, str) for part in label)
    ):
        return False
    return label[1] == "" or re.fullmatch("#[0-9a-f]{6}", label[1]) is not None


def label_channels(table: nn.Embedding, layout: Tensor, cell: int) -> Tensor:
    """Map label maps (B, h * cell, w * cell) to the embeddings of the pixels of each cell, (B, D * cell^2, h, w), zero
    where there is no label."""
    embedded = table(layout.clamp(min=0)) * (layout != NO_LABEL)[..., None]
    return F.pixel_unshuffle(embedded.permute(0, 3, 1, 2), cell)


class ControlEmbed(nn.Module):
    """Control images of a batch -> what is added to the features of the noisy latent; zero at first.

    Each pixel of a label map is replaced by its label's embedding, and the pixels of a cell become channels
    (`pixel_unshuffle`), as those of a mask do: so edges within a cell are seen.

    Args:
        inputs: the control images that are taken.
        make: number of channels -> a convolution of them, without bias, as that of the noisy latent is; its weights are
            set to zero.
    """

    def __init__(self, inputs: ControlInputs, make: Callable[[int], nn.Conv2d]) -> None:
        super().__init__()
        self.inputs = inputs
        self.table = nn.Embedding(len(inputs.labels), inputs.label_width) if inputs.labels else None
        self.proj = nn.ModuleDict({kind: make(count) for kind, count in inputs.channels.items()})
        for projection in self.proj.values():
            nn.init.zeros_(projection.weight)  # type: ignore[arg-type]

    def forward(self, image: Tensor | None, layout: Tensor | None, like: Tensor) -> Tensor:
        """Map latents of control images (B, C, h, w) and label maps (B, h * cell, w * cell) of a batch ``like``
        (B, *, h, w) to features (B, width, h', w'); None adds nothing."""
        return self.project(self.channels(image, layout, like))

    def project(self, channels: Tensor) -> Tensor:
        """Map what `channels` returns to features (B, width, h', w')."""
        channels = channels.to(get_parameter_dtype(self.proj))
        parts = channels.split([*self.inputs.channels.values()], 1)
        features = [projection(part) for projection, part in zip(self.proj.values(), parts, strict=True)]
        return sum(features[1:], features[0])

    def channels(self, image: Tensor | None, layout: Tensor | None, like: Tensor) -> Tensor:
        """Return what is known of each pixel as channels of its cell, (B, C', h, w); zero where nothing is given."""
        batch, _, *grid = like.shape
        parts = []
        if self.inputs.image:
            parts.append(like.new_zeros(batch, self.inputs.image, *grid) if image is None else image.to(like))
        if self.table is not None:
            cell = self.inputs.cell
            if layout is None:
                parts.append(like.new_zeros(batch, self.inputs.label_width * cell**2, *grid))
            else:
                parts.append(label_channels(self.table, layout, cell).to(like.dtype))
        return torch.cat(parts, dim=1)


class ExtendedConv(nn.Conv2d):
    """A network's first convolution, whose last input channels are those of masks and then of control images.

    What it makes of them is added to what it makes of the latent, so that weights of zero add nothing. The weights of
    masks are part of its own; for control images see `ControlEmbed`.
    """

    control: ControlEmbed | None

    def __init__(self, *arguments: Any, **options: Any) -> None:  # as peft makes convolutions
        super().__init__(*arguments, **options)
        self.masks = 0
        self.control = None

    @classmethod
    def around(cls, first: nn.Conv2d, masks: int) -> Self:
        """Return a convolution of the parameters of ``first``, whose last ``masks`` channels are of masks."""
        shape: Any = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
        made = cls(first.in_channels, first.out_channels, device="meta", **shape)
        made.weight, made.bias, made.masks = first.weight, first.bias, masks
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels + control channels, H, W) -> (B, out_channels, H, W)."""
        latent = self.in_channels - self.masks
        out = self._conv_forward(input[:, :latent], self.weight[:, :latent], self.bias)
        if self.masks:
            of_masks = input[:, latent : self.in_channels]
            out = out + self._conv_forward(of_masks, self.weight[:, latent:], None)
        return out if self.control is None else out + self.control.project(input[:, self.in_channels :])
