"""Checkpoints: all that the loop needs of a run, written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...config import LoopConfig
from ...errors import UserError
from ...utils.files import read_settings, save_tensors
from .distributed import local, together
from .run_folder import begin_folder, finish_folder, hidden, remove_folder, system_errors, write_folder

log = logging.getLogger(__name__)

State = dict[str, Any]
_TENSOR = "__tensor__"
CHECKPOINT_NAME = r"step-\d+"


@dataclass(frozen=True)
class Snapshot:
    """A state as it was at one instant, in CPU memory of its own: training goes on without changing it.

    Attributes:
        plain: the state with the names of tensors in their places.
        files: name of a file -> name -> tensor, contiguous; each top-level entry that holds tensors is one file.
    """

    plain: State = field(default_factory=dict)
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the tensors, over all processes."""
        tensors = (tensor for file in self.files.values() for tensor in file.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def snapshot(state: State, reuse: Snapshot | None = None, mesh: DeviceMesh | None = None) -> Snapshot:
    """Copy ``state``: nested dicts and lists of tensors, numbers, strings, booleans and None.

    Args:
        state: what to copy.
        reuse: an earlier snapshot whose memory may be overwritten (fresh memory costs several times the copy).
        mesh: the processes on their CPUs, in a sharded run.
    """
    taken, earlier = Snapshot(), reuse or Snapshot()
    on_gpu = False
    for name, value in state.items():
        tensors: dict[str, Tensor] = {}
        taken.plain[name] = _strip_tensors(value, name, tensors)
        on_gpu |= any(tensor.is_cuda for tensor in tensors.values())
        if tensors:
            buffers = earlier.files.get(name, {})
            taken.files[name] = {
                key: _copied(tensor, buffers.get(key), mesh) for key, tensor in tensors.items()
            }
    if on_gpu:
        torch.cuda.synchronize()  # the copies above were only begun
    return taken


def write_checkpoint(folder: Path, taken: Snapshot, *, total_limit: int) -> None:
    """Write a snapshot as ``folder`` (``step-001000``); then remove the oldest before it, beyond ``total_limit``.

    Raises:
        OSError: it could not be written; every earlier checkpoint is still there.
    """
    write_folder(folder, lambda temporary: _write(temporary, taken))
    _remove_oldest(folder, total_limit)


def write_shards(folder: Path, taken: Snapshot, group: dist.ProcessGroup, *, total_limit: int) -> None:
    """Write a checkpoint by all processes of a sharded run, each of them its share; ``folder`` is seen by all.

    Raises:
        OSError: in every process, if one of them could not write. What was written is removed, every earlier
            checkpoint is still there.
    """
    main = dist.get_rank(group) == 0
    tensors = {key: tensor for file in taken.files.values() for key, tensor in file.items()}
    if not main:  # tensors that are the same in all processes are written by the main one
        tensors = {key: tensor for key, tensor in tensors.items() if isinstance(tensor, DTensor)}
    temporary = hidden(folder, "tmp")

    def prepare() -> None:
        if main:
            begin_folder(folder)

    def write() -> None:
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with system_errors():
            try:
                save(tensors, storage_writer=writer, process_group=group)
            except CheckpointException as error:  # of all processes that failed: the first one's
                raise next(iter(error.failures.values()))[0] from error

    def finish() -> None:
        if main:
            _write_plain(temporary, taken)
            finish_folder(folder)
            _remove_oldest(folder, total_limit)

    try:
        for action in (prepare, write, finish):
            together(action, group)
    except Exception:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_oldest(folder: Path, total_limit: int) -> None:
    older = [other for other in list_checkpoints(folder.parent) if step_of(other) < step_of(folder)]
    for old in older[: max(0, len(older) + 1 - max(1, total_limit))]:
        remove_folder(old)


def _copied(tensor: Tensor, buffer: Tensor | None, mesh: DeviceMesh | None) -> Tensor:
    if isinstance(tensor, DTensor):
        assert mesh is not None
        copy = _copied(tensor.to_local(), None if buffer is None else local(buffer), None)
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(copy, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor.detach(), non_blocking=True)


def _write(folder: Path, taken: Snapshot) -> None:
    for name, tensors in taken.files.items():
        save_tensors(tensors, folder / f"{name}.safetensors")
    _write_plain(folder, taken)


def _write_plain(folder: Path, taken: Snapshot) -> None:
    """Write all but the tensors, which are there already."""
    hashes = {file.name: _sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    document = {"state": taken.plain, "sha256": hashes, "state_sha256": _hash_of(taken.plain)}
    (folder / "state.json").write_text(json.dumps(document))


def _hash_of(plain: State) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints below ``root``, oldest first."""
    found = [
        path for path in root.glob("step-*") if re.fullmatch(CHECKPOINT_NAME, path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of)


def has_begun(output: Path) -> bool:
    """Return whether the config.yaml of a run folder is that of a run that has made something.

    It stays until the run goes on: a line that the run refuses must not change what the run is resumed with.
    """
    return (output / "config.yaml").is_file() and (
        bool(list_checkpoints(output / "checkpoints")) or (output / "prior").is_dir()
    )


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


Place = Callable[[str, torch.Size, torch.dtype], Tensor]


def _on_cpu(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def load_checkpoint(folder: Path, place: Place = _on_cpu) -> State:
    """Read what `write_checkpoint` or `write_shards` wrote, by whatever number of processes.

    Args:
        folder: the checkpoint.
        place: (name, shape, dtype) -> the tensor to read into; a sharded one gets this process's part.

    Raises:
        UserError: a file is missing, damaged or was changed.
    """
    with _damage_of(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads what it needs
        plain = _verified(folder)
        reader = HuggingFaceStorageReader(str(folder))
        found: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = {key: place(key, entry.size, entry.properties.dtype) for key, entry in found.items()}
        load(tensors, storage_reader=reader, no_dist=True)
        state: State = _restored(plain, tensors)
    return state


def _verified(folder: Path) -> State:
    """Return the plain part of a checkpoint, after checking that all files are as they were written."""
    document = read_settings(folder / "state.json")
    plain, hashes = document.get("state"), document.get("sha256")
    if not isinstance(plain, dict) or not isinstance(hashes, dict):
        raise UserError("state.json is not what was written")
    if document.get("state_sha256", _hash_of(plain)) != _hash_of(plain):  # older ones have none
        raise UserError("state.json differs from what was written")
    for name, expected in hashes.items():
        if _sha256(folder / Path(name).name) != expected:
            raise UserError(f"{name} differs from what was written")
    return plain


@contextmanager
def _damage_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError, safetensors.SafetensorError, CheckpointException) as error:
        raise UserError(f"checkpoint {folder} is damaged: {getattr(error, 'what', error)}") from error


def load_latest(root: Path, place: Place = _on_cpu) -> State | None:
    """Read the newest checkpoint that is whole; damaged ones are passed over with a warning, and left in place.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = list_checkpoints(root)
    for folder in reversed(found):
        try:
            return load_checkpoint(folder, place)
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
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {
            "__items__": [
                [key, _strip_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return [_strip_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_strip_tensors`."""
    if isinstance(value, dict) and _TENSOR in value:
        if value[_TENSOR] not in tensors:
            raise UserError(f"the tensor {value[_TENSOR]} is missing")
        return tensors[value[_TENSOR]]
    if isinstance(value, dict):
        items = value["__items__"] if "__items__" in value else value.items()  # the top level has no pairs
        return {key: _restored(item, tensors) for key, item in items}
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each difference of two nested descriptions: ``network.depth: 8 -> 12``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {old} -> {new}"


def refuse_changes(
    output: Path, state: State, now: dict[str, Any], config: LoopConfig, processes: int
) -> None:
    """Refuse to go on from ``state`` where the description of the run is another one ``now``.

    Raises:
        UserError: the differences; not with ``config.allow_changes``.
    """
    before = state["description"]
    # A finished stage: nothing is left of which the batch could change anything.
    if state["step"] >= config.max_train_steps:
        before = before | {"batch": now["batch"]}
    changes = list(_changes(before, now))
    if config.allow_changes:
        for line in changes:
            log.info(f"changed since step {state['step']}, as allowed: {line}")
        return
    if not changes:
        return
    shapes = [line for line in changes if _SHAPE.fullmatch(line)]
    fix = "Use another output folder, undo the changes, or pass --allow-changes to go on all the same."
    if shapes:  # nothing allows that
        changes = [line for line in changes if line not in shapes]
        changes.append(f"weights of another shape: {len(shapes)}, such as {shapes[0]}")
        fix = "Use another output folder, or undo the changes: these weights do not fit the new network."
    batch = before.get("batch")
    if batch != now["batch"]:
        fix += (
            f" A step has train-batch-size x gradient-accumulation-steps x processes samples: here that must be "
            f"{batch}, over {processes} processes."
        )
    raise UserError(
        f"the run in {output} (step {state['step']}) was made with other settings:\n  "
        + "\n  ".join(changes[:12]),
        fix,
    )


# A line of `difference` on a weight that has another shape, or is there in one of the two networks only.
_SHAPE = re.compile(r"network\..+: (None|\[[\d, ]*\]) -> (None|\[[\d, ]*\])")

#: parts of a description that runs of earlier versions did not write: of those runs they count as unchanged
_LATER = ("data_order", "architecture", "autoencoder", "images", "optimizer")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each difference; those of hashes, which say nothing to people, in words."""
    before = {name: now[name] for name in _LATER if name in now} | before
    changed = {name for name in before if before[name] != now.get(name)}
    if "seed" in changed:  # it says enough
        changed -= {"data", "data_order"}
        now = now | {name: before.get(name) for name in ("data", "data_order")}
    for line in difference(before, now):
        if line.startswith("autoencoder.autoencoder_steps: "):  # a target, as --max-train-steps is
            continue
        name = line.partition(": ")[0]
        if name == "seed":
            yield f"{line} (it decides which images are held out, and the order and noise of the others)"
        elif name == "data":
            yield (
                "data: other images, captions, classes or masks to train on, or other images are held out "
                "(--seed, --validation, --stratify)"
            )
        elif name != "data_order":
            yield re.sub(r"[0-9a-f]{64} -> [0-9a-f]{64}", "another one than before", line)
        elif "data" not in changed:  # else that line says enough
            yield (
                "data_order: the same images in another order (files were renamed or moved), so that each step "
                "would use others than it would have"
            )


def random_state() -> State:
    """Return the state of torch's own generators (dropout and the like draw from them)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: State) -> None:
    """Restore what `random_state` returned (CUDA's only on as many devices as were saved)."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
