"""Lines for people: on the terminal and in the run's train.log."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from ...errors import printable
from ...libraries import quiet_libraries


class _Terminal(logging.Handler):
    """Writes above a running progress bar; a terminal that is gone (closed, disconnected) ends no run."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _Printable(logging.Formatter):
    """Names of files and words of captions in a line cannot steer the terminal that it is read on."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _File(logging.FileHandler):
    """A disk that is full or gone costs lines of the file, and nothing else: the terminal has them all."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Nothing: the default prints a traceback for every line."""


def log_to(folder: Path | None) -> logging.Logger:
    """The logger of all our modules, writing to the terminal and, with a folder, to its ``train.log``.

    Of several processes only the main one writes; other libraries write errors only.
    """
    from .processes import process_state

    quiet_libraries()

    logger = logging.getLogger("latentflow")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    if not process_state().is_main_process:
        logger.addHandler(logging.NullHandler())
        return logger
    logger.setLevel(logging.INFO)
    if folder is not None:
        file = _File(folder / "train.log")
        file.setFormatter(_Printable("%(asctime)s %(message)s"))
        logger.addHandler(file)
    terminal = _Terminal()
    terminal.setFormatter(_Printable())
    logger.addHandler(terminal)
    return logger


def resume_line(command: str, argv: Sequence[str] | None) -> str:
    """The command line that started this program, for the message that says how to resume it."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["latentflow", command, *arguments])
