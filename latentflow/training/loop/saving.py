"""Saving while training goes on: the loop waits for a copy in memory, one thread does the rest."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh

from ...errors import RunError
from ...utils.memory import is_out_of_memory, size_text
from . import checkpoint
from .checkpoint import Snapshot, State
from .distributed import PATIENCE, together
from .folders import as_os_error

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = (2.0, 10.0, 30.0)  # waits between the attempts at what a run cannot end without


class Saver:
    """Writes the checkpoints of a run. One at a time; use it from one thread.

    Args:
        root: the folder of the checkpoints.
        total_limit: checkpoints kept.
        sharded: every process has a part of the state, and a `Saver` of the same folder; all of them do the same.
    """

    def __init__(self, root: Path, total_limit: int, *, sharded: bool = False) -> None:
        self.root, self._total_limit = root, total_limit
        self.saved: int | None = None  # the step of the last checkpoint written, or read
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[None]] | None = None
        self._snapshot: Snapshot | None = None
        # The threads that write talk to one another while training does: not in its group.
        group: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if sharded else None
        self._mesh = DeviceMesh.from_group(group, "cpu") if sharded else None
        self._group = group

    def save(self, step: int, state: State) -> None:
        """Copy ``state``, and return while it is written. Waits only for a save that is still running.

        A save that fails is a warning: the next one is the next attempt.
        """
        self.wait()
        try:
            self._take(state)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._snapshot = None
            self._warn(RunError(f"step {step}: too little memory to copy the state of the run for saving it"))
            return
        self._running = step, self._writer.submit(self._write, step)

    def save_now(self, step: int, state: State, *, retry: bool = True) -> None:
        """Write ``state`` before returning, in several attempts.

        Raises:
            RunError: no attempt succeeded; earlier checkpoints are as they were.
        """
        self.wait()
        if self.saved == step:
            return
        self._take(state)
        attempts(lambda: self._write(step), retry=retry)

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        found = checkpoint.list_checkpoints(self.root)
        return checkpoint.step_of(found[-1]) if found else None

    def poll(self) -> None:
        """Warn of a save that has failed, as soon as it is known. Costs nothing."""
        if self._running is not None and self._running[1].done():
            self.wait()

    def wait(self) -> None:
        """Until no save is running."""
        if self._running is None:
            return
        _, future = self._running
        self._running = None
        try:
            future.result()
        except RunError as error:
            self._warn(error)

    def close(self) -> None:
        """Wait for a save that is running, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _take(self, state: State) -> None:
        def take() -> None:
            self._snapshot = checkpoint.snapshot(state, self._snapshot, self._mesh)

        self._together(take)

    def _write(self, step: int) -> None:
        taken, folder = self._snapshot, self.root / f"step-{step:06d}"
        assert taken is not None

        def has_room() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.root).free < taken.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with writing(f"checkpoint {folder}", folder, taken.size):
            self._together(has_room)
            if self._group is None:
                checkpoint.write_checkpoint(folder, taken, total_limit=self._total_limit)
            else:
                checkpoint.write_shards(folder, taken, self._group, total_limit=self._total_limit)
        self.saved = step

    def _together(self, action: Callable[[], None]) -> None:
        if self._group is None:
            action()
        else:
            together(action, self._group)

    def _warn(self, error: RunError) -> None:
        newest = self.newest()
        kept = "There is no earlier one" if newest is None else f"The last good one is step-{newest:06d}"
        log.warning(
            f"WARNING: {error.what}. {kept}. Training goes on; the next save tries again. {error.fix}"
        )


@contextmanager
def writing(what: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the disk says within the context into a `RunError`; see `cannot_write`.

    Raises:
        RunError: an `OSError`, or safetensors' of a failed write, was raised.
    """
    try:
        yield
    except SafetensorError as error:
        if (system := as_os_error(error)) is None:
            raise
        raise cannot_write(what, path, system, needed) from error
    except OSError as error:
        raise cannot_write(what, path, error, needed) from error


def cannot_write(what: str, path: Path, error: OSError, needed: int | None = None) -> RunError:
    """The error for something that could not be written: why, how much room there is and is needed, what to do."""
    reason = error.strerror or str(error)
    place = _existing(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = f"; {size_text(shutil.disk_usage(place).free)} are free there"
        room += f", {size_text(needed)} are needed" if needed is not None else ""
        return RunError(f"{what} could not be written: {reason}{room}", "Free some space there.")
    fixes = {
        errno.EROFS: "Mount the disk for writing again (one with errors becomes read-only: see dmesg).",
        errno.EACCES: f"Give yourself the right to write in {place}.",
        errno.EPERM: f"Give yourself the right to write in {place}.",
        errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or use another file system.",
    }
    return RunError(
        f"{what} could not be written: {reason}", fixes.get(error.errno or 0, f"Look at {place}.")
    )


def attempts(action: Callable[[], T], *, retry: bool = True) -> T:
    """``action()``, again after a `RunError`, a few times with growing waits; the last error is raised."""
    for wait in RETRY_SECONDS if retry else ():
        try:
            return action()
        except RunError as error:
            log.warning(f"WARNING: {error.what}. Trying again in {wait:.0f} s. {error.fix}")
            time.sleep(wait)
    return action()


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())
