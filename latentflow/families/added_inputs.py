"""Input channels that a pretrained network was made without: for masks, it learns to inpaint; for control images, to
draw under them. It still draws without.

What the new channels bring is added to what the network's first layer makes of the noisy latent, which equals further
input channels of that layer. Their weights start at zero, so that the network computes, to the last bit, what it
computed before; and without masks and control images it skips them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, with_article
from ..models import ControlInputs
from ..models.control import LABEL_WIDTH, Labels, label_channels
from .control import ControlledModel
from .extra_channels import checked_holes
from .pretrained import PretrainedModel
from .rows import Rows, keep

#: kind of control images -> kind of input
CONTROL_INPUTS = {"image": "control", "labels": "labels"}
#: kind of input -> what rows keep of it: (B, C', h, w), of label maps (B, H, W)
KEPT = {"masks": "channels", "control": "control", "labels": "layout"}
#: kind of input -> what it is for, in messages
NAMES = {"masks": "masks", "control": "control images", "labels": "label maps"}


class AddedInput(nn.Module):
    """Channels beside a noisy latent -> what is added to the features that the first layer makes of it; zero at first.

    The weight is in float32, whatever the network's precision: its steps are too small for 16 bits. It computes in the
    precision of its input, as it will when images are drawn.

    Args:
        first: the network's first layer, linear or a convolution.
        ratio: new channels for each of the latent.
        labels: of label maps, each of which has an embedding in ``table``.

    Attributes:
        adapter: name of the adapter that it belongs to; None: it is the network's own.
        coupling: that of masks, with which it was trained: "independent" or "data-dependent".
        channels: of its input at the layer.
    """

    def __init__(self, first: Any, ratio: float, labels: Labels = ()) -> None:
        super().__init__()
        self.adapter: str | None = None
        self.coupling = "independent"
        base: Any = getattr(first, "base_layer", first)  # of an adapter
        convolves = isinstance(base, nn.Conv2d)
        self.stride: Any = base.stride if convolves else None
        width, kernel = (base.out_channels, base.kernel_size) if convolves else (base.out_features, ())
        self.channels = round(ratio * _inputs(base))
        self.weight = nn.Parameter(torch.zeros((width, self.channels, *kernel), device=base.weight.device))
        self.labels = labels
        self.table = nn.Embedding(len(labels), LABEL_WIDTH, device=base.weight.device) if labels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', h, w) or (B, N, C') -> features (B, width, h', w') or (B, N, width)."""
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) if self.stride is None else F.conv2d(x, weight, stride=self.stride)


def _split(layer: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take the channels of added inputs from what a first layer is given, and keep what is made of them for `_join`.

    Hooks, since a layer's ``forward`` may be replaced: by offloading, by casting of layers.
    """
    [x] = arguments
    base: Any = getattr(layer, "base_layer", layer)
    convolves, own = isinstance(base, nn.Conv2d), _inputs(base)
    layer.added_features = None
    if x.shape[1 if convolves else -1] == own:
        return arguments
    inputs: Any = [*layer.added.values()]
    channels = [own, *(added.channels for added in inputs)]
    if convolves:
        parts = x.split(channels, 1)
    else:
        cells = x.unflatten(-1, (layer.cells, -1)).split([count // layer.cells for count in channels], -1)
        parts = tuple(part.flatten(-2) for part in cells)
    layer.added_features = [added(part) for added, part in zip(inputs, parts[1:], strict=True)]
    return (parts[0],)


def _join(layer: Any, arguments: tuple[Tensor, ...], features: Tensor) -> Tensor:
    for added in layer.added_features or ():
        features = features + added
    layer.added_features = None
    return features


def _narrow(layer: Any) -> nn.ModuleDict:
    """Take the added inputs of a layer away, and return them."""
    added: nn.ModuleDict = layer.added
    for hook in layer.added_hooks:
        hook.remove()
    del layer.added, layer.cells, layer.added_hooks
    return added


def _inputs(layer: Any) -> int:
    return int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


class ExtendableModel(ControlledModel, PretrainedModel):
    """Family whose network can be given inputs for masks and for control images.

    Its rows then may keep ``channels`` (B, f^2 + C, h, w), those of networks of our own (`masked_condition`): which
    pixels of each cell are kept, and the latent of the image with its hole in grey; ``control`` (B, C, h, w), the
    latent of the control image; and ``layout`` (B, H, W), the label map, of whose pixels each has its label's embedding
    (`label_channels`).
    """

    #: the network's layer that takes the noisy latent; None: it cannot
    first_layer: str | None = None
    #: the network's tokens hold one cell after the other, each with all channels; else one channel after the other
    cells_in_order: bool = False

    @property
    def added_inputs(self) -> Mapping[str, AddedInput]:
        """Kind -> the input, "masks", "control" or "labels", in the order in which the network takes them."""
        return {} if self.first_layer is None else dict(getattr(self._first, "added", {}))

    @property
    def optional_extra(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of what rows may keep for the network's added inputs."""
        return tuple(KEPT[kind] for kind in self.added_inputs)

    @property
    def takes_masks(self) -> bool:
        """True for a network that was trained to inpaint, by an adapter that is in effect."""
        return self._in_effect("masks")

    @property
    def coupling(self) -> str:  # type: ignore[override]
        """The coupling with which it was trained: data-dependent where the flow fills a hole from the known latents."""
        found = self.added_inputs.get("masks")
        return found.coupling if found is not None and self._strength(found) is not None else "independent"

    @property
    def control_inputs(self) -> ControlInputs:
        """The control images that the network takes, by an adapter that is in effect."""
        image = self._channels if self._in_effect("control") else 0
        labels = self.added_inputs["labels"].labels if self._in_effect("labels") else ()
        return (
            ControlInputs(image=image, labels=labels, cell=self._cell) if image or labels else ControlInputs()
        )

    def _in_effect(self, kind: str) -> bool:
        found = self.added_inputs.get(kind)
        return found is not None and self._strength(found) is not None

    def _strength(self, added: AddedInput) -> float | None:
        """Return the weight of the adapter that an input belongs to; None: it is not in effect."""
        if added.adapter is None:
            return 1.0
        layers = (layer for layer in self.network.modules() if added.adapter in getattr(layer, "lora_A", ()))
        layer: Any = next(layers, None)
        if layer is None or layer.disable_adapters or added.adapter not in layer.active_adapters:
            return None
        rank, alpha = layer.r[added.adapter], layer.lora_alpha[added.adapter]
        full = alpha / (rank**0.5 if layer.use_rslora.get(added.adapter) else rank)
        return float(layer.scaling[added.adapter] / full)

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return the values by their names; those of added inputs as channels, times the weight of the adapter that
        these belong to, as all of its layers are."""
        condition = super().arrange(rows)
        for kind, added in self.added_inputs.items():
            strength, given = self._strength(added), condition.pop(KEPT[kind], None)
            if strength is None or given is None:
                continue
            if added.table is not None:
                given = label_channels(added.table, given, self._cell)
            condition[KEPT[kind]] = given if strength == 1.0 else given * strength
        return condition

    def add_inputs(
        self,
        weights: Mapping[str, Tensor | None],
        adapter: str | None = None,
        coupling: str = "independent",
        labels: Labels = (),
    ) -> None:
        """Give the network inputs, which learn.

        Args:
            weights: kind, "masks", "control" or "labels" -> its trained weight, which is frozen; None: zero. With
                that of "labels" go the embeddings of labels, "table".
            adapter: name of the adapter that brings them, and without which they have no effect.
            coupling: that of masks.
            labels: of label maps.

        Raises:
            UserError: the network has one of this kind, or cannot have one; the weight is of another shape; nothing
                says of which labels it is.
        """
        kind = with_article(type(self.pipeline).__name__)
        made = {}
        for name, weight in weights.items():
            if name == "table":
                continue
            if name == "labels" and not labels:
                raise UserError(
                    "it does not say of which labels its label maps are",
                    "The file that training wrote says it, its tensors do not: load that file.",
                )
            if self.first_layer is None:
                raise UserError(
                    f"{kind} cannot be given input channels for {NAMES[name]}",
                    "Steer it: LatentFlowInpaintPipeline fills holes with every checkpoint."
                    if name == "masks"
                    else "Use a checkpoint of its family that draws under control images, if there is one.",
                )
            if name in self.added_inputs:
                raise UserError(
                    f"the network has input channels for {NAMES[name]} already",
                    "Load one such adapter at a time: pipe.unload_lora_weights() takes it away.",
                )
            ratio = self._added_channels(name) / self._channels
            made[name] = AddedInput(self._first, ratio, labels if name == "labels" else ())
            if weight is not None:
                given = {"weight": weight, "table.weight": weights.get("table")}
                for key, own in [*made[name].named_parameters()]:
                    shape = None if (value := given[key]) is None else tuple(value.shape)
                    if value is None or value.shape != own.shape:
                        raise UserError(
                            f"its input channels for {NAMES[name]} have a {key} of shape {shape}, and those of "
                            f"this {kind[2:]} would have {tuple(own.shape)}",
                            "Load it onto the base that it was trained on.",
                        )
                    own.data = value.to(own)
                made[name].requires_grad_(False)
            made[name].adapter = adapter
            made[name].coupling = coupling if name == "masks" else "independent"
        if not made:
            return
        first = self._first
        if not hasattr(first, "added"):
            self._widen(first, nn.ModuleDict())
        first.added.update(made)

    def remove_inputs(self, adapters: Collection[str] | None = None) -> None:
        """Take the inputs of these adapters away, or all: without any the network is as it was."""
        found = self.added_inputs
        for kind, added in found.items():
            if adapters is None or added.adapter in adapters:
                del self._first.added[kind]
        if found and not self.added_inputs:
            _narrow(self._first)

    @property
    def _first(self) -> Any:
        """The network's first layer, with the added inputs; one that an adapter has come around takes them over."""
        first: Any = self.network.get_submodule(self.first_layer or "")
        base = getattr(first, "base_layer", None)
        if hasattr(base, "added"):
            self._widen(first, _narrow(base))
        return first

    def _widen(self, first: Any, added: nn.ModuleDict) -> None:
        first.added = added
        first.cells = self.patch**2 if self.cells_in_order else 1
        first.added_hooks = first.register_forward_pre_hook(_split), first.register_forward_hook(_join)

    @property
    def _channels(self) -> int:
        return self.latent_shape(self.size_multiple, self.size_multiple)[0]

    @property
    def _cell(self) -> int:
        """Pixels of a cell of the latent along a side."""
        return self.size_multiple // self.latent_shape(self.size_multiple, self.size_multiple)[1]

    def _added_channels(self, kind: str) -> int:
        """Return the channels of an input on the grid of the latent."""
        if kind == "labels":
            return LABEL_WIDTH * self._cell**2
        return self._channels + self._cell**2 * (kind == "masks")

    def with_extra(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """Return x (B, C, h, w) and, in further channels, what its added inputs take: zeros where nothing is given of a
        kind, and x alone where nothing is given at all. See `PretrainedModel.with_extra`."""
        kinds = self.added_inputs
        if any(KEPT[kind] in condition for kind in kinds):
            empty = {
                KEPT[kind]: x.new_zeros(len(x), self._added_channels(kind), *x.shape[2:]) for kind in kinds
            }
            condition = {**empty, **condition}
        return super().with_extra(x, condition)

    def with_known(self, rows: Rows, images: Tensor, masks: Tensor, known: Tensor | None = None) -> Rows:
        """See `Rows.with_known`.

        Args:
            known: latents (P, C, h, w) of the images with their holes hidden; default: made from them.
        """
        if not self.takes_masks:
            return super().with_known(rows, images, masks, known)
        holes = checked_holes(rows, images, masks).to(self.device)
        return keep(rows, channels=self.mask_condition(images.to(self.device), holes, known))

    def known_latents(self, rows: Rows) -> Tensor:
        """Return the latents (B, C, h, w) of the images that `with_known` has added, their holes hidden."""
        channels = rows.kept.get("channels")
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
            with torch.autocast(images.device.type, enabled=False):  # autoencoders may overflow in float16
                known = self.encode(images.float() * kept)
        some = kept.flatten(1).amax(1)[:, None, None, None]
        return torch.cat([F.pixel_unshuffle(kept, self._cell), known.to(kept) * some], 1)
