"""Helpers that every part may use: files and settings of strangers read safely, memory, checked arguments.

Importing torch, diffusers and transformers makes very many objects and hardly any garbage. Looking for garbage among
them takes a fifth of the import's CPU time, and a second or two again before a program ends: both are left out here.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector within the context, which imports the libraries."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


#: Called by a program: it ends without a last look for garbage.
skip_final_garbage_collection: Callable[[], object] = partial(atexit.register, gc.freeze)
