"""Adapters (LoRA, DoRA) of our pipelines: loading, weighing, fusing and unloading, by diffusers' method names."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import (
    _create_lora_config,
    set_weights_and_activate_adapters,
    unscale_lora_layers,
)
from torch import Tensor, nn

from ..errors import UserError, shown
from ..families.few_steps import FewSteps
from ..families.latentflow import LatentFlowModel
from ..models import with_words
from ..utils.files import restore_permissions
from ..utils.libraries import install_command, missing
from .adapter_additions import Added, around_mean, summed, weighted
from .adapter_bases import other_base
from .adapter_files import (
    CLASSES,
    PARTS,
    WORDS,
    ControlPart,
    SamplingMode,
    Tensors,
    check_architecture,
    read_adapter,
    settings_of,
    take_control,
    take_mode,
    take_rows,
    type_name,
    weights_hash,
)
from .adapter_layouts import at_layers
from .offloading import with_weights_in_place

_MORE_THAN_PLAIN = ("use_dora", "use_rslora", "lora_bias", "alpha_pattern", "rank_pattern")


class AdapterMixin(LoraBaseMixin):  # type: ignore[misc]
    """diffusers' methods for adapters, for a pipeline with a ``transformer`` and perhaps a ``text_encoder``."""

    _lora_loadable_modules: ClassVar[list[str]] = [*PARTS]
    transformer_name, text_encoder_name = PARTS
    transformer: Any
    text_encoder: Any
    tokenizer: Any

    @with_weights_in_place
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Tensors,
        adapter_name: str | None = None,
        hotswap: bool = False,
        any_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter: a folder, a file, a hub id or tensors by name.

        Args:
            adapter_name: what to call it; several may be loaded at once, see ``set_adapters``.
            any_base: load it also if it was made for another base of the same architecture.
            kwargs: see ``diffusers.loaders.StableDiffusionLoraLoaderMixin.lora_state_dict``.

        Raises:
            UserError: peft is missing; there is no such file, or it is damaged or no adapter; it was made for another
                architecture or another base; ``hotswap`` with layers of the text encoder.
            ValueError: ``adapter_name`` is taken.
        """
        if not USE_PEFT_BACKEND:
            raise missing("adapters need", "peft")
        low_memory = kwargs.pop("low_cpu_mem_usage", True)
        state, metadata, words, labels, mode, control = self._read_fitting(
            pretrained_model_name_or_path_or_dict, any_base, kwargs
        )
        name = adapter_name or self._free_name()
        if not hotswap and name in self._adapter_names():
            raise ValueError(f"adapter_name {name} is taken")
        if "." in name:  # torch names a module so
            raise UserError(f"adapter_name {name} has a dot", "Leave the dot out.")
        replaced = getattr(self.text_encoder, "peft_config", {})
        if hotswap and (name in replaced or any(key.startswith("text_encoder.") for key in state)):
            raise UserError(
                "hotswap replaces layers of the transformer alone, here the text encoder has some as well",
                f'pipe.delete_adapters("{name}"), and load it without hotswap.',
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
            if any(key.startswith("transformer.") for key in state):
                self.transformer.load_lora_adapter(
                    {**state},
                    adapter_name=name,
                    metadata=metadata,
                    _pipeline=self,
                    low_cpu_mem_usage=low_memory,
                    hotswap=hotswap,
                )
            else:
                _activate(self.transformer, name)
            self._load_into_text_encoder(state, name, metadata, low_memory)
        loaded = self._added()
        known = {} if loaded.tokenizer is None else loaded.tokenizer.get_vocab()
        loaded.words[name] = {word: row for word, row in words.items() if word not in known}
        loaded.labels[name] = {label: row for label, row in labels.items() if label not in loaded.classes}
        if mode[0]:
            loaded.modes[name] = mode
        if control is not None:
            loaded.controls[name] = control
        self._renew()

    @with_weights_in_place
    @torch.no_grad()
    def merge_lora_weights(
        self, source: str | os.PathLike[str], any_base: bool = False, subfolder: str | None = None
    ) -> None:
        """Add an adapter to the weights for good, without peft: ``load_lora_weights``, ``fuse_lora`` and
        ``unload_lora_weights`` in one, for those of plain LoRA that bring no words, classes and inputs.

        Args:
            source: a folder, a file or a hub id.
            subfolder: of it, where the adapter is.
            any_base: merge it also if it was made for another base of the same architecture.

        Raises:
            UserError: as ``load_lora_weights``; or it is more than plain LoRA.
        """
        options = {"subfolder": subfolder}
        state, metadata, words, labels, mode, control = self._read_fitting(source, any_base, options)
        settings = metadata or {}
        plain = not any(settings.get(f"{part}.{name}") for part in PARTS for name in _MORE_THAN_PLAIN)
        ends = ".lora_A.weight", ".lora_B.weight"
        if words or labels or control or not plain or not all(name.endswith(ends) for name in state):
            raise UserError(
                f"the adapter {source} is more than plain LoRA",
                f"{install_command('peft')}, and use --lora.",
            )
        for name, down in state.items():
            if name.endswith(ends[1]):
                continue
            layer, up = name.removesuffix(ends[0]), state[name.replace("lora_A", "lora_B")]
            part, _, path = layer.partition(".")
            if getattr(self, part) is None:
                continue  # loaded without, to be given embeddings
            alpha = settings.get(f"{part}.lora_alpha") or len(down)
            weight = getattr(self, part).get_submodule(path).weight
            # Flattened: those of convolutions as well.
            change = alpha / len(down) * up.float().flatten(1) @ down.float().flatten(1)
            weight += change.view_as(weight).to(weight)
        # Solvers that were tuned to the checkpoint do not fit the changed network.
        self.transformer._merged_adapter = True
        if mode[0]:
            loaded = self._added()
            loaded.own = mode
            self._set_mode(loaded)

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Return the tensors of an adapter, and with ``return_lora_metadata`` its settings, as diffusers has them.

        Its new words and classes are left out: tensors alone do not hold their names.

        Raises:
            UserError: there is no such file, or it is damaged or no adapter.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        state, metadata, *_ = read_adapter(pretrained_model_name_or_path_or_dict, "the adapter", kwargs)
        state = {key: value for key, value in state.items() if not key.startswith("added.")}
        return (state, metadata) if with_metadata else state

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Any = None,
        text_encoder_lora_layers: Any = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write layers as an adapter; see ``diffusers.loaders.StableDiffusionLoraLoaderMixin.save_lora_weights``.

        Raises:
            ValueError: no layers are given.
            UserError: ``safe_serialization`` is off.
        """
        if not safe_serialization:
            raise UserError("adapters are written as safetensors only", "Leave safe_serialization out.")
        layers = dict(zip(PARTS, (transformer_lora_layers, text_encoder_lora_layers), strict=True))
        settings = transformer_lora_adapter_metadata, text_encoder_lora_adapter_metadata
        given = {part: held for part, held in layers.items() if held}
        if not given:
            raise ValueError("pass transformer_lora_layers or text_encoder_lora_layers")
        metadata = {part: held for part, held in zip(PARTS, settings, strict=True) if part in given}
        cls._save_lora_weights(
            save_directory, given, metadata, is_main_process, weight_name, save_function, safe_serialization
        )
        restore_permissions(Path(save_directory))

    @with_weights_in_place
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline folder.

        Raises:
            UserError: adapters are loaded, which the folder could not hold.
        """
        # Whoever put them there: transformers and diffusers would write half of such a part.
        if any(getattr(part, "peft_config", None) for part in self.components.values()):
            raise UserError(
                "a pipeline cannot be saved while adapters are loaded",
                "pipe.fuse_lora(); pipe.unload_lora_weights() puts them into the weights, "
                "pipe.unload_lora_weights() alone takes them away.",
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    # ---------------------------------------------------------------- weights, fusing, unloading

    @with_weights_in_place
    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Use these adapters, each with its weight; see ``diffusers.loaders.LoraBaseMixin.set_adapters``.

        Raises:
            UserError: no adapter is named, or a weight is no finite number.
            ValueError: an adapter is not loaded, or there are not as many weights as names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not names:
            raise UserError(
                "set_adapters needs the name of an adapter", "pipe.disable_lora() switches all off."
            )
        given = [*adapter_weights] if isinstance(adapter_weights, list | tuple) else adapter_weights
        each = given if isinstance(given, list) else [given] * len(names)
        weights = [_by_part(weight) for weight in each]
        super().set_adapters(names, given)
        self._added().weights = dict(zip(names, weights, strict=True))
        self._renew()

    @with_weights_in_place
    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget these adapters; with the last one the pipeline is as it was before the first."""
        super().delete_adapters(adapter_names)
        loaded = self._added()
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for rows in (loaded.words, loaded.labels, loaded.weights, loaded.modes, loaded.controls):
                rows.pop(name, None)
        if any(self.get_list_adapters().values()):
            self._renew()
        else:  # the emptied wrappers of the layers would be saved
            self.unload_lora_weights()

    @with_weights_in_place
    def disable_lora(self) -> None:
        """Put no adapter into effect until ``enable_lora``; their words and classes stand at the mean meanwhile."""
        super().disable_lora()
        self._added().disabled = True
        self._renew()

    @with_weights_in_place
    def enable_lora(self) -> None:
        """Put the active adapters into effect again."""
        super().enable_lora()
        self._added().disabled = False
        self._renew()

    @with_weights_in_place
    def fuse_lora(
        self,
        components: Sequence[str] = PARTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters to the weights, which makes drawing as fast as without them."""
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names, **kwargs)
        self._added().scale.update(dict.fromkeys(components, lora_scale))
        self._renew()

    @with_weights_in_place
    def unfuse_lora(self, components: Sequence[str] = PARTS, **kwargs: Any) -> None:
        """Take fused adapters out of the weights again; they stay loaded."""
        super().unfuse_lora(list(components), **kwargs)
        for part in components:  # diffusers leaves the layers at the scale of fusing
            if getattr(self, part, None) is not None:
                unscale_lora_layers(getattr(self, part), self._added().scale.pop(part, None))
        self._renew()

    @with_weights_in_place
    def unload_lora_weights(self) -> None:
        """Take the adapters away, with their words and classes; what is fused stays in the weights."""
        loaded, fused = self._added(), self._fused()
        words, labels = (
            {name: row for name, row in rows.items() if name in fused}
            for rows in (loaded.words, loaded.labels)
        )
        loaded.fused_words = summed(loaded.fused_words, words, self._weights("text_encoder"))
        loaded.fused_labels = summed(loaded.fused_labels, labels, self._weights("transformer"))
        for name, mode in loaded.modes.items():  # in the order of loading: the last wins
            loaded.own = mode if name in fused else loaded.own
        weights = self._weights("transformer")
        for name, control in loaded.controls.items():
            loaded.own_control = weighted(control, weights[name]) if name in fused else loaded.own_control
        super().unload_lora_weights()
        for held in (
            loaded.words, loaded.labels, loaded.weights, loaded.scale, loaded.modes, loaded.controls,
        ):  # fmt: skip
            held.clear()
        loaded.disabled = False
        self._renew()

    # ---------------------------------------------------------------- loading

    def _read_fitting(
        self, source: Any, any_base: bool, options: Mapping[str, Any]
    ) -> tuple[Tensors, dict[str, Any] | None, Tensors, Tensors, SamplingMode, ControlPart | None]:
        """Read an adapter that fits this pipeline; return its layers, settings, new words and classes, mode, and inputs
        for control images.

        Raises:
            UserError: it cannot be read, or was made for another architecture or base.
        """
        called = "the adapter" if isinstance(source, dict) else f"the adapter {source}"
        state, settings, facts, note = read_adapter(source, called, options)
        called += f" ({note})" if note else ""
        state = at_layers(state, self._parts(), called)
        check_architecture(self._parts(), state, settings, called, facts)
        dtype, base = self._added().base
        if not any_base and facts.base.get(dtype) not in (None, base):
            raise other_base(called, facts.base_name)
        words = take_rows(state, WORDS, facts.words, called)
        classes = take_rows(state, CLASSES, facts.classes, called)
        own = self._added().has_control
        control = take_control(state, facts, self.transformer, called, has_own=own)
        return state, settings, words, classes, take_mode(state, facts, self.transformer, called), control

    def _load_into_text_encoder(
        self, state: Mapping[str, Tensor], name: str, metadata: dict[str, Any] | None, low_memory: bool
    ) -> None:
        """Load the text encoder's layers; diffusers' own function for this finds the ranks of CLIP's layers only."""
        prefix = "text_encoder."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if self.text_encoder is None:
            return
        if not own:
            _activate(self.text_encoder, name)
            return
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        settings = settings_of("text_encoder", metadata)
        ranks = {f"^{key}": value.shape[1] for key, value in own.items() if ".lora_B." in key}
        config = _create_lora_config(own, None, settings or None, ranks)
        memory = {"low_cpu_mem_usage": low_memory}
        inject_adapter_in_model(config, self.text_encoder, name, state_dict=own, **memory)
        set_peft_model_state_dict(self.text_encoder, own, name, **memory)
        self.text_encoder._hf_peft_config_loaded = True
        self.text_encoder.to(device=self.text_encoder.device, dtype=self.text_encoder.dtype)

    # ---------------------------------------------------------------- new words and classes

    def _added(self) -> Added:
        loaded: Added | None = getattr(self.transformer, "_adapters_added", None)
        if loaded is None:
            dtype = self.transformer.dtype
            mode: SamplingMode = (LatentFlowModel(self).few_steps, {})
            loaded = Added(
                base=(type_name(dtype), weights_hash(self.transformer, dtype)),
                tokenizer=self.tokenizer,
                classes=LatentFlowModel(self).labels,
                num_classes=self.transformer.config.get("num_classes") or 0,
                own=mode,
                installed=mode,
                has_control=bool(self.transformer.config.get("control")),
                own_intervals=bool(self.transformer.config.get("interval_conditioning")),
            )
            self.transformer._adapters_added = loaded
        return loaded

    def _parts(self) -> dict[str, nn.Module]:
        """Return the parts that adapters change, as far as they are loaded."""
        return {part: module for part in PARTS if (module := getattr(self, part, None)) is not None}

    def _adapter_names(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}

    def _free_name(self) -> str:
        """Return default_0, default_1, ...: the number of adapters, or the next that is free."""
        taken = self._adapter_names()
        return next(name for n in count(len(taken)) if (name := f"default_{n}") not in taken)

    def _fused(self) -> set[str]:
        """Return the adapters that are fused now; diffusers' ``fused_loras`` counts unloaded ones as well."""
        layers = [layer for part in self._parts().values() for layer in part.modules()]
        return {name for layer in layers for name in getattr(layer, "merged_adapters", ())}

    def _weights(self, part: str) -> dict[str, float]:
        """Return adapter -> its weight in this part of the pipeline now; where some are fused, no others count."""
        loaded = self._added()
        active = [] if loaded.disabled else self._fused() or self.get_active_adapters()
        scale = loaded.scale.get(part, 1.0)
        return {name: scale * loaded.weights.get(name, {}).get(part, 1.0) for name in active}

    @torch.no_grad()
    def _renew(self) -> None:
        """Set words and classes as the adapters' weights have them: mean + scale * sum of weight * distance."""
        loaded = self._added()
        if self.text_encoder is not None and self.tokenizer is not None:
            sums = summed(loaded.fused_words, loaded.words, self._weights("text_encoder"))
            if sums or len(self.tokenizer) != len(loaded.tokenizer):
                self._set_words(loaded, sums)
        sums = summed(loaded.fused_labels, loaded.labels, self._weights("transformer"))
        if sums or LatentFlowModel(self).labels != loaded.classes:
            self._set_classes(loaded, sums)
        self._set_mode(loaded)
        self._set_control(loaded)

    def _set_words(self, loaded: Added, sums: Tensors) -> None:
        known = len(loaded.tokenizer)
        if len(self.tokenizer) != known + len(sums) or any(
            word not in self.tokenizer.get_vocab() for word in sums
        ):
            self.register_modules(tokenizer=with_words(loaded.tokenizer, sums) if sums else loaded.tokenizer)
            self.text_encoder.resize_token_embeddings(known + len(sums), mean_resizing=False)
        table = self.text_encoder.get_input_embeddings().weight
        if sums:
            ids = [self.tokenizer.get_vocab()[word] for word in sums]
            table[ids] = around_mean(table[:known], sums)

    def _set_mode(self, loaded: Added) -> None:
        """Put the sampling mode of the last active adapter that has one into effect, else that without adapters."""
        wanted = self._last_active(loaded.modes, loaded.own)
        if wanted is loaded.installed:
            return
        loaded.installed = wanted
        few, intervals = wanted
        self.transformer._few_steps = few
        usual = {entry.name: entry.default for entry in fields(FewSteps)} | {"step_counts": None}
        self.register_to_config(**(usual | few.plain()))
        if loaded.own_intervals:
            return
        self.transformer.register_to_config(interval_conditioning=bool(intervals))
        embedder = self.transformer.new_length_embedder() if intervals else None
        self.transformer.length_embedder = self._with_weights(embedder, intervals)

    def _set_control(self, loaded: Added) -> None:
        """Let the network take the control images of the last active adapter that brings the inputs, as strongly as its
        weight says; else none."""
        weights = self._weights("transformer") if loaded.controls else {}
        name = next((name for name in reversed([*weights]) if name in loaded.controls), None)
        wanted, weight = (loaded.own_control, 1.0) if name is None else (loaded.controls[name], weights[name])
        if wanted is loaded.installed_control and weight == loaded.control_weight:
            return
        loaded.installed_control, loaded.control_weight = wanted, weight
        control, tensors = weighted(wanted, weight) if wanted else (None, {})
        embedder = self.transformer.new_control_embedder(control)
        self.transformer.set_control_embedder(self._with_weights(embedder, tensors))
        self.transformer.register_to_config(control=control)

    def _last_active(self, brought: Mapping[str, Any], own: Any) -> Any:
        """Return what the last active adapter brings; ``own`` where none does."""
        for name in self._weights("transformer") if brought else ():
            own = brought.get(name, own)
        return own

    def _with_weights(self, part: Any, tensors: Tensors) -> Any:
        """Return a part that an adapter brings to the network, with its weights, frozen; None: it brings none."""
        if part is not None:
            part.load_state_dict(tensors)
            part.requires_grad_(False).to(self.transformer.device, self.transformer.dtype)
        return part

    def _set_classes(self, loaded: Added, sums: Tensors) -> None:
        embed = self.transformer.y_embedder
        table, known = embed.embedding_table.weight, loaded.num_classes
        base = torch.cat([table[:known], table[-1:]])
        rows = [base[:known], *([around_mean(base, sums)] if sums else []), base[known:]]
        names = {**loaded.classes, **{name: known + place for place, name in enumerate(sums)}}
        embed.embedding_table = nn.Embedding.from_pretrained(torch.cat(rows))
        embed.num_classes = known + len(sums)
        self.transformer.register_to_config(num_classes=known + len(sums))
        self.register_to_config(id2label={str(number): name for name, number in names.items()})


def _activate(network: nn.Module, name: str) -> None:
    """Let other adapters give way to this one in a network of which it has no layers."""
    if hasattr(network, "peft_config"):
        set_weights_and_activate_adapters(network, [name], [1.0])


def _by_part(weight: Any) -> dict[str, float]:
    """Return an adapter's weight in each part of the pipeline; diffusers also takes one for each block of a part.

    Raises:
        UserError: a weight is no finite number.
    """
    given = weight if isinstance(weight, dict) else dict.fromkeys(PARTS, weight)
    found: dict[str, float] = {}
    for part, value in given.items():
        if value is None or isinstance(value, dict):
            continue
        try:
            found[part] = float(value)
        except (TypeError, ValueError):
            found[part] = math.nan
        if not math.isfinite(found[part]):
            raise UserError(f"the weight of an adapter is {shown(value)}", "It must be a number such as 0.8.")
    return found
