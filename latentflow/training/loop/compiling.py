"""torch.compile of the networks that are trained, block by block: all blocks share what is compiled for the first."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from ...config import LoopConfig
from ...errors import reason
from .distributed import repeated_blocks

log = logging.getLogger(__name__)


def compiles(config: LoopConfig, device: torch.device) -> bool:
    """Return whether networks are compiled: by default on a GPU, where there is a compiler."""
    wanted = config.compile or (config.compile_on_gpu and device.type == "cuda")
    return wanted and _can_compile(device)


def compile_network(network: nn.Module, config: LoopConfig, device: torch.device) -> None:
    """Compile the blocks of a network that `compiles`; all of it where it names no blocks.

    Compilation happens when they are first called, and again for other shapes.
    """
    if compiles(config, device):
        for part in repeated_blocks(network) or [network]:
            part.compile()


def as_written(network: nn.Module) -> AbstractContextManager[Any]:
    """Within the context a network computes as it is written, also where it is compiled."""
    compiled = any(getattr(part, "_compiled_call_impl", None) for part in network.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@cache
def _can_compile(device: torch.device) -> bool:
    """Try torch.compile on a small function; where it fails, the log says why and what to do."""
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, of torch: there are many
        log.warning(
            f"WARNING: torch.compile does not work here ({reason(error)}). The networks run as they are: slower, and "
            "they learn the same. It needs a C compiler, such as gcc, and on a GPU Triton, which comes with torch; "
            "--no-compile-on-gpu leaves the attempt out."
        )
        return False
    return True


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
