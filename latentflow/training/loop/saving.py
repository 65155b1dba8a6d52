"""Saving a run: its checkpoints while training goes on, and snapshots of its power-function averages."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...config import LoopConfig
from ...errors import RunError, UserError
from ...utils.memory import is_out_of_memory, size_text
from . import checkpoint
from .checkpoint import Snapshot, State, list_checkpoints, snapshot, step_of
from .distributed import PATIENCE, together
from .run_folder import attempts, begin_folder, finish_folder, remove_folder, writing
from .trained_module import TrainedModule

log = logging.getLogger(__name__)

AVERAGES = "averages"  # the folder of the snapshots in a run's; they are written and read as checkpoints are


class Saver:
    """Write the checkpoints of a run while training goes on: the loop waits for a copy in memory only.

    A thread writes, one at a time; use it from one thread.

    Args:
        root: the folder of the checkpoints.
        total_limit: checkpoints kept.
        sharded: every process has a part of the state, and a `Saver` of the same folder; all of them do the same.
    """

    def __init__(self, root: Path, total_limit: int, *, sharded: bool = False) -> None:
        self.root, self._total_limit = root, total_limit
        self.saved: int | None = None  # the step of the last checkpoint written, or read
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
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
        self._running = self._writer.submit(self._write, step)

    def save_now(self, step: int, state: State, *, retry: bool = True) -> None:
        """Write ``state`` before returning, in several attempts.

        Raises:
            RunError: no attempt succeeded; earlier checkpoints are as they were.
        """
        self.wait()
        if self.saved == step:
            return
        self._take(state)
        if retry:
            attempts(lambda: self._write(step))
        else:
            self._write(step)

    def last_good(self) -> str:
        """Say which checkpoint the run would go on from, when no save is running any more."""
        self.wait()
        found = list_checkpoints(self.root)
        return f"the last good one is {found[-1].name}" if found else "there is no earlier one"

    def poll(self) -> None:
        """Warn of a save that has failed, as soon as it is known. Costs nothing."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait until no save is running."""
        running, self._running = self._running, None
        try:
            if running is not None:
                running.result()
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
            self._snapshot = snapshot(state, self._snapshot, self._mesh)

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
        log.warning(
            f"WARNING: {error.what}; {self.last_good()}. Training goes on; the next save tries again. {error.fix}"
        )


class AverageSnapshots:
    """Write snapshots of the power-function averages, for `latentflow average`. Every process has one of these.

    Args:
        output: the run folder.
        modules: whose averages; they may track none.
        config: how often.
        main: whether this is the main process.
    """

    def __init__(
        self, output: Path, modules: Sequence[TrainedModule], config: LoopConfig, *, main: bool
    ) -> None:
        self.folder, self._config = output / AVERAGES, config
        self._averages: State = {}  # live
        for module in modules:
            self._averages |= module.tracked()
        self._sharded = any(module.sharded for module in modules)
        self._writes = main or self._sharded
        self._saver: Saver | None = None

    def check(self, state: State) -> None:
        """Refuse a checkpoint that a run cannot go on from.

        Raises:
            UserError: it has not tracked an average from its start.
        """
        for name in self._averages:
            if name not in state:
                raise UserError(
                    f"--ema-lengths {name.rpartition('-')[2]}: the run has not tracked this average from its start",
                    "Leave it out, or use another output folder.",
                )

    def begin(self, step: int) -> None:
        """Make ready to go on from ``step``: snapshots of later steps go, as those steps will be taken again."""
        every = self._config.snapshot_steps
        if not (every and self._writes):
            return
        for folder in list_checkpoints(self.folder):
            if step_of(folder) > step:
                remove_folder(folder)
                log.info(f"removed {folder}: the run goes on from step {step} and makes it again")
        self._saver = Saver(self.folder, sys.maxsize, sharded=self._sharded)  # none is the oldest too many
        tensors = [tensor for average in self._averages.values() for tensor in average.values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        count = -(-self._config.max_train_steps // every)
        log.info(
            f"averages of the lengths {', '.join(f'{length:g}' for length in self._config.ema_lengths)}: a snapshot of "
            f"{size_text(size)} every {every} steps in {self.folder}, {size_text(count * size)} in all"
        )

    def take(self, step: int) -> None:
        """Write one before returning; a failure is a warning. All processes of a sharded run must call it."""
        if self._saver is not None:
            self._saver.save(step, {"step": step} | self._averages)
            self._saver.wait()

    def close(self) -> None:
        """End the thread that writes."""
        if self._saver is not None:
            self._saver.close()


def export_once(checkpoints: Path, folder: Path, export: Callable[[Path], None]) -> None:
    """Let ``export`` make ``folder`` from the weights of the last checkpoint, unless it has done so.

    Raises:
        RunError: it could not be written, or ``export`` says so, in several attempts.
        Exception: whatever else ``export`` raises, at once.
    """
    # Beside the weights that it was made of: an export of an earlier target is made again.
    done = list_checkpoints(checkpoints)[-1] / "exported"
    if done.exists() and folder.exists():
        return
    what = f"the result {folder}"

    def make() -> None:
        with writing(what, folder):
            temporary = begin_folder(folder)
        try:  # what this raises is the caller's own, and no failure of the disk
            export(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with writing(what, folder):
            finish_folder(folder)
            done.touch()

    try:
        attempts(make)
    except RunError as error:
        rest = "The checkpoint is complete: the same line makes the rest."
        raise type(error)(error.what, f"{error.fix} {rest}") from error
