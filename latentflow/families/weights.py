"""Weights of a pretrained pipeline, before they are read: the variants that there are, and their precision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..errors import UserError
from ..utils.components import library_reads
from ..utils.files import FETCH_AGAIN, pipeline_folder, read_settings
from ..utils.weight_files import check_variant, dtype_of, stored_dtype, variants, weight_files, weights_in

#: value of ``dtype`` that keeps each component in the precision of its file
AS_STORED = "auto"


def loading_options(name_or_path: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``DiffusionPipeline.from_pretrained`` as diffusers takes them, checked against the files.

    ``dtype="auto"`` becomes the stored precision of each component; files of the hub are fetched for that.

    Raises:
        UserError: the folder has no weights of the variant, or has weights of a variant only and none is named.
    """
    folder, dtype = pipeline_folder(name_or_path), options.get("dtype", options.get("torch_dtype"))
    as_stored = isinstance(dtype, str) and dtype == AS_STORED
    if as_stored:
        options = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
        if folder is None:
            with library_reads(f"the hub repository '{name_or_path}'", fix="Check the name and the network."):
                folder = Path(DiffusionPipeline.download(str(name_or_path), **options))
    if folder is None:
        return {**options}
    parts, variant = _parts(folder, options), options.get("variant")
    if variant is not None:
        check_variant(folder, parts, variant)
    elif options.get("use_safetensors"):
        _check_plain(folder, parts)
    if as_stored:
        return {**options, "dtype": _stored(folder, parts, variant)}
    return {**options}


def single_file_options(file: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``from_single_file`` with the stored precision in the place of ``dtype="auto"``; that of a GGUF
    file is left to its reader."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    if not (isinstance(dtype, str) and dtype == AS_STORED):
        return {**options}
    plain = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
    return plain if file.suffix.lower() == ".gguf" else {**plain, "dtype": dtype_of(weights_in([file]))}


def fix_of(options: Mapping[str, Any]) -> str:
    """Return advice for a pipeline that cannot be read with these options."""
    placing = [name for name in ("device_map", "quantization_config") if options.get(name) is not None]
    return (
        f"If the files are whole, change {' and '.join(placing)}, or leave it out."
        if placing
        else FETCH_AGAIN
    )


def _parts(folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Return the components of a pipeline that have weights in its folder, but for those that are given."""
    index = read_settings(folder / DiffusionPipeline.config_name)
    names = [
        name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None
    ]
    return [name for name in names if name not in options and any((folder / name).glob("*.safetensors"))]


def _check_plain(folder: Path, parts: Iterable[str]) -> None:
    """Refuse components whose only weights are of a variant."""
    for name in parts:
        there = variants(folder / name)
        if there and weight_files(folder / name, None) is None:
            raise UserError(
                f"{folder / name} holds weights of the variant {' and '.join(there)} only",
                f'Name it: variant="{there[0]}", or --variant {there[0]}.',
            )


def _stored(folder: Path, parts: Iterable[str], variant: str | None) -> dict[str, torch.dtype]:
    """Return component -> precision of its file; a component without a file of the variant has a plain one."""
    found = {
        name: stored_dtype(folder / name, variant if weight_files(folder / name, variant) else None)
        for name in parts
    }
    return {**found, "default": torch.float32}
