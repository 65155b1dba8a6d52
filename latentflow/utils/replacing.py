"""Files that are written whole or not at all. Imports nothing of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a file to write beside ``path``, which it becomes when it is complete; of what fails nothing remains.

    Args:
        suffix: of that file, for writers that choose their format by it.
    """
    partial = path.with_name(f".latentflow-{os.getpid()}{suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # it is not there, or cannot be: what failed is told already
            partial.unlink()
