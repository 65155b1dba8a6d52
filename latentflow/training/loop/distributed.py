"""The processes, devices and precision of a run, and weights spread over processes (FSDP2), by accelerate."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...config import LoopConfig
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


Precision = Literal["no", "bf16", "fp16"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware. A CPU that only emulates it is slower than in
    float32, by a factor of up to 70."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The type that matrix products run in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        resolve(mixed_precision, device)
    ]


def resolve(mixed_precision: str, device: torch.device) -> Precision:
    """``mixed_precision`` as asked for; "auto" is bf16 where it is fast, else no."""
    if mixed_precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "no"
    return mixed_precision  # type: ignore[return-value]


def uncached_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is on ``device`` now, without its memory of weights in lower precision.

    For what is computed without gradients in the middle of a training step, or with other weights in their place:
    what the memory kept of those, the step would take for its own.
    """
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )


def is_sharded(config: LoopConfig, accelerator: Accelerator) -> bool:
    """Whether a run is sharded; with one process there is nothing to share.

    Raises:
        UserError: settings that cannot be had together.
    """
    if not config.shard or accelerator.num_processes == 1:
        return False
    if config.auto_micro_batch:
        raise UserError(
            "--auto-micro-batch cannot be used with --shard: the processes need one another in every forward pass",
            "Leave it out; --gradient-checkpointing, or a smaller --train-batch-size and more "
            "--gradient-accumulation-steps, need less memory.",
        )
    if config.optimizer == "adamw-8bit":
        raise UserError(
            "--optimizer adamw-8bit cannot be used with --shard: bitsandbytes has no sharded 8-bit moments",
            "Use adamw: sharding spreads its moments over the processes.",
        )
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise UserError("accelerate's --fsdp_offload_params is not supported", "Leave it out.")
    if accelerator.scaler is not None:
        raise UserError("--mixed-precision fp16 cannot be used with --shard", "Use bf16.")
    return True


def sharded(module: nn.Module, device: torch.device, processes: int, *, compiled: bool = False) -> nn.Module:
    """A copy of ``module``, which stays whole where it is, of which each process holds a part of every parameter.

    A network's blocks (``_repeated_blocks``, by diffusers' convention) are put together one at a time while they
    compute, everything else during the whole pass. Weights stay float32.
    """
    trained = copy.deepcopy(module)
    mesh = init_device_mesh(device.type, (processes,))
    names = {name for one in trained.modules() for name in getattr(one, "_repeated_blocks", None) or ()}
    blocks = [one for one in trained.modules() if type(one).__name__ in names]
    for block in reversed(blocks):  # the inner ones first
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    return trained


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory; itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every process must ask. Itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, the same whole one in every process, sharded as ``like``, without communication."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
