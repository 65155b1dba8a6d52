"""Helpers that every part may use: files and settings of strangers read safely, memory, checked arguments."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector within the context.

    Importing torch, diffusers and transformers makes very many objects and hardly any garbage: looking for it takes a
    fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
