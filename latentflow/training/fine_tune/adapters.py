"""Training an adapter (LoRA, DoRA) beside a checkpoint's frozen weights, through peft."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn

from ...config import AdapterConfig
from ...errors import UserError
from ...families import FlowModel
from ...families.stored_weights import parameter_count
from ...pipeline.adapter_bases import shared_name
from ...pipeline.adapter_files import CLASSES, CONTROL, INTERVALS, WORDS, AdapterFacts, base_hashes
from ...utils.files import save_tensors

#: name of the only adapter, while it is trained
ADAPTER = "default"

# Layers of DiT, of T5 and of diffusers' networks, by their names. Routed experts learn too little each to be adapted.
_GROUPS = {
    "attention": re.compile(
        r"\b(attn\d?|(cross_|self_)?attention|cross_attn|SelfAttention)\.\w+$|\.to_(q|k|v|out\.0)$"
    ),
    "feed-forward": re.compile(
        r"^blocks\.\d+\.mlp\.|\.DenseReluDense\."
        r"|\.ff(_context|_t)?\.|\.(feed_forward|ffn)\.|\.shared_experts?\."  # of most
        r"|\.(img|txt)_mlp\.(net\.|proj$|out$|gate_layer$)|^layers\.\d+\.mlp\."  # Qwen-Image; ERNIE, OmniGen
        r"|^single_transformer_blocks\.\d+\.proj_(mlp|out)$|^blocks\.\d+\.(gate|up|down)_proj$"  # FLUX; PRX
    ),
    "all": re.compile(""),
}


class Adapter:
    """The adapter of a run.

    Attributes:
        model: what it is in.
        trains_text: the text encoder has parameters that learn.
    """

    def __init__(
        self, model: FlowModel, config: AdapterConfig, checkpoint: str, *, trains_text: bool = False
    ) -> None:
        """Put an adapter into the networks of ``model``, in place; at first it changes nothing. From then on the
        adapter's parameters have gradients, no others.

        Args:
            model: the checkpoint's, fitted to the data.
            checkpoint: the pipeline folder or hub id that it came from.
            trains_text: the text encoder was trained with the checkpoint, and may learn.

        Raises:
            UserError: the networks have inputs that the checkpoint has not, which no adapter can hold; a rank is above
                a layer's; layers of these names do not exist; the text encoder cannot be adapted.
        """
        network, encoder = model.network, model.pipeline.text_encoder
        if config.lora_text_encoder and not trains_text:
            raise UserError(
                "--lora-text-encoder: this checkpoint has no text encoder that was trained with it",
                "Leave it out.",
            )
        base = FlowModel.from_pretrained(checkpoint, vae=None)
        _check_same_inputs(base.network, network, checkpoint)
        words: dict[str, int] = {}  # new ones, and their rows
        if trains_text:
            known = base.pipeline.tokenizer.get_vocab()
            # By their rows: a tokenizer hands its vocabulary out in another order each time.
            vocabulary = sorted(model.pipeline.tokenizer.get_vocab().items(), key=lambda item: item[1])
            words = {word: row for word, row in vocabulary if word not in known}
        names = {name: row for row, name in enumerate(model.classes) if name not in base.classes}
        self.model, self._config = model, config
        # Inputs that the base lacks: the adapter brings all of them.
        self._intervals: nn.Module | None = None
        if not base.network.config.get("interval_conditioning"):
            self._intervals = getattr(network, "length_embedder", None)
        self._control: nn.Module | None = None
        if not base.network.config.get("control"):
            self._control = network.control_embedder
        self._facts = AdapterFacts(
            base=base_hashes(base.network),
            base_name="/".join(Path(checkpoint).parts[-2:]),
            words=[*words],
            classes=[*names],
            few_steps=model.few_steps.plain(),
            control={} if self._control is None else dict(network.config["control"]),
        )
        self._base_name = shared_name(checkpoint)
        self._whole = parameter_count(network) + (parameter_count(encoder) if trains_text else 0)
        self._layers = inject(network, config)
        if encoder is not None:
            encoder.requires_grad_(False)
            if config.lora_text_encoder:
                self._layers += inject(encoder, config)
            if words:
                _learn_rows(encoder, encoder.get_input_embeddings(), [*words.values()])
        if names:
            _learn_rows(network, network.y_embedder.embedding_table, [*names.values()])
        for part in (self._intervals, self._control):
            if part is not None:
                part.requires_grad_(True)
        self.trains_text = bool(words) or config.lora_text_encoder

    def lines(self) -> list[str]:
        """Describe what is trained, for the plan."""
        new = [
            f", {len(names)} new {noun}"
            for noun, names in (("words", self._facts.words), ("classes", self._facts.classes))
            if names
        ]
        where = f"{self._layers} layers{''.join(new)}"
        return [plan_line(self._config, where, trained_parameters(*self._modules().values()), self._whole)]

    def description(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        facts = self._facts.plain()
        if not facts["few_steps"]:  # as in runs from before there were any
            del facts["few_steps"]
        return {**self._config.describe(), **facts}

    def merged(self) -> dict[str, nn.Module]:
        """Return copies of the pipeline's networks with the adapter in their weights, as if there had been none."""
        return {name: _merged(part) for name, part in self._modules().items()}

    def save(self, folder: Path) -> None:
        """Write the adapter alone, as diffusers' pipelines load it: ``load_lora_weights(folder)``."""
        from peft.utils import get_peft_model_state_dict

        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for part, module in self._modules().items():
            if not hasattr(module, "peft_config"):
                continue
            state = get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
            tensors |= {f"{part}.{name}": value for name, value in state.items() if "lora_" in name}
            settings |= {f"{part}.{name}": value for name, value in peft_settings(module).items()}
        tensors |= self._added_rows()
        for start, inputs in ((INTERVALS, self._intervals), (CONTROL, self._control)):
            if inputs is not None:
                tensors |= {f"{start}{name}": value for name, value in inputs.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            folder / LORA_WEIGHT_NAME_SAFE,
            metadata={
                "format": "pt",
                LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True),
                **dataclasses.replace(self._facts, base_name=self._base_name).metadata(),
            },
        )

    def _modules(self) -> dict[str, Any]:
        named = {"transformer": self.model.network, "text_encoder": self.model.pipeline.text_encoder}
        return {name: part for name, part in named.items() if part is not None}

    def _added_rows(self) -> dict[str, Tensor]:
        """Return how far the new rows are from where they began, in the order of the facts."""
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        modules, rows = self._modules(), {}
        for part, key in (("text_encoder", WORDS), ("transformer", CLASSES)):
            for layer in modules[part].modules() if part in modules else ():
                if isinstance(layer, TrainableTokensLayer):
                    rows[key] = (
                        layer.trainable_tokens_delta[ADAPTER] - layer.trainable_tokens_original[ADAPTER]
                    )
        return rows


def _check_same_inputs(base: Any, network: Any, checkpoint: str) -> None:
    # Classes may be new, positions are computed, and the adapter brings the interval's length and control itself.
    other = re.compile(
        r"embedding_table|^pos_embed$|^length_embedder|^control_embedder|^unet\.conv_in\.control"
    )
    shapes = [
        {name: weight.shape for name, weight in module.named_parameters() if not other.search(name)}
        for module in (base, network)
    ]
    if shapes[0] != shapes[1] or base.config.get("control") not in (None, network.config.get("control")):
        raise UserError(
            f"--lora-rank: {checkpoint} lacks the inputs for --inpainting, --size-conditioning or --control (beside "
            "another kind), and an adapter cannot bring them",
            "Leave these out (data with masks: --masks none), or teach them to all weights first, without --lora-rank.",
        )


def plan_line(config: AdapterConfig, where: str, trained: int, whole: int) -> str:
    """Describe an adapter for the plan.

    Args:
        where: what it is in.
        trained: number of its parameters.
        whole: number of the parameters that would learn without it.
    """
    kind = "DoRA" if config.lora_dora else "LoRA"
    return (
        f"adapter: {kind} of rank {config.lora_rank} in {where}: {trained:,} trained parameters, "
        f"{trained / whole:.1%} of {whole / 1e6:.1f} M"
    )


def trained_parameters(*modules: nn.Module) -> int:
    """Return the number of parameters with gradients."""
    return sum(weight.numel() for part in modules for weight in part.parameters() if weight.requires_grad)


def peft_settings(module: Any) -> dict[str, Any]:
    """Return peft's settings of the adapter in a module as plain values, in an order of their own.

    They are for images: diffusers loads the dropout of these settings in training mode, and would draw with it.
    """
    found = module.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def adapted_layers(module: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the names of the layers of ``module``, which may be on the meta device, that get an adapter.

    Raises:
        UserError: there are none of the names asked for; the rank is above a layer's.
    """
    layers = chosen_layers(module, config.lora_layers)
    layers = {name: layer for name, layer in layers.items() if not name.startswith("length_embedder")}
    # Not by the shapes of their weights: those of nf4 are packed.
    sides = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    smallest = min(sides, key=lambda name: min(sides[name]))
    (inputs, outputs), most = sides[smallest], min(sides[smallest])
    if config.lora_rank > most:
        raise UserError(
            f"--lora-rank {config.lora_rank} is above what the layer {smallest} ({inputs} to {outputs}) can have",
            f"At most {most}; 16 is usual. --lora-layers leaves layers out.",
        )
    return [*layers]


def inject(module: nn.Module, config: AdapterConfig) -> int:
    """Freeze ``module``, put the adapter beside its layers, and return how many those are; see `adapted_layers`."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = adapted_layers(module, config)
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        use_dora=config.lora_dora,
        target_modules=layers,
    )
    inject_adapter_in_model(settings, module, ADAPTER)
    return len(layers)


def chosen_layers(module: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of ``module`` that ``wanted`` names, as `AdapterConfig.lora_layers` does.

    Raises:
        UserError: one of the names fits no layer.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    chosen: set[str] = set()
    for word in wanted:
        pattern = _GROUPS.get(word) or re.compile(rf"(^|\.){re.escape(word)}(\.|$)")
        found = {name for name in linear if pattern.search(name)}
        if not found and word in _GROUPS and tuple(wanted) == AdapterConfig().lora_layers:
            continue  # nobody asked for it, and Sana has convolutions in its place
        if not found:
            groups = [name for name, group in _GROUPS.items() if any(map(group.search, linear))]
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear})
            raise UserError(
                f"--lora-layers {word}: {type(module).__name__} has no such layers",
                f"Choices: {', '.join(groups)}, or parts of these names: {', '.join(kinds)}",
            )
        chosen |= found
    return {name: layer for name, layer in linear.items() if name in chosen}


def _learn_rows(module: nn.Module, table: nn.Embedding, rows: list[int]) -> None:
    """Let these rows of an embedding of ``module`` learn, and no others.

    Not by peft's ``trainable_token_indices``, whose wrapper has other names for the weights: a run that was stopped
    would not go on.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    places = module.named_modules(remove_duplicate=False)
    # T5 has its table under two names, of which it uses the last.
    name = [name for name, part in places if getattr(part, "weight", None) is table.weight][-1]
    parent, _, leaf = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = TrainableTokensLayer(module.get_submodule(name), ADAPTER)
        layer.update_layer(ADAPTER, token_indices=rows, init_weights=True)
    table.requires_grad_(False)
    setattr(module.get_submodule(parent), leaf, layer)


def _merged(module: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, layer in [*result.named_modules()]:
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                parent, _, leaf = name.rpartition(".")
                setattr(result.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(result, "peft_config"):
        del result.peft_config
    return result.requires_grad_(True)
