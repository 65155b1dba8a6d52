"""Adapters (LoRA) of pretrained models: loaded by diffusers' own loader of the family, and checked afterwards.

That loader passes over a file that has nothing for the model, and only logs it.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import USE_PEFT_BACKEND
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError, few, plural, with_article
from ..families.text_encoders import text_encoders
from ..models import ControlInputs
from ..utils.components import about, is_finite, library_reads, without_reports
from ..utils.libraries import missing
from .adapter_bases import fingerprint, is_other_base, other_base
from .adapter_files import read_facts, without_inputs
from .adapter_layouts import model_of
from .offloading import weights_in_place

log = logging.getLogger(__name__)

# The first factor of a layer, as diffusers names it in the files of its families.
_FIRST_FACTOR = re.compile(r"[._](lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.|$)")


def load_adapter(
    pipeline: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str | None,
    *,
    any_base: bool = False,
    add_inputs: Callable[..., None] | None = None,
    **options: Any,
) -> None:
    """Load an adapter into a stock pipeline; one that is refused leaves the pipeline as it was.

    Layers of text encoders that the pipeline lacks are left out, with a warning.

    Args:
        pipeline: a pipeline of diffusers.
        source: file, folder, hub id, or tensors by name.
        name: what to call it; default: as diffusers does.
        any_base: accept one that was made for another base of the same family.
        add_inputs: gives the network the input channels that an adapter brings, see `ExtendableModel.add_inputs`; None:
            it cannot have any.
        options: of the pipeline's own ``load_lora_weights``.

    Raises:
        UserError: peft is missing; the pipeline has no loader; ``hotswap``; the name is taken; the adapter cannot be
            read, is not finite, was made for another base, or half of its layers or more have no place in this model;
            the model that it was made for is named where the file or its names tell it.
    """
    if not USE_PEFT_BACKEND:
        raise missing("adapters need", "peft")
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"diffusers' {kind} loads no adapters", "Leave the adapter out.")
    before = _adapter_names(pipeline)
    if options.get("hotswap"):
        place = f'"{name or next(iter(sorted(before)), "NAME")}"'
        raise UserError(
            "hotswap overwrites the weights of a loaded adapter, and one that does not fit could not be undone",
            f"pipe.delete_adapters({place}), then pipe.load_lora_weights(..., adapter_name={place}). A compiled "
            "network keeps its code only where the stock pipeline swaps, without these checks: "
            "pipe.model.pipeline.load_lora_weights(..., hotswap=True).",
        )
    if name in before:
        raise UserError(
            f"an adapter named '{name}' is loaded already",
            f"Choose another name, or take that one out first: pipe.delete_adapters('{name}').",
        )
    active = [(layer, layer.active_adapters) for _, layer in _layers(pipeline)]
    with weights_in_place(pipeline):
        if not any_base:
            _check_base(pipeline, source, options)
        try:
            _load(pipeline, source, name, options, add_inputs)
        except BaseException:
            if new := _adapter_names(pipeline) - before:
                pipeline.delete_adapters([*new])
                for layer, names in active:
                    layer.set_adapter(names)
            raise


def adapted_part(pipeline: Any) -> str | None:
    """Return the name of the network as the pipeline's loader of adapters has it; None without a loader of its own.

    PRX's is Stable Diffusion's, for a component that PRX lacks.
    """
    save = getattr(pipeline, "save_lora_weights", None)
    taken = {} if save is None else inspect.signature(save).parameters
    parts = (name for name in ("transformer", "unet") if f"{name}_lora_layers" in taken)
    return next((name for name in parts if name in pipeline.components), None)


def adapted_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return the text encoders for which the pipeline's loader has adapters, by the names of their components: CLIP's
    alone, as in diffusers' training programs."""
    save = getattr(pipeline, "save_lora_weights", None)
    taken = {} if save is None else inspect.signature(save).parameters
    return {
        name: part
        for name, part in text_encoders(pipeline).items()
        if f"{name}_lora_layers" in taken and type(part).__name__.startswith("CLIPText")
    }


def _check_base(
    pipeline: Any, source: str | os.PathLike[str] | Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """Refuse an adapter whose file has the fingerprint of another base."""
    shown = f"the adapter {source}"
    facts, network = read_facts(source, shown, options), getattr(pipeline, adapted_part(pipeline) or "", None)
    if not facts.base or network is None:
        return
    if is_other_base(facts.base, fingerprint(network)):
        raise other_base(shown, facts.base_name)


def _load(
    pipeline: Any,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str | None,
    options: Any,
    add_inputs: Callable[..., None] | None,
) -> None:
    """Load an adapter and check it; see `load_adapter`. An adapter that is refused may still be there afterwards."""
    shown, hint = "the adapter", ""
    if not isinstance(source, Mapping):
        shown, hint = f"the adapter {source}", _made_for(Path(source))
    kind = type(pipeline).__name__
    fix = f"Give a LoRA that was trained for this model, {with_article(kind)}.{hint}"
    before = _adapter_names(pipeline)
    with without_inputs(source, options) as (stock, place, inputs):
        with library_reads(shown, fix=fix), _absent_encoders_skipped(pipeline):
            pipeline.load_lora_weights(stock, adapter_name=name, **place)
        with without_reports():
            state = pipeline.lora_state_dict({**stock} if isinstance(stock, Mapping) else stock, **place)
    new = _adapter_names(pipeline) - before
    loaded = [(where, layer) for where, layer in _layers(pipeline) if new & {*layer.lora_A}]
    for _, layer in loaded:
        layer.lora_dropout.eval()  # a dropout that the file's settings name is loaded in training mode
    keys = [key for key in (state[0] if isinstance(state, tuple) else state) if _FIRST_FACTOR.search(key)]
    absent = {part for part, value in pipeline.components.items() if value is None}
    skipped = [key for key in keys if key.partition(".")[0] in absent]
    if skipped:
        lacking = few(sorted({key.partition(".")[0] for key in skipped}))
        log.warning(
            "left out, as the pipeline has no %s: %s of %s", lacking, plural(len(skipped), "layer"), shown
        )
    if not loaded:
        raise UserError(f"{shown} has no layer of this model", fix)
    asked = len(keys) - len(skipped)
    left_out = plural(asked - len(loaded), "layer")
    if len(loaded) <= asked / 2:  # families name some layers alike
        raise UserError(f"{left_out} of {shown} have no place in this model, {len(loaded)} have", fix)
    damaged = [
        where
        for where, layer in loaded
        for factors in (layer.lora_A, layer.lora_B)
        for adapter in new & {*factors}
        if not is_finite(factors[adapter].weight)
    ]
    damaged += [f"its input channels ({of})" for (of, _), weight in inputs.items() if not is_finite(weight)]
    if damaged:
        raise UserError(f"{shown} is not finite in {few(damaged, 3)}", "Copy or download it again.")
    if len(loaded) < asked:
        log.warning("left out for lack of a place in this %s: %s of %s", kind, left_out, shown)
    if inputs:
        if add_inputs is None:
            kinds = " and ".join(of for of, _ in inputs if of != "table")
            raise UserError(
                f"{shown} brings input channels for {kinds}, which {with_article(kind)} cannot be given", fix
            )
        facts = read_facts(source, shown, options)
        with about(shown):
            weights = {of: weight for (of, _), weight in inputs.items()}
            coupling = next((coupling for of, coupling in inputs if of == "masks"), "independent")
            add_inputs(weights, next(iter(new)), coupling, ControlInputs.of(facts.control or None).labels)


def _adapter_names(pipeline: Any) -> set[str]:
    return {name for part in pipeline.get_list_adapters().values() for name in part}


@contextmanager
def _absent_encoders_skipped(pipeline: Any) -> Iterator[None]:
    """Let the pipeline's loader pass over the layers of text encoders that the pipeline lacks, within."""
    load = getattr(pipeline, "load_lora_into_text_encoder", None)

    def load_if_there(*given: Any, text_encoder: Any, **options: Any) -> None:
        if text_encoder is not None and load is not None:
            load(*given, text_encoder=text_encoder, **options)

    vars(pipeline)["load_lora_into_text_encoder"] = load_if_there
    try:
        yield
    finally:
        del vars(pipeline)["load_lora_into_text_encoder"]


def _layers(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of all layers that have factors."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            for where, layer in part.named_modules():
                if hasattr(layer, "lora_A") and hasattr(layer, "lora_B"):
                    yield f"{name}.{where}", layer


def _made_for(source: Path) -> str:
    """Return a sentence that names the model of which a local file's layers are, or ""."""
    file = next(iter(sorted(source.glob("*.safetensors"))), source) if source.is_dir() else source
    try:
        model = model_of(load_file(file), None)
    except (OSError, SafetensorError):
        return ""
    return f" This one looks like one for {model}." if model else ""
