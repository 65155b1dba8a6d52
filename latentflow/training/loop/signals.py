"""Being asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """The signal that has asked a run to stop.

    Attributes:
        signal: its number; 0: there was none.
    """

    signal: int = 0

    @property
    def status(self) -> int:
        """The exit status of a program that ends for it: 128 + its number, as shells count; 0 without one."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP ask the loop to finish its step and save; a second SIGINT interrupts at once.

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


def leave_to_parent() -> None:
    """Ignore what a terminal sends to all processes of a run (Ctrl-C, its end): the one that started this one stops.

    SIGTERM stays: it is how a process that hangs is ended.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
