"""The files of a run folder that are read again, and the lock that keeps a second run out of it."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from ...errors import UserError
from .distributed import process_state, together
from .folders import cannot_write

_PACKAGES = ("diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")

Row = dict[str, float]


def open_metrics(folder: Path) -> TextIO:
    """Open ``metrics.jsonl`` to append; a line that a killed run left torn is ended, so that the next one is whole."""
    path = folder / "metrics.jsonl"
    file = path.open("a", encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")
    return file


def metric_lines(folder: Path) -> Iterator[Row]:
    """Yield every line of ``metrics.jsonl`` that can be read, as it was written: killed runs repeat and tear some."""
    for row in _lines(folder / "metrics.jsonl"):
        if isinstance(row.get("step"), int):
            # JSON as Python writes it has NaN and Infinity too: no curve can show them.
            yield {name: value for name, value in row.items() if _finite(value)}


def read_metrics(folder: Path) -> list[Row]:
    """Return one row for each step that was logged, in order, with all its figures.

    A run that was resumed from an earlier step took the steps after it once more: the later rows count.
    """
    kept: dict[int, Row] = {}
    last = 0
    for row in metric_lines(folder):
        step = int(row["step"])
        if step < last:
            kept = {earlier: values for earlier, values in kept.items() if earlier < step}
        kept[step] = kept.get(step, {}) | row
        last = step
    return list(kept.values())


def record_start(folder: Path, step: int) -> None:
    """Append machine, packages and command of this start of the run, at ``step``, to ``environment.jsonl``."""
    state = process_state()
    device = str(state.device)
    if state.device.type == "cuda":
        device = torch.cuda.get_device_name(state.device)
    line = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "processes": state.num_processes,
        "machine": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "latentflow": _version("latentflow"),
        "torch": str(torch.__version__),  # with the CUDA that it was built for
        **{name: _version(name) for name in _PACKAGES},
    }
    with (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that `record_start` wrote, oldest first; none for a run without them."""
    return list(_lines(folder / "environment.jsonl"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A line torn by a kill may hold the next start's first one at its end; ours are flat.
        for text in (line, line[line.rfind("{") :]):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
                break


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from ... import __version__

        return __version__ if package == "latentflow" else "unknown"


log = logging.getLogger(__name__)

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(f"the run folder {path.parent}", path, error) from error
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
    touched = _touched(path)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        if _touched(path) != touched:
            os.close(handle)
            raise _in_use(path, holder)


def _beat(handle: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            os.utime(handle)
        except OSError as error:
            log.debug("run.lock: %s", error)  # a full or lost disk is reported by what needs it


def _touched(path: Path) -> int:
    return path.stat().st_mtime_ns


def _holder(handle: int) -> dict[str, str]:
    try:
        words = json.loads(os.pread(handle, 4096, 0))
        return {name: str(words[name]) for name in ("pid", "host", "started")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _in_use(path: Path, holder: dict[str, str]) -> UserError:
    if not holder:
        return UserError(
            f"another run uses {path.parent}", "Wait for it to end, or use another output folder."
        )
    pid, host = holder["pid"], holder["host"]
    return UserError(
        f"another run uses {path.parent}: process {pid} on host {host}, started {holder['started']}",
        f"Wait for it to end, stop it (on {host}: kill {pid}; it saves and ends), or use another output folder.",
    )
