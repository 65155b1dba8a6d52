"""The processes and the device of this run, by accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError

from ...errors import UserError

# The others wait while the main process encodes the data, which may take hours. A process that dies is noticed by its
# launcher, not by this.
PATIENCE = timedelta(days=2)


def process_state() -> PartialState:
    """accelerate's state of this process: ``device``, ``num_processes``, ``is_main_process``.

    Several processes (torchrun, accelerate launch) on a machine without an accelerator talk through gloo; accelerate's
    own default would take each of them for the only one.
    """
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def in_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether it holds in any process of the run; all of them must ask."""
    return most_of_any_process(accelerator, int(here)) > 0


def most_of_any_process(accelerator: Accelerator, here: int) -> int:
    """The largest of the numbers that the processes of the run have here; all of them must ask."""
    if accelerator.num_processes == 1:
        return here
    numbers: torch.Tensor = accelerator.gather(torch.tensor([here], device=accelerator.device))
    return int(numbers.max())


def together(action: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Call ``action`` in every process (of ``group``), which must all call this; what fails in one fails in all.

    Raises:
        Exception: what it raised here, else what it raised in the first process that failed.
    """
    if not dist.is_initialized():
        action()
        return
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    failures: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, _portable(failure), group=group)
    for one in (failure, *failures):
        if one is not None:
            raise one


def _portable(error: Exception | None) -> Exception | None:
    """The error as another process can have it."""
    if error is None or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error))
    if isinstance(error, SafetensorError):
        return OSError(None, str(error))
    return RuntimeError(f"in another process: {type(error).__name__}: {error}")
