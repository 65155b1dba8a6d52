"""Snapshots of the power-function averages in the run folder, of which `latentflow average` makes others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ...config import LoopConfig
from ...errors import UserError
from ...utils.memory import size_text
from .checkpoint import State, list_checkpoints, step_of
from .folders import remove_folder
from .saving import Saver
from .trained_module import Player

log = logging.getLogger(__name__)

FOLDER = "averages"  # of a run; its folders are written and read as checkpoints are


class Snapshots:
    """Takes and keeps all snapshots of a run. Every process has one.

    Args:
        output: the run folder.
        players: whose averages; they may track none.
        config: how often.
        main: whether this is the main process.
    """

    def __init__(self, output: Path, players: Sequence[Player], config: LoopConfig, *, main: bool) -> None:
        self.folder, self._players, self._config, self._main = output / FOLDER, players, config, main
        self._sharded = any(player.sharded for player in players)
        self._saver: Saver | None = None

    def check(self, state: State) -> None:
        """Whether a run can go on from a checkpoint.

        Raises:
            UserError: it has not tracked an average from its start.
        """
        for name in (name for player in self._players for name in player.tracked()):
            if name not in state:
                raise UserError(
                    f"--ema-lengths {name.rpartition('-')[2]}: the run has not tracked this average from its start",
                    "Leave it out, or use another output folder.",
                )

    def begin(self, step: int) -> None:
        """Make ready to go on from ``step``: snapshots of later steps go, as those steps will be taken again."""
        every = self._config.snapshot_steps
        if not every:
            return
        if self._main:
            for folder in list_checkpoints(self.folder):
                if step_of(folder) > step:
                    remove_folder(folder)
                    log.info(f"removed {folder}: the run goes on from step {step} and makes it again")
        self._saver = Saver(
            self.folder, sys.maxsize, sharded=self._sharded
        )  # none is ever the oldest too many
        tensors = [
            one for player in self._players for each in player.tracked().values() for one in each.values()
        ]
        size = sum(one.numel() * one.element_size() for one in tensors)
        count = -(-self._config.max_train_steps // every)
        log.info(
            f"averages of the lengths {', '.join(f'{one:g}' for one in self._config.ema_lengths)}: a snapshot of "
            f"{size_text(size)} every {every} steps in {self.folder}, {size_text(count * size)} in all"
        )

    def take(self, step: int) -> None:
        """Write one before returning; a failure is a warning. All processes of a sharded run must call it."""
        if self._saver is None or not (self._main or self._sharded):
            return
        state: State = {"step": step}
        for player in self._players:
            state |= player.tracked()
        self._saver.save(step, state)
        self._saver.wait()

    def close(self) -> None:
        """End the thread that writes."""
        if self._saver is not None:
            self._saver.close()
