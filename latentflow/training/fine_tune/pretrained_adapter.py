"""Adapters of pretrained models: put into the network, trained, and saved as the loader of its family reads it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import cast_training_params
from safetensors import safe_open
from torch import Tensor, nn

from ...config import AdapterConfig
from ...errors import UserError, with_article
from ...families import FlowModel
from ...pipeline.adapter_bases import fingerprint, shared_name
from ...pipeline.adapter_files import AdapterFacts
from ...pipeline.stock_adapters import adapted_part
from ...utils.files import save_tensors
from .adapters import ADAPTER, adapted_layers, inject, peft_settings, plan_line, trained_parameters


def check_adapter(model: FlowModel, config: AdapterConfig) -> str:
    """Return the name of the network of a model, which may be on the meta device, as the loader of adapters has it.

    Raises:
        UserError: diffusers has no loader of adapters for this pipeline; see also `adapted_layers`.
    """
    part = adapted_part(model.pipeline)
    if part is None:
        raise UserError(
            f"diffusers loads no adapters into {with_article(type(model.pipeline).__name__)}",
            "Train all weights: leave --lora-rank out.",
        )
    adapted_layers(model.network, config)
    return part


class PretrainedAdapter:
    """An adapter (LoRA, DoRA) in the network of a pretrained model.

    Args:
        model: its network is frozen; at first the adapter, which has gradients, changes nothing. The adapter is in
            float32, whatever the network's precision: its steps are too small for 16 bits.
        config: with a rank. Where ``lora_layers`` is the default, groups that the network lacks are passed over.

    Attributes:
        layers: number of layers with an adapter.
        fingerprint: of the network without the adapter, see `latentflow.pipeline.adapter_bases.fingerprint`.

    Raises:
        UserError: see `check_adapter`.
    """

    def __init__(self, model: FlowModel, config: AdapterConfig) -> None:
        self._model, self._config, self._part = model, config, check_adapter(model, config)
        self._whole: int = model.network.num_parameters()  # before peft: it counts weights in 4 bits
        self.fingerprint = fingerprint(model.network)
        self.layers = inject(model.network, config)
        cast_training_params(model.network, torch.float32)
        compute_as_base(model.network)

    def lines(self) -> list[str]:
        """Describe what is trained, for the plan."""
        trained = trained_parameters(self._model.network)
        return [plan_line(self._config, f"{self.layers} layers", trained, self._whole)]

    def description(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        return {**self._config.describe(), "base": self.fingerprint}

    def save(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the stock pipeline reads. Its
        metadata name the base and hold the fingerprint."""
        from peft.utils import get_peft_model_state_dict

        network, pipeline, settings = self._model.network, self._model.pipeline, {}
        weights = get_peft_model_state_dict(network, adapter_name=ADAPTER)
        if f"{self._part}_lora_adapter_metadata" in inspect.signature(pipeline.save_lora_weights).parameters:
            settings[f"{self._part}_lora_adapter_metadata"] = peft_settings(network)
        pipeline.save_lora_weights(folder, **{f"{self._part}_lora_layers": weights}, **settings)
        facts = AdapterFacts(base=self.fingerprint, base_name=shared_name(pipeline.name_or_path or ""))
        _add_metadata(folder / LORA_WEIGHT_NAME_SAFE, facts.metadata())


class _Factor(nn.Linear):
    """A factor of a LoRA in float32, which computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def compute_as_base(network: Any) -> None:
    """Let an adapter in float32 compute in the precision of the base, as it will when images are drawn.

    So a base in half precision needs no autocast, which brings every norm's output to float32 and back. peft would
    widen the input of each layer. The weight norms of DoRA, which half precision is too coarse for, stay in float32.
    """
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False
            layer.lora_A[ADAPTER].__class__ = layer.lora_B[ADAPTER].__class__ = _Factor


def _add_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Add metadata to a safetensors file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no dict
        metadata = {**(opened.metadata() or {}), **metadata}
    save_tensors(tensors, file, metadata)
