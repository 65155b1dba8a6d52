"""The part of a run around its loop that all runs of generators have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import LoopConfig, RunConfig
from .loop.checkpoint import has_begun
from .loop.distributed import is_sharded, process_state
from .loop.fit import Callbacks, fit
from .loop.loader import TrainingData
from .loop.logging import log_to
from .loop.stopping import Stop
from .report.folder import read_run
from .report.hub import check_push, push
from .report.verdict import judge

#: writes the settings into a file
WriteConfig = Callable[[RunConfig, Path], None]


class TrainingRun:
    """A run of a generator, begun or gone on with: its folder and log, its end, and what is said of its result.

    Attributes:
        output: its folder; a dry run makes none.
        state: of this process. stop: receives the signal that stops the run.

    Raises:
        UserError: the run cannot be sharded as it should be, or the result not pushed to where it should be.
    """

    def __init__(self, config: RunConfig, resume_command: str, write_config: WriteConfig) -> None:
        self.output, self.state, self.stop = Path(config.output), process_state(), Stop()
        self._settings, self._resume_command, self._write = config, resume_command, write_config
        # before anything is read
        is_sharded(config.loop, self.state.num_processes, config.alignment.alignment == "self")
        if not config.dry_run:
            if config.push_to_hub:
                check_push(config.push_to_hub)
            self.output.mkdir(parents=True, exist_ok=True)
        self.log = log_to(None if config.dry_run else self.output)

    def plan(self, lines: Iterable[str], estimate: str = "") -> None:
        """Print the plan, and a warning where there is no GPU, with how its time is estimated."""
        for line in lines:
            self.log.info(line)
        if self.state.device.type == "cpu" and not self._settings.dry_run:
            self.log.info(f"WARNING: no GPU: expect 10 to 100 times the time of one{estimate}")

    def keep(self, settings: RunConfig) -> None:
        """Write the settings into the folder: now where it is new, else once its checkpoint is known to fit them."""
        self._settings = settings
        if not settings.dry_run and not has_begun(self.output):
            self._keep()

    def _keep(self) -> None:
        if self.state.is_main_process:
            self._write(self._settings, self.output / "config.yaml")

    def fit(
        self,
        modules: Mapping[str, nn.Module],
        data: TrainingData,
        loop: LoopConfig,
        callbacks: Callbacks,
        **options: Any,
    ) -> bool:
        """Train, see `latentflow.training.loop.fit.fit`; return whether this process makes something of the result.

        Raises:
            SystemExit: a signal stopped the run before its end, after saving; the status is 128 + its number.
        """
        callbacks = replace(callbacks, begin=self._keep)
        more: dict[str, Any] = {"resume_line": self._resume_command, "stop": self.stop, **options}
        if not fit(modules, data, loop, self.output, callbacks=callbacks, **more):
            raise SystemExit(self.stop.status)
        return bool(self.state.is_main_process)

    def end(self, result: Path, command: str, *lines: str) -> None:
        """Say how the result is tried and how the run went, and push it to the hub where it is wanted."""
        for line in (f"done: {result}; try it with\n  {command}", *lines):
            self.log.info(line)
        if verdict := judge(read_run(self.output)):
            self.log.info(verdict.line)
        if repository := self._settings.push_to_hub:
            address, said = push(result, repository)
            self.log.info("\n  ".join([f"pushed: {address}", *said]))
