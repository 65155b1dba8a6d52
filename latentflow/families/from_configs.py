"""A flow model without weights, from the configs of its pipeline alone: its sizes are counted before it is fetched."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from torch import nn

from ..errors import UserError
from ..utils.components import component_class, library_reads
from . import family_of
from .index import hub_options, read_index
from .left_out import what_to_do
from .pretrained import PretrainedModel

# parts of the names of components that are files of their own: words and settings of images
_READ_FILES = ("tokenizer", "processor", "extractor")


def model_from_configs(
    name_or_path: str | os.PathLike[str], family_options: Mapping[str, Any] | None = None, **options: Any
) -> PretrainedModel:
    """Build a pretrained model of diffusers on the meta device: modules have shapes and no memory, tokenizers are None.

    Of a hub repository the index and one config for each component are fetched, and no weights.

    Args:
        name_or_path: pipeline folder or hub id.
        family_options: arguments of the stock pipeline's call in place of their defaults.
        options: those of ``from_pretrained`` that say where the hub's files are found.

    Raises:
        UserError: there is no such pipeline; a config cannot be read; its class is of no pretrained family.
    """
    index = read_index(name_or_path, **options)
    kind = str(index.get("_class_name"))
    family, pipeline = family_of(kind), getattr(diffusers, kind, None)
    if pipeline is None or family is None or not issubclass(family, PretrainedModel):
        raise UserError(f"{name_or_path} is a {kind}, no pretrained model of diffusers", what_to_do(kind))
    file = f"{name_or_path}/{DiffusionPipeline.config_name}"
    taken, values = inspect.signature(pipeline).parameters, {}
    what = f"'{name_or_path}', without its weights,"
    with library_reads(what, fix="Check the name and the network. A few pipelines need more than configs."):
        for name, entry in index.items():
            if name not in taken:
                continue
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str | None)):
                values[name] = entry  # a plain setting
            elif entry[0] is None or any(word in name for word in _READ_FILES):
                values[name] = _processor(entry, str(name_or_path), name, hub_options(options))
            else:
                made = component_class(file, name, entry, object)
                values[name] = _from_config(made, str(name_or_path), name, hub_options(options))
        stock = pipeline(**values)
        stock.register_to_config(_name_or_path=str(name_or_path))  # by which `distilled` knows some
        return family(stock, **(family_options or {}))


def _processor(entry: list[str | None], source: str, name: str, options: dict[str, Any]) -> Any:
    """Return a processor of transformers, which a few pipelines ask for their template of prompts; else None."""
    if "processor" not in name or entry[0] != "transformers":
        return None
    with suppress(OSError, ValueError, ImportError):
        return component_class(source, name, entry, object).from_pretrained(source, subfolder=name, **options)
    return None


def _from_config(kind: Any, source: str, name: str, options: dict[str, Any]) -> Any:
    # A scheduler's tables are small, and needed.
    with nullcontext() if issubclass(kind, SchedulerMixin) else torch.device("meta"):
        if issubclass(kind, ConfigMixin):
            made = kind.from_config(kind.load_config(source, subfolder=name, **options))
        elif issubclass(kind, transformers.PreTrainedModel):
            made = kind(kind.config_class.from_pretrained(source, subfolder=name, **options))
        else:
            raise ValueError(f"a {kind.__name__} has no config")
    return made.eval().requires_grad_(False) if isinstance(made, nn.Module) else made
