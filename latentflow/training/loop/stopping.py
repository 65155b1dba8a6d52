"""The end of a run before its last step: by a signal, or when its validation loss no longer falls."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .distributed import most_of_any_process
from .trained_module import TrainedModule

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """The signal that asked a run to stop.

    Attributes:
        signal: its number; 0: there was none.
    """

    signal: int = 0

    @property
    def status(self) -> int:
        """The exit status of a program that ends for it: 128 + its number, as shells count; 0 without a signal."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def resumable(line: str) -> Iterator[None]:
    """Within the context Ctrl-C ends with the command that resumes the run: before the first step, or pressed twice.

    Between the two `stop_on_signal` decides.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted. Resume with:\n  {line}") from None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within the context SIGINT, SIGTERM and SIGHUP ask the loop to finish its step and save.

    A second SIGINT interrupts at once.

    A signal that is ignored stays so: nohup ignores SIGHUP, a shell's background jobs ignore SIGINT.
    """
    stop = Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = stop.signal or number

    asking = [number for number in _ASKING if signal.getsignal(number) != signal.SIG_IGN]
    try:
        previous = {number: signal.signal(number, request) for number in asking}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python


_BETTER, _WORSE = 1, 2


class EarlyStop:
    """Keep the averaged weights of the best validation, and end training when ``patience`` others were not better.

    Args:
        patience: validations without improvement after which training ends; 0: never, and nothing is kept.
        modules: whose weights are kept.
        accelerator: of the run; only its main process validates, all of them end together.
    """

    def __init__(self, patience: int, modules: Sequence[TrainedModule], accelerator: Accelerator) -> None:
        self._patience, self._modules, self._accelerator = patience, modules, accelerator
        self.step, self.loss = 0, math.inf  # of the best validation
        self._since = 0  # validations after it
        self._best: dict[str, dict[str, Tensor]] = {}

    @property
    def stopped(self) -> bool:
        """True when training is over."""
        return 0 < self._patience <= self._since

    def validated(self, step: int, loss: float | None) -> None:
        """Take in the loss found at ``step`` on the main process; None where it failed, and on the others."""
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
        for module in self._modules:
            kept = self._best.setdefault(module.name, {})
            for name, average in module.average.averages.items():
                kept[name] = kept[name].copy_(average) if name in kept else average.detach().clone()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, live: not a copy."""
        if not self._best:
            return {}
        figures = {"step": self.step, "loss": self.loss, "since": self._since}
        return {"early_stop": figures} | {f"{name}-best": kept for name, kept in self._best.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; a run that did not stop early before begins to."""
        if self._patience and "early_stop" in state:
            best = state["early_stop"]
            self.step, self.loss, self._since = int(best["step"]), float(best["loss"]), int(best["since"])
            self._best = {
                module.name: {
                    name: state[f"{module.name}-best"][name].to(average.device)
                    for name, average in module.average.averages.items()
                }
                for module in self._modules
            }

    def take_best(self) -> None:
        """Put the kept weights in the place of the averages, for good: training is over."""
        for module in self._modules:
            if module.name in self._best:
                module.average.load(self._best[module.name])

    def line(self, step: int) -> str:
        """Return the line of the log that says how the run ended, and which weights the result has."""
        why = f"stopped early at step {step}" if self.stopped else f"step {step} is reached"
        if math.isinf(self.loss):
            return f"{why}; no val_loss was a number, so that the result is of this step"
        return f"{why}; the result is of step {self.step}, whose val_loss was the lowest ({self.loss:.4f})"
