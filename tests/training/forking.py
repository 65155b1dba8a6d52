"""Several processes of one run, forked: nothing is imported again."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState, PartialState
from tqdm.auto import tqdm


def fork_ranks(processes: int, function: Callable[[int], object]) -> list[int]:
    """Call ``function(rank)`` in each of ``processes`` forked processes, which talk through gloo if there are several.

    Returns:
        Their ids. Each ends with status 0, or 1 if the function raised.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        ids.append(os.fork())
        if not ids[-1]:
            _run_as(rank, processes, port, function)
    return ids


def run_ranks(processes: int, function: Callable[[int], object]) -> None:
    """Call ``function(rank)`` in forked processes as `fork_ranks`; none of them may fail."""
    statuses = [os.waitpid(process, 0)[1] for process in fork_ranks(processes, function)]
    assert statuses == [0] * processes


def _run_as(rank: int, processes: int, port: int, function: Callable[[int], object]) -> None:
    status = 1
    gc.freeze()  # garbage of the parent, such as a process group, whose threads are not there to end
    torch.set_num_threads(1)  # OpenMP's threads are not forked with the process
    try:
        PartialState._reset_state()
        AcceleratorState._reset_state()
        tqdm.set_lock(
            threading.RLock()
        )  # its default is shared by forks, and a killed one may have left it locked
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        function(rank)
        status = 0
    finally:
        os._exit(status)
