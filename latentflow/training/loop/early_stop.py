"""Ending a run when its validation loss no longer falls, with the weights that had the lowest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...config import LoopConfig
from ...errors import UserError
from .distributed import most_of_any_process
from .trained_module import Player

_BETTER, _WORSE = 1, 2


def refuse_unvalidated(config: LoopConfig, validated: bool) -> None:
    """Refuse ``--early-stop`` for a run that nothing is held out of, or that does not validate.

    Raises:
        UserError: it is asked for.
    """
    if config.early_stop and not (validated and config.validation_steps):
        raise UserError(
            "--early-stop without validations",
            "Hold images out (--validation 0.1), and validate (--validation-steps).",
        )


class EarlyStop:
    """Keeps the averaged weights of the best validation, and says when ``patience`` others have not been better.

    Args:
        patience: validations without improvement after which training ends; 0: never, and nothing is kept.
        players: whose weights are kept.
        accelerator: of the run; only its main process validates, all of them end together.
    """

    def __init__(self, patience: int, players: Sequence[Player], accelerator: Accelerator) -> None:
        self._patience, self._players, self._accelerator = patience, players, accelerator
        self.step, self.loss = 0, math.inf  # of the best validation
        self._since = 0  # validations after it
        self._best: dict[str, dict[str, Tensor]] = {}

    @property
    def stopped(self) -> bool:
        """Whether training is over."""
        return 0 < self._patience <= self._since

    def validated(self, step: int, loss: float | None) -> None:
        """What was found at ``step``: a loss on the main process; None where it failed, and on the others."""
        if not self._patience:
            return
        here = 0 if loss is None else _BETTER if loss < self.loss else _WORSE
        verdict = most_of_any_process(self._accelerator, here)
        if verdict == _BETTER:
            self.step, self.loss, self._since = step, math.nan if loss is None else loss, 0
            self._keep()
        elif verdict == _WORSE:
            self._since += 1

    @torch.no_grad()
    def _keep(self) -> None:
        for player in self._players:
            kept = self._best.setdefault(player.name, {})
            for name, one in player.average.averages.items():
                kept[name] = kept[name].copy_(one) if name in kept else one.detach().clone()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, live: not a copy."""
        if not self._best:
            return {}
        told = {"step": self.step, "loss": self.loss, "since": self._since}
        return {"early_stop": told} | {f"{name}-best": kept for name, kept in self._best.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; a run that did not stop early before begins to."""
        if self._patience and "early_stop" in state:
            told = state["early_stop"]
            self.step, self.loss, self._since = int(told["step"]), float(told["loss"]), int(told["since"])
            self._best = {
                player.name: {
                    name: state[f"{player.name}-best"][name].to(one.device)
                    for name, one in player.average.averages.items()
                }
                for player in self._players
            }

    def take_best(self) -> None:
        """Put the kept weights in the place of the averages, for good: training is over."""
        for player in self._players:
            if player.name in self._best:
                player.average.load(self._best[player.name])

    def line(self, step: int) -> str:
        """What became of it."""
        why = f"stopped early at step {step}" if self.stopped else f"step {step} is reached"
        if math.isinf(self.loss):
            return f"{why}; no val_loss was a number, so that the result is of this step"
        return f"{why}; the result is of step {self.step}, whose val_loss was the lowest ({self.loss:.4f})"
