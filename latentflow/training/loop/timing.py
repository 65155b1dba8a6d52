"""The time of a run: how long is left, and how much of it validations and previews may take."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator

from .distributed import most_of_any_process

log = logging.getLogger(__name__)

_FIRST_GUESS = 1.0  # seconds of a validation or a preview, until one has been made


class Clock:
    """The time that this process has spent on a run.

    Weights and data never depend on it, so that a resumed run equals one that was not stopped.

    Args:
        share: of the time that validations and previews may take together; 1: all that they need.
        limited: those of the two of which some may be left out. Each has an equal part of the share, so that none
            takes all; the time of the others does not count.

    Attributes:
        steps: training steps that were taken.
        seconds: what they took, without anything between them.
    """

    def __init__(self, share: float = 1.0, limited: Sequence[str] = ("validation", "preview")) -> None:
        self._share, self._part = share, share / max(1, len(limited))
        self._begun = self._warm = time.perf_counter()
        self.steps, self.seconds = 0, 0.0
        self._cost = dict.fromkeys(limited, _FIRST_GUESS)  # seconds of the last one,
        self._spent = dict.fromkeys(limited, 0.0)  # and of all
        self._has_left_out = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a training step."""
        begun = time.perf_counter()
        if self.steps == 1:  # the first one allocates, tunes and compiles; files are opened after it
            self._warm = begun
        yield
        self.seconds += time.perf_counter() - begun
        self.steps += 1

    @contextmanager
    def interruption(self, kind: str) -> Iterator[None]:
        """Time a validation or a preview, on the main process."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        if kind in self._cost:
            self._cost[kind] = seconds
            self._spent[kind] += seconds

    def affords(self, kind: str, accelerator: Accelerator) -> bool:
        """Return whether a validation or a preview keeps within its share, with that of the last step to come.

        The main process decides; all of them must call this. The first that is left out is reported.
        """
        if self._share == 1 or kind not in self._cost:
            return True
        coming = 2 * self._cost[kind]
        elapsed = time.perf_counter() - self._begun
        fits = self._spent[kind] + coming <= self._part * (elapsed + coming)
        if most_of_any_process(accelerator, int(fits and accelerator.is_main_process)):
            return True
        if not self._has_left_out:
            self._has_left_out = True
            log.info(
                f"a {kind} is left out: validations and previews take at most {self._share:.0%} of the time, and are "
                "always made at the last step (--validation-time 1 makes all that are due)"
            )
        return False

    def seconds_left(self, steps: int) -> float | None:
        """Return the seconds that ``steps`` more take, with all that comes between them as often as so far.

        None: too few steps were taken to know.
        """
        if self.steps < 2:
            return None
        return steps * (time.perf_counter() - self._warm) / (self.steps - 1)
