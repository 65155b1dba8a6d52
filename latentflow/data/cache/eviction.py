"""Locks between processes that die with their holder."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError

if sys.platform != "win32":
    import fcntl


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """A file descriptor that holds the lock ``path`` until it is closed; None where it is taken and ``wait`` is off.

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
        if _is_still(descriptor, path):
            return descriptor
        os.close(descriptor)  # whoever had it deleted the file: the lock is another one now


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


log = logging.getLogger(__name__)

LOOKS = "looks-{}.sqlite"  # what images are, of each version; counts and goes like a set
LOCK = "in-use"  # held by whoever has the set open; its time is that of the last use
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DOOMED = ".deleted-"
# Sets are named by a hash, those of earlier versions were single files. LATENTFLOW_CACHE may be any folder: nothing
# else in it is ours to delete.
_SET = re.compile(rf"[0-9a-f]{{40}}({re.escape(_DOOMED)}\d+|\.safetensors)?")
_told: set[int] = set()  # limits that are known to be too low


def cache_root() -> Path:
    """Where caches are kept: the environment's LATENTFLOW_CACHE, else ~/.cache/latentflow."""
    return Path(os.environ.get("LATENTFLOW_CACHE") or Path.home() / ".cache" / "latentflow").expanduser()


def cache_limit() -> int | None:
    """The environment's LATENTFLOW_CACHE_LIMIT (such as 20GB or 500M) in bytes; None without one.

    Raises:
        UserError: it is no size.
    """
    told = os.environ.get("LATENTFLOW_CACHE_LIMIT", "").strip()
    if not told:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", told, re.IGNORECASE)
    if match is None:
        raise UserError(f"LATENTFLOW_CACHE_LIMIT is '{told}', which is no size", "Write it as 20GB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def make_room(root: Path, needed: int) -> None:
    """Delete the sets of the cache that were not used for longest, until ``needed`` bytes fit below the limit.

    What a process uses is never deleted; if all is in use, the cache outgrows its limit, and says so once.
    """
    limit = cache_limit()
    if limit is None:
        return
    sets = sorted(_sets(root), key=lambda one: one.used)
    excess = sum(one.size for one in sets) + needed - limit
    for one in sets:
        if excess <= 0:
            return
        if _delete(one.path):
            days = (time.time() - one.used) / 86400
            log.info(
                "cache: deleted %s (%.2f GB, last used %.1f days ago): LATENTFLOW_CACHE_LIMIT is %.2f GB",
                one.path, one.size / 1e9, days, limit / 1e9,
            )  # fmt: skip
            excess -= one.size
    if excess > 0 and limit not in _told:
        _told.add(limit)
        log.warning(
            "the cache in %s grows %.2f GB above LATENTFLOW_CACHE_LIMIT (%.2f GB): all that it holds is in use",
            root, excess / 1e9, limit / 1e9,
        )  # fmt: skip


@dataclass(frozen=True)
class _Set:
    path: Path  # a folder of shards, or a single file of earlier versions
    size: int
    used: float


def _sets(root: Path) -> list[_Set]:
    looks = [path for path in root.glob(LOOKS.format("*")) if path.is_file()]
    found = [_Set(path, path.stat().st_size, path.stat().st_mtime) for path in looks]
    for path in root.glob("*/*"):
        if not _SET.fullmatch(path.name):
            continue
        try:
            if _DOOMED in path.name:  # by a process that was killed over it
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                used = (path / LOCK).stat().st_mtime
                found.append(_Set(path, sum(file.stat().st_size for file in path.iterdir()), used))
            else:
                found.append(_Set(path, path.stat().st_size, path.stat().st_mtime))
        except FileNotFoundError:  # another process is at it, or it is no set of ours
            continue
    return found


def _delete(path: Path) -> bool:
    """Whether it was deleted: not if it is in use, or may not be written."""
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
