"""Progress of long work, and durations in words."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

QUIET_SECONDS = 10.0  # between two lines, where standard error is no terminal


class _Lines(std.tqdm):  # type: ignore[misc]
    """Progress for a pipe or a file: now and then a whole line, and no line that is written over."""

    _lock = (
        threading.RLock()
    )  # tqdm's own is shared by forked processes, and one that is killed may leave it locked

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line, unless the last one is recent: tqdm asks for one after every line of the log as well."""
        if self._time() - self.last_print_t >= self.mininterval:
            self._print()

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: what was printed stays."""

    def close(self) -> None:
        """Print the last line, if there were others."""
        if not self.disable:  # type: ignore[has-type]
            self.disable = True
            self._decr_instances(self)
            if self.last_print_n < self.n and self.last_print_t > self.start_t:
                self._print()

    def _print(self) -> None:
        with suppress(OSError):  # nobody reads it any more
            print(self, file=self.fp, flush=True)


def progress_bar(iterable: Iterable[Any] | None = None, *, hidden: bool = False, **options: Any) -> Any:
    """Return tqdm's bar; if standard error is no terminal, one that prints a line every ten seconds.

    Work that takes less than ten seconds then prints nothing.

    Args:
        hidden: show nothing.
        options: tqdm's own: ``desc``, ``total``, ``initial``, ``unit``, ``leave``, ...
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook has a widget
        return tqdm(iterable, disable=hidden, **options)
    options |= {"mininterval": QUIET_SECONDS, "delay": QUIET_SECONDS, "miniters": 1}
    bar = _Lines(iterable, disable=hidden, **options)
    bar.bar_format = "{desc}: {n_fmt} in {elapsed}"
    if getattr(bar, "total", None):
        bar.bar_format = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left"
    return bar


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: "12 s", "3 min 20 s", "45 min", "1 h 05 min", "12 days"."""
    if seconds < 1:
        return "less than 1 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:,.0f} days"
