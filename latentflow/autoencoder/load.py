"""Load any diffusers autoencoder, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from ..errors import UserError
from ..utils.components import about, library_reads, load_checked, load_module, may_be_on_the_hub
from ..utils.settings import CONFIG, read_settings
from .latents import Autoencoder, check_statistics


def load_autoencoder(name_or_path: str | Path, *, subfolder: str | None = None, **kwargs: Any) -> Autoencoder:
    """Load a diffusers autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel, ...), ready to use.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, a pipeline folder or hub id (its ``vae`` is taken).
        subfolder: folder of the autoencoder within; found automatically in a local pipeline folder.
        kwargs: handed to the class's ``from_pretrained`` (``torch_dtype``, ``variant``, ``revision``...).

    Returns:
        The autoencoder in evaluation mode. float16 weights of a class that overflows in float16 (``force_upcast`` in
        its config) are widened to float32.

    Raises:
        UserError: nothing loadable is there, its class is not an autoencoder of diffusers, weights and config do not
            belong together, or the statistics of its latents are invalid.
    """
    local = Path(name_or_path)
    if subfolder is None and (local / "vae" / "config.json").is_file():
        subfolder = "vae"
    folder = local / (subfolder or "")
    shown = f"the autoencoder in '{name_or_path}'"
    fix = "Give a folder written by save_pretrained (config.json and *.safetensors) or a reachable hub id."
    if not local.is_dir() and not may_be_on_the_hub(str(name_or_path)):
        raise UserError(f"no autoencoder at '{name_or_path}': there is no such folder", fix)
    if local.is_dir():
        if not (folder / CONFIG).is_file():
            raise UserError(f"no autoencoder at '{folder}': there is no {CONFIG}", fix)
        kind = _class_of(folder, read_settings(folder / CONFIG))
        vae: Autoencoder = load_module(kind, folder, shown, fix=fix, **kwargs)
    else:
        kind = _class_of(name_or_path, _config_of_hub(name_or_path, subfolder, kwargs))
        vae = load_checked(kind, str(name_or_path), shown, fix=fix, subfolder=subfolder, **kwargs)
    with about(shown):
        check_statistics(vae)
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae = vae.float()
    return vae


def _config_of_hub(name_or_path: str | Path, subfolder: str | None, kwargs: dict[str, Any]) -> Any:
    keys = ("revision", "cache_dir", "token", "local_files_only")
    handed_on = {key: kwargs[key] for key in keys if key in kwargs}
    fix = (
        "Give a local folder that holds config.json, or, when online, a hub id such as 'stabilityai/sd-vae-ft-mse' "
        "(download it once and pass the folder if this machine is offline)."
    )
    with library_reads(f"the autoencoder '{name_or_path}'", fix=fix):
        return diffusers.AutoencoderKL.load_config(name_or_path, subfolder=subfolder, **handed_on)


def _class_of(shown: object, config: Any) -> Any:
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and hasattr(cls, "encode")):
        raise UserError(
            f"'{shown}' holds a {name}, which is not an autoencoder of diffusers",
            "Expected AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel or another class with encode and decode.",
        )
    return cls
