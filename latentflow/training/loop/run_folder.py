"""The folder of a run: one run at a time in it, folders that appear whole or not at all, errors of its disk."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ...errors import RunError, UserError
from ...utils.memory import size_text
from .distributed import process_state, together

log = logging.getLogger(__name__)

RETRY_SECONDS = (2.0, 10.0, 30.0)  # waits between the attempts at what a run cannot end without


# ---- folders that appear whole or not at all, also through a SIGKILL or a power cut at any instant ----


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill an empty temporary folder, and put it in the place of ``folder``, an earlier one of this run.

    The earlier one goes only when the new one is complete and on the disk.

    Raises:
        OSError: it could not be written. What was written of it is removed, ``folder`` is as it was.
    """
    temporary = begin_folder(folder)
    try:
        with system_errors():
            write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finish_folder(folder)


def begin_folder(folder: Path) -> Path:
    """Make the empty folder in which ``folder`` is written before it appears, and return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden(folder, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def finish_folder(folder: Path) -> None:
    """Put what was written since `begin_folder` in the place of ``folder``; see `write_folder`."""
    temporary, old = hidden(folder, "tmp"), hidden(folder, "old")
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
    gone = hidden(folder, "gone")
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
            hidden(parent / match[1], "tmp").rename(parent / match[1])
    removed = [path for path, match in sorted(left.items()) if match and path.is_dir()]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def hidden(folder: Path, kind: str) -> Path:
    """Return the name of ``folder`` while it is written ("tmp"), replaced ("old") or removed ("gone")."""
    return folder.with_name(f".{folder.name}.{kind}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- errors of the disk ----


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise what safetensors hands on as text, ``No space left on device (os error 28)``, as the `OSError` it is."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if code is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, os.strerror(number)) from error


@contextmanager
def writing(what: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the disk within the context into words: why, how much room there is and is needed, what to do.

    Raises:
        RunError: an `OSError`, or safetensors' of a failed write, was raised.
    """
    try:
        with system_errors():
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f"; {size_text(shutil.disk_usage(place).free)} are free there"
            reason += f", {size_text(needed)} are needed" if needed is not None else ""
        fixes = {
            errno.ENOSPC: "Free some space there.",
            errno.EDQUOT: "Free some space there.",
            errno.EROFS: "Mount the disk for writing again (one with errors becomes read-only: see dmesg).",
            errno.EACCES: f"Give yourself the right to write in {place}.",
            errno.EPERM: f"Give yourself the right to write in {place}.",
            errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or use another file system.",
        }
        fix = fixes.get(error.errno or 0, f"Look at {place}.")
        raise RunError(f"{what} could not be written: {reason}", fix) from error


def attempts(action: Callable[[], None]) -> None:
    """Call ``action``, again after a `RunError`, a few times with growing waits; the last error is raised."""
    for wait in RETRY_SECONDS:
        try:
            return action()
        except RunError as error:
            log.warning(f"WARNING: {error.what}. Trying again in {wait:.0f} s. {error.fix}")
            time.sleep(wait)
    return action()


# ---- the lock that keeps a second run out ----

BEAT_SECONDS = 10.0  # the holder touches its file this often, for hosts that cannot see its lock
_SILENT_BEATS = 3  # a holder on another host that misses as many is gone
_held: dict[Path, int | None] = {}  # by this process -> the open file; None: by the main process, for all


def _let_go() -> None:
    for handle in _held.values():
        if handle is not None:
            os.close(handle)
    _held.clear()


# A process that loads data must not keep the lock when this one is killed.
os.register_at_fork(after_in_child=_let_go)


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Keep every other run out of ``folder`` within the context; the file ``run.lock`` in it names the holder.

    The kernel drops the lock with the process, whatever ends it. Of several processes of one run only the main one
    holds it; within one process it may be entered again.

    Raises:
        UserError: in every process: another run is there (its process, host and start are named), or the folder cannot
            be written.
    """
    path = Path(folder).resolve() / "run.lock"
    if path in _held:
        yield
        return
    main, acquired = process_state().is_main_process, list[int]()
    together(lambda: acquired.append(_acquire(path)) if main else None)
    stop, handle = threading.Event(), acquired[0] if main else None
    _held[path] = handle
    if handle is not None:
        beats = threading.Thread(target=_beat, args=(handle, stop), daemon=True, name="run.lock")
        beats.start()
    try:
        yield
    finally:
        if _held.pop(path, None) is not None and handle is not None:  # else this is a fork of the holder
            stop.set()
            beats.join()
            with suppress(OSError):  # the disk may have become read-only
                os.ftruncate(handle, 0)  # an orderly end: nobody has to wait for a sign of life
            os.close(handle)


def _acquire(path: Path) -> int:
    with writing(f"the run folder {path.parent}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Not lockf: that is lost when anything in this process reads the file and closes it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = _holder(handle)
            os.close(handle)
            raise _in_use(path, holder) from error
        log.warning(f"WARNING: {path.parent} is on a file system without locks: start no second run there")
    _wait_for_other_host(path, handle)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    words = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    with suppress(OSError):  # on a full disk the lock holds all the same, only its holder is not named
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(words).encode(), 0)
    return handle


def _wait_for_other_host(path: Path, handle: int) -> None:
    """Wait for a sign of life: a lock may not be visible from another host, but a run there touches the file."""
    holder = _holder(handle)
    if not holder or holder["host"] == socket.gethostname():
        return  # a dead process of this host, or nobody
    seconds = BEAT_SECONDS * _SILENT_BEATS
    log.info(
        f"{path.parent} was last used on host {holder['host']}: waiting {seconds:.0f} s for a sign of life"
    )
    touched = path.stat().st_mtime_ns
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        if path.stat().st_mtime_ns != touched:
            os.close(handle)
            raise _in_use(path, holder)


def _beat(handle: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            os.utime(handle)
        except OSError as error:
            log.debug("run.lock: %s", error)  # a full or lost disk is reported by what needs it


def _holder(handle: int) -> dict[str, str]:
    try:
        words = json.loads(os.pread(handle, 4096, 0))
        return {name: str(words[name]) for name in ("pid", "host", "started")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _in_use(path: Path, holder: dict[str, str]) -> UserError:
    who, stop = "", ""
    if holder:
        pid, host = holder["pid"], holder["host"]
        who = f": process {pid} on host {host}, started {holder['started']}"
        stop = f" stop it (on {host}: kill {pid}; it saves and ends),"
    fix = f"Wait for it to end,{stop} or use another output folder."
    return UserError(f"another run uses {path.parent}{who}", fix)
