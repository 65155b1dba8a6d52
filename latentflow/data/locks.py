"""Locks between processes that die with their holder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
