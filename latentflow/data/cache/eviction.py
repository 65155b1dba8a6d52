"""The cache's folder and its limit, and locks between processes that die with their holder."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from ...errors import UserError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

LOOKS = "looks-{}.sqlite"  # what images are, of each version; counts and goes like a set
LOCK = "in-use"  # held by whoever has the set open; its time is that of the last use
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DOOMED = ".deleted-"
# Sets are named by a hash, those of earlier versions were single files. LATENTFLOW_CACHE may be any folder: nothing
# else in it is ours to delete.
_SET = re.compile(rf"[0-9a-f]{{40}}({re.escape(_DOOMED)}\d+|\.safetensors)?")
_reported: set[int] = set()  # limits that are known to be too low


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Return a file descriptor that holds the lock ``path`` until it is closed; None: it is taken, and ``wait`` is off.

    The file is made where it is missing. A process that is killed gives its locks back.

    Raises:
        OSError: there is no such file and it cannot be made.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # in a folder that may only be read
        if sys.platform == "win32":  # an open file cannot be deleted there, which is what most locks are for
            return descriptor
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks: processes do the same work twice, and nothing worse
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # whoever had it deleted the file: the lock is another one now


def mark_in_use(folder: Path) -> int | None:
    """Make a set's folder and keep it from being evicted until the descriptor is closed; None: it cannot be written."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = acquire(folder / LOCK, shared=True)
        except FileNotFoundError:  # evicted in between
            continue
        except OSError:  # what is there can still be read, and nobody deletes it
            return None
        with suppress(OSError):
            os.utime(folder / LOCK)
        return descriptor


def cache_root() -> Path:
    """Return where caches are kept: the environment's LATENTFLOW_CACHE, else ~/.cache/latentflow."""
    return Path(os.environ.get("LATENTFLOW_CACHE") or Path.home() / ".cache" / "latentflow").expanduser()


def cache_limit() -> int | None:
    """Return the environment's LATENTFLOW_CACHE_LIMIT (such as 20GB or 500M) in bytes; None without one.

    Raises:
        UserError: it is no size.
    """
    given = os.environ.get("LATENTFLOW_CACHE_LIMIT", "").strip()
    if not given:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", given, re.IGNORECASE)
    if match is None:
        raise UserError(
            f"LATENTFLOW_CACHE_LIMIT is '{given}', which is no size", "Write it as 20GB or 500MB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def make_room(root: Path, needed: int) -> None:
    """Delete the sets of the cache that were not used for longest, until ``needed`` bytes fit below the limit.

    What a process uses is never deleted; if all is in use, the cache outgrows its limit, and a warning says so once.
    """
    limit = cache_limit()
    if limit is None:
        return
    sets = _sets(root)
    excess = sum(size for _, size, _ in sets) + needed - limit
    for used, size, path in sets:
        if excess <= 0:
            return
        if _delete(path):
            days = (time.time() - used) / 86400
            log.info(
                "cache: deleted %s (%.2f GB, last used %.1f days ago): LATENTFLOW_CACHE_LIMIT is %.2f GB",
                path, size / 1e9, days, limit / 1e9,
            )  # fmt: skip
            excess -= size
    if excess > 0 and limit not in _reported:
        _reported.add(limit)
        log.warning(
            "the cache in %s grows %.2f GB above LATENTFLOW_CACHE_LIMIT (%.2f GB): all that it holds is in use",
            root, excess / 1e9, limit / 1e9,
        )  # fmt: skip


def _sets(root: Path) -> list[tuple[float, int, Path]]:
    """Return time of last use, bytes and path of all that is ours in the cache, what was not used for longest first."""
    found = []
    ours = [path for path in root.glob("*/*") if _SET.fullmatch(path.name)]
    for path in [*root.glob(LOOKS.format("*")), *ours]:
        with suppress(FileNotFoundError):  # another process is at it, or it is no set of ours
            if _DOOMED in path.name:  # by a process that was killed over it
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(((path / LOCK).stat().st_mtime, size, path))
            else:
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    return sorted(found)


def _delete(path: Path) -> bool:
    """Delete a set or file; False where it is in use, or may not be deleted."""
    try:
        if path.is_file():
            path.unlink()
            return True
        descriptor = acquire(path / LOCK, wait=False)
        if descriptor is None:
            return False
        try:
            doomed = path.with_name(f"{path.name}{_DOOMED}{os.getpid()}")
            path.rename(doomed)  # at once, so that nobody finds half a set
            shutil.rmtree(doomed)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.debug("%s stays: %s", path, error)
        return False
    return True
