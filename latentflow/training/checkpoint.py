"""Checkpoints of a run: everything the loop needs, written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

log = logging.getLogger(__name__)

State = dict[str, Any]
_TENSOR = "__tensor__"


def save_checkpoint(folder: Path, state: State, *, total_limit: int) -> None:
    """Write ``state`` as ``folder`` (``step-001000``) and remove the oldest beyond ``total_limit``.

    Args:
        folder: its parent holds the run's checkpoints; a temporary folder beside it is renamed when complete.
        state: nested dicts and lists of tensors, numbers, strings, booleans and None. Each top-level entry that holds
            tensors becomes one safetensors file.
        total_limit: checkpoints kept, at least 1.
    """
    write_folder(folder, lambda temporary: _write_state(temporary, state))
    for old in list_checkpoints(folder.parent)[: -max(1, total_limit)]:
        shutil.rmtree(old)


def _write_state(folder: Path, state: State) -> None:
    folder.mkdir(parents=True)
    plain: State = {}
    for name, value in state.items():
        tensors: dict[str, Tensor] = {}
        plain[name] = _strip_tensors(value, name, tensors)
        if tensors:
            save_file(
                {key: one.detach().cpu().contiguous() for key, one in tensors.items()},
                folder / f"{name}.safetensors",
            )
    hashes = {file.name: _sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    _write_synced(folder / "state.json", json.dumps({"state": plain, "sha256": hashes}))


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, and put it in the place of ``folder``, an earlier one of this run."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)  # left by a run that was killed while writing
    write(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def load_checkpoint(folder: Path) -> State:
    """Read what `save_checkpoint` wrote.

    Raises:
        UserError: a file is missing, damaged or was changed.
    """
    try:
        document = json.loads((folder / "state.json").read_text())
        tensors: dict[str, Tensor] = {}
        for name, expected in document["sha256"].items():
            if _sha256(folder / name) != expected:
                raise ValueError(f"{name} differs from what was written")
            tensors |= load_file(folder / name)
        state: State = _restore_tensors(document["state"], tensors)
        return state
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}") from error


def load_latest(root: Path) -> State | None:
    """The newest checkpoint that can be read; damaged ones are passed over, loudly, and left in place.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = list_checkpoints(root)
    for folder in reversed(found):
        try:
            return load_checkpoint(folder)
        except UserError as error:
            log.warning("WARNING: %s; falling back to the one before it", error.what)
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {root} are damaged",
            "Move the run folder away to start anew, or restore one of them from a backup.",
        )
    return None


def _strip_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by their names, and gather them; dict keys keep their type through a list of pairs."""
    if isinstance(value, Tensor):
        # Tied weights share memory, which safetensors refuses: a copy costs little here.
        tensors[path] = value.clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {
            "__items__": [[key, _strip_tensors(one, f"{path}/{key}", tensors)] for key, one in value.items()]
        }
    if isinstance(value, (list, tuple)):
        return [_strip_tensors(one, f"{path}/{index}", tensors) for index, one in enumerate(value)]
    return value


def _restore_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        return tensors[value[_TENSOR]]
    if isinstance(value, dict) and "__items__" in value:
        return {key: _restore_tensors(one, tensors) for key, one in value["__items__"]}
    if isinstance(value, dict):  # the top level
        return {key: _restore_tensors(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_restore_tensors(one, tensors) for one in value]
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def difference(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Lines that say where two nested descriptions differ: ``network.depth: 8 -> 12``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {old} -> {new}"


def random_state() -> State:
    """The state of torch's own generators (dropout and the like draw from them)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: State) -> None:
    """Restore what `random_state` returned (CUDA's only on as many devices as were saved)."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
