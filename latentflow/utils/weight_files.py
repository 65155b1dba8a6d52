"""Files of weights: which there are in a folder, of which variant and type, by their names and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, reading
from .files import MEND, read_settings
from .single_files import weight_shapes

if TYPE_CHECKING:
    import torch

_STEMS = ("diffusion_pytorch_model", "model")  # names of files of weights: diffusers', transformers'


def stored_weights(folder: Path, variant: str | None = None) -> dict[str, tuple[str, int]] | None:
    """Return name -> (type, count of numbers) of the weights in ``folder``'s safetensors files, by their headers.

    Args:
        variant: see ``from_pretrained``, such as "fp16".

    Returns:
        None where the folder has no safetensors files.

    Raises:
        UserError: a file or its index is damaged.
    """
    files = weight_files(folder, variant)
    return None if files is None else weights_in(files)


def weights_in(files: Iterable[Path]) -> dict[str, tuple[str, int]]:
    """Return name -> (type, count of numbers) of the weights in safetensors files, by their headers.

    Raises:
        UserError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, int]] = {}
    for file in files:
        with reading(file, OSError, SafetensorError, fix=MEND), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                weight = opened.get_slice(name)
                found[name] = weight.get_dtype(), math.prod(weight.get_shape())
    return found


def weight_files(folder: Path, variant: str | None) -> list[Path] | None:
    """Return the safetensors files in ``folder`` that the libraries read, or None where it has none.

    Args:
        variant: see ``from_pretrained``, such as "fp16".

    Raises:
        UserError: their index is damaged.
    """
    end = f".{variant}" if variant else ""
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index{end}.json"
        if index.is_file():
            places = read_settings(index).get("weight_map")
            if not isinstance(places, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in places.values()
            ):
                raise UserError(f"{index}: weight_map does not name files beside it", MEND)
            return [folder / file for file in sorted({*places.values()})]
        if (folder / f"{stem}{end}.safetensors").is_file():
            return [folder / f"{stem}{end}.safetensors"]
    return None


def check_weight_files(folder: Path) -> None:
    """Refuse a pipeline folder in which a file of weights is missing or damaged, by the headers of all that it has.

    Raises:
        UserError: names the file.
    """
    for index in folder.glob("*/*.safetensors.index*.json"):
        named = read_settings(index).get("weight_map")
        for name in sorted({*named.values()}) if isinstance(named, dict) else ():
            if not (index.parent / str(name)).is_file():
                raise UserError(
                    f"{index.parent / str(name)} is missing", "Download it: the folder is not complete."
                )
    for file in folder.glob("*/*.safetensors"):
        weight_shapes(file)


def variants(folder: Path) -> list[str]:
    """Return the variants of the weights in ``folder``, such as "fp16" of ``model.fp16.safetensors`` or its shards."""
    return sorted({file.name.split(".")[1].partition("-")[0] for file in folder.glob("*.*.safetensors")})


def check_variant(folder: Path, parts: Iterable[str], variant: Any) -> None:
    """Refuse a variant of which none of a pipeline's ``parts``, folders in ``folder``, has weights.

    Raises:
        UserError: names those that are there.
    """
    there = {name: variants(folder / name) for name in parts}
    if not any(variant in names for names in there.values()):
        found = sorted({name for names in there.values() for name in names})
        fix = f"There are {', '.join(found)}." if found else "Its weights have no variants: leave it out."
        what = f"You are trying to load the model files of the `variant={variant}`"  # diffusers' words
        raise UserError(f"{what}, but {folder} has none", fix)


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """Return the type of most numbers in ``folder``'s weights; see `dtype_of`."""
    return dtype_of(stored_weights(folder, variant) or {})


def dtype_of(weights: Mapping[str, tuple[str, int]]) -> torch.dtype:
    """Return the type of most floating-point numbers in weights, of those in which networks compute: quantised weights
    do not count. float32 where there are none.

    Args:
        weights: see `stored_weights`.
    """
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    counts: Counter[str] = Counter()
    for kind, count in weights.values():
        if kind in types:
            counts[kind] += count
    return types[max(counts, key=counts.__getitem__, default="F32")]
