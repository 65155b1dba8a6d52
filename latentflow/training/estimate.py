"""The cost of a run, estimated from shapes: sizes, operations, memory and time, as lines for people."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..autoencoder import Autoencoder, downscale_factor, latent_channels
from ..config import LoopConfig
from ..data import Source
from ..models import Condition
from ..utils.memory import peak_gib
from .loop.data_order import SampleRandom, SampleUse
from .loop.distributed import compute_dtype, matrix_product_rate, process_state, resolve
from .loop.loader import TrainingData, by_group, groups_of, load_batch
from .loop.optimizers import Muon, make_optimizers
from .losses.flow import FlowLoss
from .networks import Networks

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
    draws = [SampleUse(index, index) for index in range(min(len(data), _FIRST))]
    batch = load_batch(data, by_group(draws, groups_of(data))[0])
    tokens, text = batch.get("input_ids"), batch.get("text")
    length = tokens.shape[1] if tokens is not None else text.shape[1] if text is not None else 0
    flops = network_cost(network, size, length).flops
    if tokens is not None and text_encoder is not None:
        flops += text_encoder_cost(text_encoder, tokens[:1]).flops
    return flops


def encoding_flops(vae: Autoencoder, resolution: int) -> float:
    """Of one image of ``resolution`` x ``resolution`` through the encoder, forward only."""
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


_FEW = 1000
_LONGEST = 512  # tokens of a caption, where the tokenizer names no limit
_TIMED_SECONDS = 3.0  # of one of the steps that are timed, at the speed of a matrix product


def plan_lines(
    source: Source, training: Source, validation: Source, loop: LoopConfig, own_share: float | None = None
) -> list[str]:
    """The data and the schedule.

    Args:
        own_share: of a fine-tune, the share of the samples that are images of the data.
    """
    state = process_state()
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * state.num_processes
    epochs = (own_share or 1.0) * loop.max_train_steps * batch / max(1, len(training.uses()))
    lines = [f"{source.name}: {note}" for note in source.notes]
    lines += [
        f"data: {len(training)} images to train on, {len(validation)} held out; condition: {source.kind}",
        f"plan: {loop.max_train_steps} steps of {batch} samples = {epochs:.1f} epochs, {loop.optimizer}, learning rate "
        f"{loop.learning_rate:g}, {_precision(loop)} on {state.device}",
    ]
    if len(training) < _FEW and own_share is None:  # a fine-tune has lines of its own for few images
        lines.append(
            f"WARNING: {len(training)} images are few: the model will memorise many of them. `latentflow evaluate` "
            "measures it; more images, fewer steps or fine-tuning (--init-from) lessen it."
        )
    if state.device.type == "cpu":
        lines.append("WARNING: no GPU: expect 10 to 100 times the time of one; --dry-run estimates it.")
    return lines


def estimate_lines(
    stage: FlowLoss,
    networks: Networks,
    vae: Autoencoder,
    source: Source,
    loop: LoopConfig,
    latent_size: int,
    views: int,
) -> list[str]:
    """Sizes, operations, memory and time of a run; each image is encoded ``views`` times before it.

    Operations and memory come from shapes alone, the time from steps with random latents on this machine. The network
    may be on the meta device: it gets (random) weights only to be timed, and only if they take little of the memory.
    """
    return _Estimate(stage, networks, vae, source, loop, latent_size, views).lines()


@dataclass(frozen=True)
class _Estimate:
    stage: FlowLoss
    networks: Networks
    vae: Autoencoder
    source: Source
    loop: LoopConfig
    latent_size: int
    views: int

    def lines(self) -> list[str]:
        vae, encoder, size = self.vae, self.networks.text_encoder, self.latent_size
        step = self.cost(self.dtype).flops * self.samples
        return [
            f"autoencoder: {_size(vae)}, latents {latent_channels(vae)} x {size} x {size}",
            f"network: {_size(self.networks.network)}",
            *([f"text encoder: {_size(encoder)}"] if encoder is not None else []),
            f"compute: {_flops(step / self.samples)} a sample, {_flops(step)} a step, "
            f"{_flops(step * self.loop.max_train_steps)} in all, forward and backward (a multiply-add is 2 FLOPs); "
            f"to encode the images before it, {_flops(self.encoding * len(self.source) * self.views)}",
            f"memory: {self.held(self.dtype) / 2**30:.2f} GiB for weights, gradients, average and optimiser, and about "
            f"{self.activations(self.dtype) / 2**30:.2f} GiB for the activations of {self.loop.train_batch_size} "
            f"samples, in {str(self.dtype).removeprefix('torch.')}",
            self.time_here(),
            *(self.time_on(gpu) for gpu in GPUS),
            "on top come encoding, the optimiser, validation, previews, checkpoints and the autoencoder's own training",
        ]

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.loop.mixed_precision, process_state().device)

    @property
    def micro_batches(self) -> int:
        """Forward passes of one process in the whole run."""
        return self.loop.gradient_accumulation_steps * self.loop.max_train_steps

    @property
    def samples(self) -> int:
        """Of one step, over all processes."""
        accumulated = self.loop.train_batch_size * self.loop.gradient_accumulation_steps
        return accumulated * int(process_state().num_processes)

    @cached_property
    def encoding(self) -> float:
        return encoding_flops(self.vae, self.latent_size * downscale_factor(self.vae))

    @cached_property
    def _float32_cost(self) -> Cost:
        tokenizer, text_encoder = self.networks.tokenizer, self.stage.text_encoder
        length = min(tokenizer.model_max_length, _LONGEST) if tokenizer is not None else 0
        cost = network_cost(self.networks.network, self.latent_size, length)
        if text_encoder is not None:
            cost += text_encoder_cost(text_encoder, torch.ones(1, length, dtype=torch.long))
        # What is left of each masked image is encoded at each step.
        return cost + Cost(self.encoding if self.stage.masked else 0.0, 0.0)

    def cost(self, dtype: torch.dtype) -> Cost:
        """Of one sample, computed in ``dtype``."""
        cost = self._float32_cost
        return Cost(cost.flops, cost.activations * dtype.itemsize / 4)

    def held(self, dtype: torch.dtype) -> float:
        processes = int(process_state().num_processes) if self.loop.shard else 1
        return state_bytes(self.stage, self.loop, dtype) / processes

    def activations(self, dtype: torch.dtype) -> float:
        return self.cost(dtype).activations * self.loop.train_batch_size

    def time_here(self) -> str:
        """Timed, on as many samples as take seconds and fit; by the speed of matrix products where one is too many."""
        device, batch, cost = process_state().device, self.loop.train_batch_size, self.cost(self.dtype)
        speed = matrix_product_rate(device, self.dtype)
        room = 0.7 * _free_bytes(device) - 8 * _parameters(self.stage)  # weights and gradients
        rows = int(min(batch, _TIMED_SECONDS * speed / cost.flops, room / cost.activations))
        if rows < 1:
            hours = self.micro_batches * batch * cost.flops / speed / 3600
            return (
                f"time: about {_hours(hours)}, by the {speed / 1e12:.2g} TFLOP/s of a matrix product on this "
                f"{device.type}; one sample is too much to be timed"
            )
        seconds = self._timed(rows, device) * batch / rows
        some = "" if rows == batch else f", with {rows} of {batch} samples"
        return (
            f"time: {seconds * self.loop.gradient_accumulation_steps:.3g} s a step, "
            f"{_hours(seconds * self.micro_batches / 3600)} in all (forward and backward, measured on this "
            f"{device.type}{some}; "
            f"at most {peak_gib():.1f} GiB)"
        )

    def time_on(self, gpu: Gpu) -> str:
        rate = gpu.flops_per_second * UTILISATION
        hours = self._float32_cost.flops * self.micro_batches * self.loop.train_batch_size / rate / 3600
        needed = (self.held(torch.bfloat16) + self.activations(torch.bfloat16)) / 2**30
        line = (
            f"time on {process_state().num_processes} {gpu.name}: {_hours(hours)} in bfloat16, at {UTILISATION:.0%} "
            f"(assumed) of {gpu.flops_per_second / 1e12:.0f} TFLOP/s"
        )
        if needed > 0.9 * gpu.memory_gib:
            line += (
                f"; the {needed:.0f} GiB do not fit into its {gpu.memory_gib:.0f}: halve --train-batch-size and double "
                "--gradient-accumulation-steps, or use --gradient-checkpointing"
            )
        return line

    def _timed(self, rows: int, device: torch.device) -> float:
        """Seconds of a forward and a backward pass."""
        if any(one.is_meta for one in self.networks.network.parameters()):
            _fill(self.networks.network, device)
        stage = self.stage.to(device)
        batch = _random_batch(stage, self.networks, self.vae, self.source, rows, self.latent_size, device)
        autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with autocast:
                loss = stage(batch)["loss"]
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])  # the first warms up


@torch.no_grad()
def _fill(network: nn.Module, device: torch.device) -> None:
    """Random weights for a network on the meta device: how fast it is does not depend on them."""
    network.to_empty(device=device)
    for weight in network.parameters():
        weight.normal_(std=0.02)
    for one in network.buffers():
        one.zero_()


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _random_batch(
    stage: FlowLoss,
    networks: Networks,
    vae: Autoencoder,
    source: Source,
    rows: int,
    latent_size: int,
    device: torch.device,
) -> dict[str, Any]:
    noise = SampleRandom(0, list(range(rows))).normal((latent_channels(vae), latent_size, latent_size))
    batch: dict[str, Any] = {"latents": noise.to(device), "sample_ids": list(range(rows))}
    if source.kind == "class":
        batch["class_labels"] = torch.zeros(rows, dtype=torch.long, device=device)
    elif source.kind == "text" and networks.trained_text:
        tokens = networks.tokenizer(
            (source.captions() * rows)[:rows], padding=True, truncation=True, return_tensors="pt"
        )
        batch["input_ids"], batch["attention_mask"] = (
            tokens["input_ids"].to(device),
            tokens["attention_mask"].to(device),
        )
    elif source.kind == "text":
        batch["text"] = torch.zeros(rows, 16, networks.network.config["text_dim"], device=device)
        batch["text_mask"] = torch.ones(rows, 16, dtype=torch.bool, device=device)
    if stage.needs_pixels:
        side = latent_size * downscale_factor(vae)
        batch["pixels"] = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
    return batch


def _precision(loop: LoopConfig) -> str:
    precision = resolve(loop.mixed_precision, process_state().device)
    return "float32" if precision == "no" else precision


def _size(module: nn.Module) -> str:
    return f"{type(module).__name__}, {_parameters(module) / 1e6:.1f} M parameters"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(count: float) -> str:
    for unit, name in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOPs"
    return f"{count / 1e9:.3g} GFLOPs"


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.1g} min"
