"""Requests draw one at a time, in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import UserError

LONGEST_LINE = 16


class Stopped(Exception):  # noqa: N818 - no error: the user pressed Cancel
    """The request was told to stop."""


@dataclass(eq=False)
class Turn:
    """One request's place in the line."""

    owner: str
    stopped: bool = False

    def check(self) -> None:
        """Raises ``Stopped`` once the owner has asked for it."""
        if self.stopped:
            raise Stopped


class Turns:
    """A line of requests: the first one works, the others wait, each can be told to stop.

    Pictures are drawn by all cores or the one GPU, so that two at once would finish no sooner, and the pipelines
    and tokenizers behind them are not made for several threads.
    """

    def __init__(self) -> None:
        self._line: list[Turn] = []
        self._changed = threading.Condition()

    @contextmanager
    def take(self, owner: str, waiting: Callable[[int], None] = lambda ahead: None) -> Iterator[Turn]:
        """Wait for one's turn, and keep it while the block runs.

        Args:
            owner: whose ``stop`` ends this.
            waiting: told how many are ahead, whenever that changes.

        Raises:
            UserError: too many are waiting.
            Stopped: told to stop while waiting.
        """
        turn = Turn(owner)
        with self._changed:
            if len(self._line) >= LONGEST_LINE:
                raise UserError(f"{LONGEST_LINE} requests are waiting already", "Try again in a minute.")
            self._line.append(turn)
        try:
            with self._changed:
                while self._line[0] is not turn:
                    turn.check()
                    waiting(self._line.index(turn))
                    self._changed.wait()
            turn.check()
            yield turn
        finally:
            with self._changed:
                self._line.remove(turn)
                self._changed.notify_all()

    def stop(self, owner: str) -> None:
        """Stop what ``owner`` has waiting or running; nothing happens where there is none."""
        with self._changed:
            for turn in self._line:
                turn.stopped = turn.stopped or turn.owner == owner
            self._changed.notify_all()
