"""Single files of weights: what is in one, by its header alone, and which of them is the model of a pipeline."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import CONFIG
from .names import near_path

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
ENDINGS = (".safetensors", ".gguf", *PICKLES)
DOWNLOAD = "Download the file again, in full."
#: a weight that the original networks of SiT, DiT, REPA and LightningDiT have, and no other
ORIGINAL_WEIGHT = "y_embedder.embedding_table.weight"
_BASE = "Give the model that it belongs to"
#: what a file may hold instead of a model, a pattern of names of weights that only it has, and what to do
_PARTS = (
    ("an adapter (LoRA)", r"lora_|lora\.(up|down)|\.lo(kr|ha)_|hada_w", f"{_BASE}, and the file as --lora FILE."),
    (
        "a ControlNet",
        r"^(control_model\.|controlnet_|control_layers\.|control_all_x_embedder\.|input_hint_block\.)",
        f"{_BASE}: latentflow draws without ControlNets.",
    ),
    (
        "a text encoder",
        r"^(text_model\.|encoder\.block\.|shared\.weight|transformer\.resblocks\.|model\.(embed_tokens|language_model)\.)",
        f"{_BASE}: text encoders are read from its pipeline folder.",
    ),
    (
        "an autoencoder",
        r"^((first_stage_model\.|vae\.)?decoder\.)",
        f"{_BASE}. `latentflow train` takes an autoencoder's folder as --vae.",
    ),
)  # fmt: skip
#: beginnings of names of a network's weights, in files that hold its autoencoder and text encoders too
_NETWORK = r"^model\.diffusion_model\."


def is_single_file(name: object) -> bool:
    """Return whether a name is that of a file of weights, which may be missing; folders and hub ids are none."""
    path = Path(str(name))
    return path.is_file() or (path.suffix.lower() in ENDINGS and not path.is_dir())


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the weights in a safetensors or GGUF file, by its header.

    Raises:
        UserError: there is no such file; it is truncated, or of another format.
    """
    if not file.is_file():
        raise UserError(f"no file '{file}'", f"{near_path(str(file))}Check the path.")
    if file.suffix.lower() == ".gguf":
        return _gguf_shapes(file)
    if file.suffix.lower() in PICKLES:
        raise pickled(file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(file) from error


def _gguf_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        from .libraries import missing

        raise missing("GGUF files need", "gguf", instead="give the model's .safetensors file") from error
    try:
        return {
            tensor.name: tuple(int(side) for side in reversed(tensor.shape))
            for tensor in gguf.GGUFReader(file).tensors
        }
    except (OSError, ValueError, LookupError) as error:
        raise _unreadable(file) from error


def pickled(file: object) -> UserError:
    """Build the error for pickled weights, which are read of a few networks only, since pickles can hold code."""
    return UserError(
        f"{file} holds pickled weights",
        f"Of SiT, DiT, REPA and LightningDiT they are read: latentflow import {file} --vae FOLDER_OR_HUB_ID -o FOLDER. "
        "Of any other model, take its .safetensors file, or convert them to one.",
    )


def _unreadable(file: Path) -> UserError:
    """Build the error for a file that is not what its name says."""
    with file.open("rb") as opened:
        start = opened.read(256)
    if not start:
        return UserError(f"{file} is empty", DOWNLOAD)
    if start.startswith(b"version https://git-lfs"):
        return UserError(f"{file} is a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull.")
    if start.lstrip()[:1] == b"<":
        return UserError(f"{file} is a web page, not a file of weights", DOWNLOAD)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return pickled(file)
    # A safetensors file begins with the length of its header, which begins with a brace.
    known = start.startswith(b"GGUF") if file.suffix.lower() == ".gguf" else start[8:9] == b"{"
    if known:
        return UserError(f"{file} is truncated or damaged", DOWNLOAD)
    return UserError(f"{file} is no file of weights", "Give a .safetensors or .gguf file, in full.")


def is_original(file: Path) -> bool:
    """Return whether a file may hold original weights of SiT and the like: it is pickled, or its header says so."""
    return file.suffix.lower() in PICKLES or ORIGINAL_WEIGHT in weight_shapes(file)


def check_single_file(file: Path, config: object = None) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the weights in a file that may be a model; refuse any other.

    Args:
        config: folder or hub id of its pipeline; without one, a file in the folder of a component is refused.

    Raises:
        UserError: see `weight_shapes`; the file is an adapter, an autoencoder, a ControlNet, a text encoder, one of
            several shards, original weights of SiT and the like, or a component of a pipeline folder.
    """
    shapes = weight_shapes(file)
    if ORIGINAL_WEIGHT in shapes:
        raise original(file)
    if found := part_of_a_model(shapes):
        what, fix = found
        raise UserError(f"{file} is {what}, not a model that draws", fix)
    if re.search(r"-\d{5}-of-\d{5}\.", file.name):
        raise UserError(f"{file} is one of several shards", "Give the pipeline folder that holds them all.")
    if config is None and (file.parent / CONFIG).is_file():
        folder = file.resolve().parent
        inside = (folder.parent / "model_index.json").is_file()
        raise UserError(
            f"{file} is the file of weights of a component, '{folder.name}'",
            f"Give the pipeline folder: {folder.parent}."
            if inside
            else "Give the folder of a whole pipeline.",
        )
    return shapes


def original(file: Path) -> UserError:
    """Build the error for original weights of SiT and the like, without their autoencoder."""
    return UserError(
        f"{file} holds original weights of SiT, DiT, REPA or LightningDiT, without their autoencoder",
        f"Make a checkpoint of it: latentflow import {file} --vae FOLDER_OR_HUB_ID -o FOLDER. In Python: "
        f"FlowModel.from_single_file(file, vae=...).",
    )


def part_of_a_model(names: Iterable[str]) -> tuple[str, str] | None:
    """Return what a file is that holds weights of these names, and what to do; None where it may be a model."""
    listed = [*names]
    whole = any(re.search(_NETWORK, name) for name in listed)
    for what, pattern, fix in _PARTS:
        if any(re.search(pattern, name) for name in listed) and not (whole and "LoRA" not in what):
            return what, fix
    return None
