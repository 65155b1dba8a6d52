"""An adapter beside the frozen network of a pretrained model, saved as diffusers' loader of its family reads it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from ...config import AdapterConfig
from ...errors import UserError, with_article
from ...families import FlowModel
from .adapters import ADAPTER, inject, peft_settings


class PretrainedAdapter:
    """An adapter (LoRA, DoRA) in the network of a pretrained model.

    Args:
        model: its network is frozen; at first the adapter, which has gradients, changes nothing.
        config: with a rank. Where ``lora_layers`` is the default, groups that the network lacks are passed over.

    Attributes:
        layers: number of layers with an adapter.

    Raises:
        UserError: diffusers has no loader of adapters for this pipeline; see also `inject`.
    """

    def __init__(self, model: FlowModel, config: AdapterConfig) -> None:
        kind = type(model.pipeline)
        if self._part(model.pipeline) is None:
            raise UserError(
                f"diffusers loads no adapters into {with_article(kind.__name__)}",
                "Train all weights: leave --lora-rank out.",
            )
        self._model, self._config = model, config
        self._whole = sum(weight.numel() for weight in model.network.parameters())
        self.layers = inject(model.network, config)
        cast_training_params(model.network, torch.float32)
        _compute_as_base(model.network)

    def lines(self) -> list[str]:
        """Describe what is trained, for the plan."""
        count = sum(weight.numel() for weight in self._model.network.parameters() if weight.requires_grad)
        kind = "DoRA" if self._config.lora_dora else "LoRA"
        return [
            f"adapter: {kind} of rank {self._config.lora_rank} in {self.layers} layers: {count:,} parameters"
        ]

    def description(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        return dataclasses.asdict(self._config)

    def save(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the stock pipeline reads."""
        from peft.utils import get_peft_model_state_dict

        network, pipeline = self._model.network, self._model.pipeline
        weights = get_peft_model_state_dict(network, adapter_name=ADAPTER)
        part, settings = self._part(pipeline), {}
        if f"{part}_lora_adapter_metadata" in inspect.signature(pipeline.save_lora_weights).parameters:
            settings[f"{part}_lora_adapter_metadata"] = peft_settings(network)
        pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": weights}, **settings)

    @staticmethod
    def _part(pipeline: Any) -> str | None:
        """Return the name of the network as the pipeline's loader has it; None without a loader of its own.

        PRX's is Stable Diffusion's, for a component that PRX has not.
        """
        save = getattr(pipeline, "save_lora_weights", None)
        taken = {} if save is None else inspect.signature(save).parameters
        parts = (name for name in ("transformer", "unet") if f"{name}_lora_layers" in taken)
        return next((name for name in parts if name in pipeline.components), None)


class _Factor(nn.Linear):
    """A factor of a LoRA in float32, which computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def _compute_as_base(network: Any) -> None:
    """Let an adapter in float32 compute in the precision of the base, as it will when images are drawn.

    So a base in half precision needs no autocast, which brings every norm's output to float32 and back. peft would
    widen the input of each layer. The weight norms of DoRA, which half precision is too coarse for, stay in float32.
    """
    from peft.tuners.lora import LoraLayer

    # Parameters of these names do not count as the network's `dtype`, and those of 4 bits before them are none.
    network._keep_in_fp32_modules = [*(network._keep_in_fp32_modules or ()), "lora_"]
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            layer.lora_A[ADAPTER].__class__ = layer.lora_B[ADAPTER].__class__ = _Factor
