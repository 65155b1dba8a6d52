"""Helpers that every part may use: files and settings of strangers read safely, memory, checked arguments.

Importing torch, diffusers and transformers makes very many objects and hardly any garbage. Looking for garbage among
them takes a fifth of the import's CPU time, some tenths of a second in the program's first steps, and a second or two
before it ends: all of these are left out here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_in_a_program = False


def begin_program() -> None:
    """Note that this process is one of our programs: what it imports is never garbage, and it ends without a last look.

    In a script of somebody else's the collector is left as it is: objects of the script's own would be frozen as well.
    """
    global _in_a_program
    _in_a_program = True
    atexit.register(gc.freeze)


# Imported by diffusers wherever it is installed, and needed for weights in 4 and 8 bits and a grid of times alone.
_SELDOM_USED = ("bitsandbytes", "scipy.stats")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import the libraries within the context: Python's garbage collector pauses, and what is seldom used waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in _SELDOM_USED:
            _import_when_used(name)
        yield
    finally:
        if _in_a_program:
            gc.freeze()
        if enabled:
            gc.enable()


class _WhenUsed(types.ModuleType):
    """A module in the place of one that is imported once an attribute of it is asked for.

    importlib's `LazyLoader` does not wait: under Python 3.11 an ``import`` statement asks for ``__spec__``.
    """

    def __getattr__(self, attribute: str) -> Any:
        if (
            attribute.startswith("__") and attribute != "__path__"
        ):  # `inspect` asks all modules for their files
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


def _import_when_used(name: str) -> None:
    """Let ``import name`` bind a `_WhenUsed`, if there is such a module and nobody has imported it."""
    if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
        module = _WhenUsed(name)
        module.__spec__ = spec  # by which libraries find out whether it is installed
        sys.modules[name] = module
