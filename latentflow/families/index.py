"""Index of a pipeline folder or hub repository: of which class it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..utils.components import library_reads
from ..utils.files import pipeline_folder, read_settings

#: options of ``from_pretrained`` that say where and how files of the hub are found
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def pipeline_class(name_or_path: str | os.PathLike[str], **options: Any) -> Any:
    """Return the class name in a pipeline's index; of a hub repository nothing else is fetched.

    Args:
        options: of ``from_pretrained``; those of the hub (``HUB_OPTIONS``) count.

    Raises:
        UserError: there is no such folder, and no hub repository of this name can be read.
    """
    return read_index(name_or_path, **options).get("_class_name")


def read_index(name_or_path: str | os.PathLike[str], **options: Any) -> Mapping[str, Any]:
    """Return a pipeline's index, see `pipeline_class`: its class, and [module, class] of each component."""
    folder = pipeline_folder(name_or_path)
    if folder is not None:
        return read_settings(folder / DiffusionPipeline.config_name)
    what = f"no folder '{name_or_path}', and the hub repository of that name"
    with library_reads(what, fix="Check the spelling and the network; offline, pass a local folder."):
        index: Mapping[str, Any] = DiffusionPipeline.load_config(str(name_or_path), **hub_options(options))
    return index


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that say where and how files of the hub are found."""
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
