"""Load any diffusers autoencoder, from a folder or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import UserError
from .latents import Autoencoder


def load_autoencoder(name_or_path: str | Path, *, subfolder: str | None = None, **kwargs: Any) -> Autoencoder:
    """A diffusers autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel and their kin), ready to use.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, a pipeline folder or hub id (its ``vae`` is taken).
        subfolder: where in it the autoencoder lies; found by itself for a local pipeline folder.
        kwargs: handed to the class's ``from_pretrained`` (``torch_dtype``, ``variant``, ``revision``...).

    Returns:
        The autoencoder in evaluation mode. float16 weights of a class that overflows in float16 (``force_upcast`` in
        its config) are widened to float32.

    Raises:
        UserError: nothing loadable is there, or its class is not an autoencoder of diffusers.
    """
    local = Path(name_or_path)
    if subfolder is None and (local / "vae" / "config.json").is_file():
        subfolder = "vae"
    config_class = _class_named_in(name_or_path, subfolder, kwargs)
    try:
        vae = config_class.from_pretrained(name_or_path, subfolder=subfolder, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the autoencoder in '{name_or_path}' could not be loaded: {_first_line(error)}",
            "Give a folder written by save_pretrained (config.json and *.safetensors) or a reachable hub id.",
        ) from error
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae = vae.float()
    return vae.eval()


def _class_named_in(name_or_path: str | Path, subfolder: str | None, kwargs: dict[str, Any]) -> Any:
    keys = ("revision", "cache_dir", "token", "local_files_only")
    try:
        config = diffusers.AutoencoderKL.load_config(
            name_or_path, subfolder=subfolder, **{key: kwargs[key] for key in keys if key in kwargs}
        )
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"no autoencoder at '{name_or_path}': {_first_line(error)}",
            "Give a local folder that holds config.json, or, when online, a hub id such as "
            "'stabilityai/sd-vae-ft-mse' (download it once and pass the folder if this machine is offline).",
        ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls = getattr(diffusers, str(name), None)
    if cls is None or not hasattr(cls, "encode") or not hasattr(cls, "decode"):
        raise UserError(
            f"'{name_or_path}' holds a {name}, which is not an autoencoder of diffusers",
            "Expected AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel or another class with encode and decode.",
        )
    return cls


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
