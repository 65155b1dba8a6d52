"""Folders that appear whole or not at all, also through a SIGKILL or a power cut at any instant; errors of the disk."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from ...errors import RunError
from ...utils.memory import size_text

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = (2.0, 10.0, 30.0)  # waits between the attempts at what a run cannot end without


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill an empty temporary folder, and put it in the place of ``folder``, an earlier one of this run.

    The earlier one goes only when the new one is complete and on the disk.

    Raises:
        OSError: it could not be written. What was written of it is removed, ``folder`` is as it was.
    """
    temporary = begin_folder(folder)
    try:
        write(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError) and (system := as_os_error(error)):
            raise system from error
        raise
    finish_folder(folder)


def temporary_folder(folder: Path) -> Path:
    """Return the place where ``folder`` is written before it appears."""
    return _hidden(folder, "tmp")


def begin_folder(folder: Path) -> Path:
    """Make `temporary_folder`, empty, and return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def finish_folder(folder: Path) -> None:
    """Put what was written as `temporary_folder` in the place of ``folder``; see `write_folder`."""
    temporary, old = temporary_folder(folder), _hidden(folder, "old")
    try:
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a removal that failed
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; one that is removed in part is never seen under its name. A failure is no error."""
    gone = _hidden(folder, "gone")
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean_up(parent: Path, name: str) -> list[Path]:
    """Mend what a killed run left beside the folders of ``parent`` whose names match the pattern ``name``.

    Returns:
        The folders that were removed: written, or removed, in part only.
    """
    left = {path: re.fullmatch(rf"\.({name})\.(tmp|old|gone)", path.name) for path in parent.glob(".*")}
    for match in left.values():
        # An old folder gives way only to a complete one: here the kill fell between the two renames.
        if match and match[2] == "old" and not (parent / match[1]).exists():
            _hidden(parent / match[1], "tmp").rename(parent / match[1])
    removed = [path for path, match in sorted(left.items()) if match and path.is_dir()]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_os_error(error: SafetensorError) -> OSError | None:
    """Return the `OSError` that safetensors hands on as text: ``... No space left on device (os error 28)``."""
    code = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return OSError(number := int(code[1] or code[2]), os.strerror(number)) if code else None


@contextmanager
def writing(what: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the disk within the context into a `RunError`; see `cannot_write`.

    Raises:
        RunError: an `OSError`, or safetensors' of a failed write, was raised.
    """
    try:
        yield
    except SafetensorError as error:
        if (system := as_os_error(error)) is None:
            raise
        raise cannot_write(what, path, system, needed) from error
    except OSError as error:
        raise cannot_write(what, path, error, needed) from error


def cannot_write(what: str, path: Path, error: OSError, needed: int | None = None) -> RunError:
    """Return the error of a failed write: why, how much room there is and is needed, and what to do."""
    reason = error.strerror or str(error)
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = f"; {size_text(shutil.disk_usage(place).free)} are free there"
        room += f", {size_text(needed)} are needed" if needed is not None else ""
        return RunError(f"{what} could not be written: {reason}{room}", "Free some space there.")
    fixes = {
        errno.EROFS: "Mount the disk for writing again (one with errors becomes read-only: see dmesg).",
        errno.EACCES: f"Give yourself the right to write in {place}.",
        errno.EPERM: f"Give yourself the right to write in {place}.",
        errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or use another file system.",
    }
    return RunError(
        f"{what} could not be written: {reason}", fixes.get(error.errno or 0, f"Look at {place}.")
    )


def attempts(action: Callable[[], T], *, retry: bool = True) -> T:
    """Call ``action``, again after a `RunError`, a few times with growing waits; the last error is raised."""
    for wait in RETRY_SECONDS if retry else ():
        try:
            return action()
        except RunError as error:
            log.warning(f"WARNING: {error.what}. Trying again in {wait:.0f} s. {error.fix}")
            time.sleep(wait)
    return action()
