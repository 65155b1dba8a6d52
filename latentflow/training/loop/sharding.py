"""Weights, gradients, averages and optimiser states spread over the processes: FSDP2."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import UserError
from .config import LoopConfig


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
