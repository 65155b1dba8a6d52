"""Adapters of pretrained models: put into the network, trained, and saved as the loader of its family reads it."""

from __future__ import annotations

import inspect
from dataclasses import replace
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
from ...families.added_inputs import ExtendableModel
from ...families.pretrained import PretrainedModel
from ...families.stored_weights import parameter_count
from ...families.text_encoders import text_encoders
from ...pipeline.adapter_bases import fingerprint, shared_name
from ...pipeline.adapter_conversion import with_text_model
from ...pipeline.adapter_files import INPUTS, AdapterFacts
from ...pipeline.stock_adapters import adapted_encoders, adapted_part
from ...utils.files import save_tensors
from .adapters import ADAPTER, adapted_layers, inject, peft_settings, plan_line, trained_parameters

#: layers of CLIP with an adapter, as in diffusers' train_dreambooth_lora_*.py
LAYERS_OF_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")


def check_adapter(model: PretrainedModel, config: AdapterConfig) -> str:
    """Return the name of the network of a model, which may be on the meta device, as the loader of adapters has it.

    Raises:
        UserError: diffusers has no loader of adapters for this pipeline, or none for its text encoders, which are to
            learn; see also `adapted_layers`.
    """
    part, kind = adapted_part(model.pipeline), with_article(type(model.pipeline).__name__)
    if part is None:
        raise UserError(
            f"diffusers loads no adapters into {kind}",
            "Train all weights: leave --lora-rank out.",
        )
    adapted_layers(model.network, config)
    encoders = adapted_encoders(model.pipeline) if config.lora_text_encoder else {}
    if config.lora_text_encoder and not encoders:
        raise UserError(
            f"--lora-text-encoder: diffusers has no adapters for the text encoders of {kind}",
            "Leave it out: the CLIP text encoders of Stable Diffusion 1 to 3, SDXL and FLUX.1 can have one.",
        )
    for encoder in encoders.values():
        adapted_layers(encoder, _for_clip(config))
    return part


def _for_clip(config: AdapterConfig) -> AdapterConfig:
    return replace(config, lora_layers=LAYERS_OF_CLIP)


class PretrainedAdapter:
    """An adapter (LoRA, DoRA) in the network of a pretrained model, and in its CLIP text encoders if they are to learn.

    Args:
        model: its network is frozen; at first the adapter, which has gradients, changes nothing. The adapter is in
            float32, whatever the network's precision: its steps are too small for 16 bits.
        config: with a rank. Where ``lora_layers`` is the default, groups that the network lacks are passed over.
            With ``lora_text_encoder`` the model must have its text encoders; it ``encodes_with_gradients`` from then
            on.

    Attributes:
        layers: number of layers of the network with an adapter.
        encoders: text encoders with an adapter, by the names of their components.
        fingerprint: of the network without the adapter, see `latentflow.pipeline.adapter_bases.fingerprint`.

    Raises:
        UserError: see `check_adapter`.
    """

    def __init__(self, model: PretrainedModel, config: AdapterConfig) -> None:
        self._model, self._config, self._part = model, config, check_adapter(model, config)
        self._whole: int = model.network.num_parameters()  # before peft: it counts weights in 4 bits
        self.fingerprint = fingerprint(model.network)
        self.layers = inject(model.network, config)
        self.encoders: dict[str, nn.Module] = {}
        self._encoder_layers = 0
        if config.lora_text_encoder:
            self.encoders = adapted_encoders(model.pipeline)
            self._whole += sum(parameter_count(encoder) for encoder in self.encoders.values())
            for encoder in text_encoders(model.pipeline).values():
                encoder.requires_grad_(False)
            for encoder in self.encoders.values():
                self._encoder_layers += inject(encoder, _for_clip(config))
            model.encodes_with_gradients = True
        for module in (model.network, *self.encoders.values()):
            cast_training_params(module, torch.float32)
            compute_as_base(module)

    def lines(self) -> list[str]:
        """Describe what is trained, for the plan."""
        trained = trained_parameters(self._model.network, *self.encoders.values())
        where = f"{self.layers} layers"
        if self.encoders:
            where += f" and {self._encoder_layers} of {' and '.join(self.encoders)}"
        return [plan_line(self._config, where, trained, self._whole)]

    def description(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        return {**self._config.describe(), "base": self.fingerprint}

    def save(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of the stock pipeline reads. Its
        metadata name the base and hold the fingerprint.

        With input channels for masks or control images it holds those as well, which our pipelines read: diffusers' own
        loaders refuse such a file, or read its layers alone.
        """
        from peft.utils import get_peft_model_state_dict

        pipeline, given = self._model.pipeline, {}
        taken = inspect.signature(pipeline.save_lora_weights).parameters
        for name, module in {self._part: self._model.network, **self.encoders}.items():
            weights = get_peft_model_state_dict(module, adapter_name=ADAPTER)
            settings = peft_settings(module)
            if name in self.encoders:  # whatever the version of transformers calls the layers around these
                weights = {with_text_model(key): value for key, value in weights.items()}
                settings["target_modules"] = [*LAYERS_OF_CLIP]
            given[f"{name}_lora_layers"] = weights
            if f"{name}_lora_adapter_metadata" in taken:
                given[f"{name}_lora_adapter_metadata"] = settings
        pipeline.save_lora_weights(folder, **given)
        model, control = self._model, None
        added = {}
        if isinstance(model, ExtendableModel):
            inputs = model.added_inputs
            added = {INPUTS[kind, made.coupling]: made.weight.detach() for kind, made in inputs.items()}
            if "labels" in inputs and (table := inputs["labels"].table) is not None:
                added[INPUTS["table", "independent"]] = table.weight.detach()
            control = model.control_inputs.plain()
        facts = AdapterFacts(
            base=self.fingerprint,
            base_name=shared_name(pipeline.name_or_path or ""),
            control=control or {},
        )
        _add(added, folder / LORA_WEIGHT_NAME_SAFE, facts.metadata())


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


def _add(added: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Add tensors and metadata to a safetensors file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no dict
        metadata = {**(opened.metadata() or {}), **metadata}
    save_tensors({**tensors, **added}, file, metadata)
