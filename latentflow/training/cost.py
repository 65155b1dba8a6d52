"""What a training costs, from shapes alone: a network is run on the meta device, which computes and holds nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..autoencoder import Autoencoder
from ..models import Condition
from .config import LoopConfig
from .muon import Muon
from .optimizers import make_optimizers

_ROWS = 2  # of the batch on the meta device; what does not grow with the rows is too little to matter


@dataclass(frozen=True)
class Cost:
    """Of one sample, forward and backward.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add is two.
        activations: bytes that are kept for the backward pass in float32, with fused attention; half in bfloat16.
    """

    flops: float
    activations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.activations + other.activations)


@dataclass(frozen=True)
class Gpu:
    """A graphics processor by its data sheet: dense bfloat16 products with float32 sums."""

    name: str
    flops_per_second: float
    memory_gib: float


GPUS = (
    Gpu("NVIDIA H100 SXM", 989e12, 80),
    Gpu("NVIDIA A100", 312e12, 80),
    Gpu("NVIDIA RTX 4090", 165e12, 24),
)
UTILISATION = 0.4  # of the peak: what well-run transformers of this size reach


def network_cost(network: nn.Module, size: int, text_length: int) -> Cost:
    """The cost of one sample of ``size`` x ``size`` latents and captions of ``text_length`` tokens, in float32.

    Args:
        network: a velocity network on any device, also the meta device; it is not changed.
    """
    meta = {
        name: torch.empty_like(one, device="meta")
        for name, one in (*network.named_parameters(), *network.named_buffers())
    }
    for name, one in network.named_parameters():
        meta[name].requires_grad_(one.requires_grad)
    config: Any = network.config
    x = _meta(_ROWS, config.in_channels, size, size)
    condition = Condition(
        class_labels=None if config.num_classes is None else _meta(_ROWS, dtype=torch.long),
        text=None if config.text_dim is None else _meta(_ROWS, text_length, config.text_dim),
        text_mask=None if config.text_dim is None else _meta(_ROWS, text_length, dtype=torch.bool),
        channels=_meta(_ROWS, config.condition_channels, size, size) if config.condition_channels else None,
    )
    with _FusedAttention():
        total = _count(
            lambda: functional_call(network, meta, (x, _meta(_ROWS), condition)), set(meta.values())
        )
    return Cost(total.flops / _ROWS, total.activations / _ROWS)


def text_encoder_cost(encoder: nn.Module, input_ids: Tensor) -> Cost:
    """The cost of one caption for a text encoder that is trained along; it is small, and really runs.

    Args:
        input_ids: (1, L) tokens.
    """
    weights: set[Tensor] = {*encoder.parameters(), *encoder.buffers()}
    before = [one.grad for one in encoder.parameters()]
    cost = _count(lambda: encoder(input_ids=input_ids).last_hidden_state, weights)
    for one, grad in zip(encoder.parameters(), before, strict=True):
        one.grad = grad
    return cost


def encoding_flops(vae: Autoencoder, resolution: int) -> float:
    """Of one picture of ``resolution`` x ``resolution`` through the encoder, forward only."""
    shapes = copy.deepcopy(vae).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _FusedAttention():
        shapes.encode(_meta(1, 3, resolution, resolution, dtype=vae.dtype))
    return float(counter.get_total_flops())


def state_bytes(stage: nn.Module, loop: LoopConfig, dtype: torch.dtype) -> float:
    """Weights, gradients, weight average and optimiser in float32, and the weights once more in ``dtype`` if lower."""
    trained = sum(one.numel() for one in stage.parameters() if one.requires_grad)
    copies = 12 + (dtype.itemsize if dtype != torch.float32 else 0)
    optimizer = 0.0
    for one in make_optimizers(stage, loop):
        moments = 1 if isinstance(one, Muon) else 2
        optimizer += 4 * moments * sum(p.numel() for group in one.param_groups for p in group["params"])
    return copies * trained + optimizer


def _count(forward: Callable[[], Tensor], weights: set[Tensor]) -> Cost:
    """Run ``forward`` and its backward pass. What autograd keeps counts once for each storage; weights do not."""
    own = {one.untyped_storage()._cdata for one in weights}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        activations = sum(storage.nbytes() for storage in kept.values())
        output.float().square().mean().backward()
    return Cost(float(counter.get_total_flops()), float(activations))


class _FusedAttention(TorchFunctionMode):
    """Attention on the meta device as one operation, as it runs on GPUs; there it would become its matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = _meta(*mask.shape, dtype=q.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, attn_mask=mask)[0]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
