"""Folders that appear whole or not at all, also through a SIGKILL or a power cut at any instant."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError


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
    """Where ``folder`` is written before it appears."""
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
    """safetensors hands a failed write on as text: ``... No space left on device (os error 28)``."""
    code = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return OSError(number := int(code[1] or code[2]), os.strerror(number)) if code else None
