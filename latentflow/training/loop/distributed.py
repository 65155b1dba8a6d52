"""Processes, devices and precision of a run, and weights spread over processes (FSDP2), by accelerate."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env, patch_environment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...config import LoopConfig
from ...errors import UserError

# The others wait while the main process encodes the data, which may take hours. A process that dies is noticed by its
# launcher.
PATIENCE = timedelta(days=2)


def process_state() -> PartialState:
    """Return accelerate's state of this process: ``device``, ``num_processes``, ``is_main_process``.

    Several processes (torchrun, accelerate launch) on a machine without an accelerator talk through gloo; accelerate's
    own default would take each of them for the only one.
    """
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


def samples_per_step(loop: LoopConfig) -> int:
    """Count the samples of an optimiser step, over all processes."""
    return loop.train_batch_size * loop.gradient_accumulation_steps * int(process_state().num_processes)


def in_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Return whether ``here`` is true in any process of the run; all of them must call this."""
    return most_of_any_process(accelerator, int(here)) > 0


def most_of_any_process(accelerator: Accelerator, here: int) -> int:
    """Return the largest ``here`` of all processes of the run; all of them must call this."""
    if accelerator.num_processes == 1:
        return here
    numbers: torch.Tensor = accelerator.gather(torch.tensor([here], device=accelerator.device))
    return int(numbers.max())


def together(action: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Call ``action`` in every process (of ``group``), which must all call this; a failure of one is one of all.

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
    for first in (failure, *failures):
        if first is not None:
            raise first


def _portable(error: Exception | None) -> Exception | None:
    """Return the error in a form that other processes can receive."""
    if error is None or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error))
    return RuntimeError(f"in another process: {type(error).__name__}: {error}")


Precision = Literal["no", "bf16", "fp16"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware.

    A CPU that only emulates it is slower than in float32, by a factor of up to 70.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        resolve(mixed_precision, device)
    ]


def resolve(mixed_precision: str, device: torch.device) -> Precision:
    """Return ``mixed_precision``, where "auto" is bf16 if that is fast, else no."""
    if mixed_precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "no"
    return mixed_precision  # type: ignore[return-value]


def matrix_product_rate(device: torch.device, dtype: torch.dtype, least: float = 0.0) -> float:
    """Measure floating-point operations per second of a matrix product (a multiply-add is two): the best of many.

    Args:
        least: seconds of measuring; the longer, the likelier that other processes leave a product whole.
    """
    # On a CPU short ones, which other processes leave whole now and then.
    size, tries = (512, 20) if device.type == "cpu" else (8192, 5)
    # A GPU multiplies more equal numbers in a second than random ones; the run's own random state must stay.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    seconds: list[float] = []
    until = time.perf_counter() + least
    while len(seconds) < tries or time.perf_counter() < until:
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def full_rate(accelerator: Accelerator, config: LoopConfig, flops: float) -> float | None:
    """Return samples of ``flops`` operations per second if all devices did nothing but multiply matrices.

    The main process measures it; None in the others.
    """
    if not accelerator.is_main_process:
        return None
    rate = matrix_product_rate(accelerator.device, compute_dtype(config.mixed_precision, accelerator.device))
    return float(rate * accelerator.num_processes / flops)


def check_precision(mixed_precision: str) -> None:
    """Refuse fp16 without a GPU.

    Raises:
        UserError: there is none.
    """
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "--mixed-precision fp16 needs a GPU", "Leave it out: auto takes the fastest there is."
        )


def make_accelerator(config: LoopConfig, find_unused_parameters: bool) -> Accelerator:
    """Return the accelerator of a run.

    Raises:
        UserError: fp16 without a GPU.
    """
    check_precision(config.mixed_precision)
    # `process_state` comes before accelerate makes a state of its own.
    precision = resolve(config.mixed_precision, process_state().device)
    AcceleratorState._reset_state()  # a process may train an autoencoder and then a flow with other settings
    kwargs = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=find_unused_parameters
    )
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `LoopConfig.shard` decides
        return Accelerator(mixed_precision=precision, kwargs_handlers=[kwargs])


@contextmanager
def fast_float32(accelerator: Accelerator) -> Iterator[None]:
    """Within the context a GPU multiplies matrices of a float32 run as TensorFloat32: in steps of 2^-11, with sums and
    range of float32. Runs in lower precision keep the few products that they have in float32 as they are.
    """
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "no":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def uncached_autocast(device: torch.device) -> torch.autocast:
    """Return autocast as it is on ``device`` now, without its cache of weights in lower precision.

    For computations without gradients in the middle of a training step, or with other weights in place: the step would
    take what the cache kept of those for its own.
    """
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )


def is_sharded(config: LoopConfig, processes: int, needs_average: bool = False) -> bool:
    """Return whether a run is sharded; with one process there is nothing to share.

    Args:
        needs_average: the loss evaluates the averaged network.

    Raises:
        UserError: settings that exclude one another.
    """
    if not config.shard or processes == 1:
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
    if config.mixed_precision == "fp16":
        raise UserError("--mixed-precision fp16 cannot be used with --shard", "Use bf16.")
    if needs_average:
        raise UserError(
            "--alignment self cannot be used with --shard: no process holds the averaged network",
            "Leave out one of the two; --alignment encoder can be sharded.",
        )
    return True


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that parts of a network name, by diffusers' convention, in ``_repeated_blocks``."""
    names = {name for part in network.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    return [part for part in network.modules() if type(part).__name__ in names]


def sharded(module: nn.Module, accelerator: Accelerator, *, compiled: bool) -> nn.Module:
    """Return a copy of ``module``, which stays whole, of which each process holds a part of every parameter.

    A network's blocks (`repeated_blocks`) are put together one at a time while they compute, everything else during
    the whole pass. Weights stay float32.
    """
    trained = copy.deepcopy(module)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in reversed(repeated_blocks(trained)):  # the inner ones first
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    return trained


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing memory; the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, the same whole one in every process, sharded as ``like``, without communication."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
