"""What a training costs, from shapes alone: a network is run on the meta device, which computes and holds nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ...autoencoder import Autoencoder
from ...models import Condition
from ..loop.batches import TrainingData, by_group, groups_of, numbered
from ..loop.config import LoopConfig
from ..loop.muon import Muon
from ..loop.optimizers import make_optimizers
from ..loop.order import Draw

Shape = tuple[int, ...]

_FIRST = 64  # samples that tell how long captions are
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
    """The cost of one sample of ``size`` x ``size`` latents and captions of ``text_length`` tokens (0: without one),
    in float32.

    Args:
        network: a velocity network on any device, also the meta device; it is not changed.
    """
    with torch.device("meta"):
        shapes: Any = type(network).from_config(network.config)  # type: ignore[attr-defined]
    if network.is_gradient_checkpointing:
        shapes.enable_gradient_checkpointing()
    config = shapes.config
    x = _meta(_ROWS, config.in_channels, size, size)
    condition = Condition(
        class_labels=None if config.num_classes is None else _meta(_ROWS, dtype=torch.long),
        text=_meta(_ROWS, text_length, config.text_dim) if config.text_dim and text_length else None,
        text_mask=_meta(_ROWS, text_length, dtype=torch.bool) if config.text_dim and text_length else None,
        channels=_meta(_ROWS, config.condition_channels, size, size) if config.condition_channels else None,
        sizes=_meta(_ROWS, 6) if config.size_conditioning else None,
    )
    with _fused_attention():
        total = _count(lambda: shapes(x, _meta(_ROWS), condition), set(shapes.parameters()))
    return Cost(total.flops / _ROWS, total.activations / _ROWS)


def text_encoder_cost(encoder: nn.Module, input_ids: Tensor) -> Cost:
    """Return the cost of one caption for a text encoder that is trained along.

    Args:
        input_ids: (1, L) tokens.
    """
    shapes = copy.deepcopy(encoder).to("meta")
    weights: set[Tensor] = {*shapes.parameters(), *shapes.buffers()}
    with _fused_attention():
        return _count(lambda: shapes(input_ids=input_ids.to("meta")).last_hidden_state, weights)


def sample_flops(network: nn.Module, text_encoder: nn.Module | None, data: TrainingData, size: int) -> float:
    """Of one sample, forward and backward: the network, and the text encoder that is trained along.

    The first batch of ``data`` says how long captions are; latents are ``size`` x ``size``. What a teacher or a frozen
    encoder computes does not count: it is not the model.
    """
    draws = [Draw(index, index) for index in range(min(len(data), _FIRST))]
    batch = numbered(data, by_group(draws, groups_of(data))[0])
    tokens, text = batch.get("input_ids"), batch.get("text")
    length = tokens.shape[1] if tokens is not None else text.shape[1] if text is not None else 0
    flops = network_cost(network, size, length).flops
    if tokens is not None and text_encoder is not None:
        flops += text_encoder_cost(text_encoder, tokens[:1]).flops
    return flops


def encoding_flops(vae: Autoencoder, resolution: int) -> float:
    """Of one picture of ``resolution`` x ``resolution`` through the encoder, forward only."""
    shapes = copy.deepcopy(vae).to("meta")
    with torch.no_grad(), _flop_counter() as counter, _fused_attention():
        shapes.encode(_meta(1, 3, resolution, resolution, dtype=vae.dtype))
    return float(counter.get_total_flops())


def state_bytes(stage: nn.Module, loop: LoopConfig, dtype: torch.dtype) -> float:
    """Weights, gradients, weight averages and optimiser in float32, and the weights once more in ``dtype`` if lower."""
    trained = sum(one.numel() for one in stage.parameters() if one.requires_grad)
    copies = 12 + 4 * len(loop.ema_lengths) + (dtype.itemsize if dtype != torch.float32 else 0)
    optimizer = sum(
        _moment_bytes(one, parameter.numel())
        for one in make_optimizers(stage, loop)
        for group in one.param_groups
        for parameter in group["params"]
    )
    return copies * trained + optimizer


def _moment_bytes(optimizer: torch.optim.Optimizer, size: int) -> int:
    """What an optimiser keeps of a parameter of ``size`` elements."""
    if isinstance(optimizer, Muon):
        return 4 * size
    # Two moments; in 8 bits with a float32 scale for each block of 256, where the tensor is large enough.
    if type(optimizer).__name__ == "AdamW8bit" and size >= 4096:
        return 2 * (size + 4 * math.ceil(size / 256))
    return 8 * size


def _count(forward: Callable[[], Tensor], weights: set[Tensor]) -> Cost:
    """Run ``forward`` and its backward pass. What autograd keeps counts once for each storage; weights do not."""
    own = {one.untyped_storage()._cdata for one in weights}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    with _flop_counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        activations = sum(storage.nbytes() for storage in kept.values())
        output.float().square().mean().backward()
    return Cost(float(counter.get_total_flops()), float(activations))


def _flop_counter() -> FlopCounterMode:
    """Return a counter that knows the kernel of `_fused_attention` by its shapes: not every torch counts it."""
    kernel = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            kernel._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            kernel._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        },
    )


def _attention_flops(q: Shape, k: Shape, v: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward_flops(
    grad: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, out_shape: Any = None, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention on the meta device as one operation, as it runs on GPUs; there it would become its matrix products.

    The function is exchanged: torch's modes do not reach what gradient checkpointing computes again.
    """
    usual = F.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        if not q.is_meta:
            return usual(q, k, v, attn_mask, **options)
        if attn_mask is not None:
            attn_mask = _meta(*attn_mask.shape, dtype=q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
