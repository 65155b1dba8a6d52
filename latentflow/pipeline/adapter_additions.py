"""Words, classes and sampling modes that loaded adapters add to a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapter_files import ControlPart, SamplingMode, Tensors


@dataclass(kw_only=True)
class Added:
    """Words, classes and sampling mode of loaded adapters; kept on the network, which pipelines may share.

    Attributes:
        base: type of numbers and hash of the network as it was before.
        tokenizer, classes, num_classes: of the pipeline as it was before.
        words, labels: adapter -> word or class that the base does not know -> (D,).
        fused_words, fused_labels: word or class -> (D,), of adapters that were unloaded while fused.
        own: sampling mode without adapters, or of an adapter that was unloaded while fused.
        installed: sampling mode in effect.
        modes: adapter -> its sampling mode.
        weights: adapter -> part of the pipeline -> weight.
        scale: part of the pipeline -> scale of what is fused into it.
        controls: adapter -> the part by which the network takes control images.
        own_control: of an adapter that was unloaded while fused.
        installed_control, control_weight: in effect, and with which weight.
        has_control: the network takes control images without adapters.
        own_intervals: the network takes the end of an interval without adapters.
        disabled: no adapter is in effect for now.
    """

    base: tuple[str, str]
    tokenizer: Any
    classes: dict[str, int]
    num_classes: int
    own: SamplingMode
    installed: SamplingMode
    modes: dict[str, SamplingMode] = field(default_factory=dict)
    words: dict[str, Tensors] = field(default_factory=dict)
    labels: dict[str, Tensors] = field(default_factory=dict)
    fused_words: Tensors = field(default_factory=dict)
    fused_labels: Tensors = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    controls: dict[str, ControlPart] = field(default_factory=dict)
    own_control: ControlPart | None = None
    installed_control: ControlPart | None = None
    control_weight: float = 1.0
    has_control: bool = False
    own_intervals: bool = False
    disabled: bool = False


def summed(
    fused: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> Tensors:
    """Return new name -> what is fused + the sum over adapters of weight * row; without a weight, 0."""
    sums = dict(fused)
    for adapter, own in rows.items():
        for name, row in own.items():
            sums[name] = sums.get(name, torch.zeros_like(row)) + weights.get(adapter, 0.0) * row
    return sums


def around_mean(table: Tensor, sums: Tensors) -> Tensor:
    """Return the rows at these distances from the mean of a table's rows, (K, D)."""
    rows = torch.stack([*sums.values()]).to(table.device, torch.float32)
    return (table.float().mean(0) + rows).to(table.dtype)


def weighted(part: ControlPart, weight: float) -> ControlPart:
    """Return the part that takes control images with ``weight`` times its effect on the features of the latent."""
    control, tensors = part
    return control, {
        name: value * weight if name.startswith("proj.") else value for name, value in tensors.items()
    }
