"""The cost of a run, estimated before it starts, as lines for people: sizes, operations, memory and time.

torch counts the operations, on the meta device: without weights, so that a network too large for this machine can be
planned. A real step would count a teacher and a frozen encoder as well, which are no part of the model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..autoencoder import Autoencoder, downscale_factor, latent_channels
from ..config import LoopConfig
from ..data import Source
from ..families.stored_weights import parameter_count
from ..models import Condition, settings_of
from ..utils.memory import peak_gib
from ..utils.progress import duration_text
from .fine_tune.teacher_samples import TeacherSamples
from .loop.distributed import compute_dtype, matrix_product_rate, process_state
from .loop.loader import TrainingData, first_batch, to_device
from .loop.optimizers import Muon, adam_bytes, make_optimizers
from .loop.random_numbers import CounterRandom
from .trained_model import TrainedModel

_LONGEST = 512  # tokens of a caption, where the tokenizer names no limit
_FIRST = 64  # samples that show how long captions are
_ROWS = 2  # of the batch on the meta device; the part of the cost that does not grow with the rows is small
_TIMED_SECONDS = 3.0  # of one of the steps that are timed, at the speed of a matrix product
UTILISATION = 0.4  # of the peak: the share that well-run transformers of this size reach
# What a step takes at least, however fast the GPU: PyTorch starts one operation after the other on the CPU, and the
# latents are loaded (measured with one process: docs/measurements/speed.md).
SECONDS_TO_START = 10e-6  # an operation
LOADED_PER_SECOND = 3000.0  # latents


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


# ---------------------------------------------------------------- cost by shapes


@dataclass(frozen=True)
class Cost:
    """The cost of one sample, forward and backward.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add is two.
        activations: bytes that are kept for the backward pass in float32, with fused attention; half in bfloat16.
        operations: that are started on the device, for however many samples at once.
    """

    flops: float
    activations: float
    operations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.activations + other.activations,
            self.operations + other.operations,
        )


def network_cost(network: nn.Module, size: int, text_length: int) -> Cost:
    """Return the cost of one sample of ``size`` x ``size`` latents, in float32.

    Args:
        network: a velocity network on any device, also the meta device; it is not changed.
        text_length: tokens of a caption; 0: without one.
    """
    with torch.device("meta"):
        shapes: Any = type(network).from_config(network.config)  # type: ignore[attr-defined]
    if network.is_gradient_checkpointing:
        shapes.enable_gradient_checkpointing()
    config = settings_of(shapes)
    width, channels = config.get("text_dim"), config.get("condition_channels")
    x = _meta(_ROWS, size, size, dtype=torch.long)  # tokens
    if "vocabulary" not in config:
        x = _meta(_ROWS, config["in_channels"], size, size)
    condition = Condition(
        class_labels=None if config.get("num_classes") is None else _meta(_ROWS, dtype=torch.long),
        text=_meta(_ROWS, text_length, width) if width and text_length else None,
        text_mask=_meta(_ROWS, text_length, dtype=torch.bool) if width and text_length else None,
        channels=_meta(_ROWS, channels, size, size) if channels else None,
        sizes=_meta(_ROWS, 6) if config.get("size_conditioning") else None,
    )
    total = _count(lambda: shapes(x, _meta(_ROWS), condition), set(shapes.parameters()))
    return Cost(total.flops / _ROWS, total.activations / _ROWS, total.operations)


def text_encoder_cost(encoder: nn.Module, input_ids: Tensor) -> Cost:
    """Return the cost of one caption for a text encoder that is trained along.

    Args:
        input_ids: (1, L) tokens.
    """
    shapes = copy.deepcopy(encoder).to("meta")
    weights: set[Tensor] = {*shapes.parameters(), *shapes.buffers()}
    return _count(lambda: shapes(input_ids=input_ids.to("meta")).last_hidden_state, weights)


def sample_flops(network: nn.Module, text_encoder: nn.Module | None, data: TrainingData, size: int) -> float:
    """Return the operations of one sample, forward and backward: network, and text encoder if it is trained along.

    The first batch of ``data`` shows how long captions are; latents are ``size`` x ``size``.
    """
    batch = first_batch(data, _FIRST)
    tokens, text = batch.get("input_ids"), batch.get("text")
    length = tokens.shape[1] if tokens is not None else text.shape[1] if text is not None else 0
    flops = network_cost(network, size, length).flops
    if tokens is not None and text_encoder is not None:
        flops += text_encoder_cost(text_encoder, tokens[:1]).flops
    return flops


def encoding_flops(vae: Autoencoder, resolution: int) -> float:
    """Return the operations of encoding one image of ``resolution`` x ``resolution``."""
    shapes = copy.deepcopy(vae).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _fused_attention():
        shapes.encode(_meta(1, 3, resolution, resolution, dtype=vae.dtype))
    return float(counter.get_total_flops())


def state_bytes(loss: nn.Module, loop: LoopConfig, dtype: torch.dtype) -> float:
    """Return the bytes of weights, gradients, weight averages and optimiser in float32, and of weights in ``dtype`` if
    it is lower."""
    trained = sum(weight.numel() for weight in loss.parameters() if weight.requires_grad)
    copies = 12 + 4 * len(loop.ema_lengths) + (dtype.itemsize if dtype != torch.float32 else 0)
    moments = sum(
        _moment_bytes(optimizer, weight.numel())
        for optimizer in make_optimizers(loss, loop)
        for group in optimizer.param_groups
        for weight in group["params"]
    )
    return copies * trained + moments


def _moment_bytes(optimizer: torch.optim.Optimizer, size: int) -> int:
    """Return the bytes that an optimiser keeps of a parameter of ``size`` elements."""
    if isinstance(optimizer, Muon):
        return 4 * size
    return adam_bytes(size, eight_bit=type(optimizer).__name__ == "AdamW8bit")


def _count(forward: Callable[[], Tensor], weights: set[Tensor]) -> Cost:
    """Run ``forward`` and its backward pass. Each storage that autograd keeps counts once; weights do not."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other one gets its address
        return tensor

    with FlopCounterMode(display=False) as counter, _OperationCounter() as operations, _fused_attention():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        activations = sum(storage.nbytes() for storage in kept.values())
        output.float().square().mean().backward()
    return Cost(float(counter.get_total_flops()), float(activations), operations.count)


class _OperationCounter(TorchDispatchMode):
    """Counts the operations that compute something: not those that only return a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Compute attention on the meta device as one operation that torch's counter knows, as it runs on GPUs; there it
    would become its matrix products, which keep the scores.

    The function is exchanged: torch's modes do not reach the blocks that gradient checkpointing computes again.
    """
    usual = F.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Any:
        if not q.is_meta:
            return usual(q, k, v, attn_mask, **options)
        if attn_mask is not None:
            attn_mask = _meta(*attn_mask.shape, dtype=q.dtype)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, q.requires_grad)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------- the estimate


def estimate_lines(
    model: TrainedModel,
    vae: Autoencoder,
    source: Source,
    loop: LoopConfig,
    *,
    encoded: int,
    step: int,
    drawn: TeacherSamples | None,
    besides: Sequence[str],
) -> list[str]:
    """Estimate sizes, operations, memory and time of the rest of a run.

    Operations and memory come from shapes alone, the time from steps with random latents on this machine. The network
    may be on the meta device: it gets (random) weights only to be timed, and only if they take little of the memory.

    Args:
        encoded: number of images that are encoded first; each crop and each mirror image is one.
        step: the last one that the run has saved.
        drawn: samples of a checkpoint that are drawn first.
        besides: what else takes time, in words.
    """
    state, loss, latent_size = process_state(), model.loss, model.latent_size
    network, pipeline = model.flow_model.network, model.flow_model.pipeline
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    dtype = compute_dtype(loop.mixed_precision, state.device)
    processes = int(state.num_processes)
    samples = loop.train_batch_size * loop.gradient_accumulation_steps  # of a step and process
    steps = max(0, loop.max_train_steps - step)  # that are left

    # ---- operations ----
    encoding = encoding_flops(vae, latent_size * downscale_factor(vae))
    length = 0 if tokenizer is None else min(tokenizer.model_max_length, _LONGEST)
    cost = network_cost(network, latent_size, length)
    if loss.text_encoder is not None:
        cost += text_encoder_cost(loss.text_encoder, torch.ones(1, length, dtype=torch.long))
    if loss.masked:  # the known part of each image is encoded at each step
        cost += Cost(encoding, 0.0)
    flops = cost.flops * samples  # of a step and process

    # ---- memory ----
    def held(dtype: torch.dtype) -> float:
        return state_bytes(loss, loop, dtype) / (processes if loop.shard else 1)

    def activations(dtype: torch.dtype) -> float:
        return cost.activations * dtype.itemsize / 4 * loop.train_batch_size

    # ---- time on data sheets' GPUs ----
    operations = cost.operations * loop.gradient_accumulation_steps
    starting = operations * SECONDS_TO_START
    loading = samples / LOADED_PER_SECOND / max(1, loop.num_workers)
    loading_text = (
        f"{'or' if loop.num_workers else 'and'} {_milliseconds(loading)} to load {samples} latents "
        f"({LOADED_PER_SECOND:,.0f} a second{' and worker' if loop.num_workers else ''})"
    )

    def time_on(gpu: Gpu) -> str:
        computing = max(starting, flops / (gpu.flops_per_second * UTILISATION))
        seconds = max(computing, loading) if loop.num_workers else computing + loading
        needed = (held(torch.bfloat16) + activations(torch.bfloat16)) / 2**30
        line = f"time on {processes} {gpu.name}: {_about(seconds * steps)} in bfloat16, {_a_step(seconds)}"
        if needed > 0.9 * gpu.memory_gib:
            line += (
                f"; the {needed:.0f} GiB do not fit into its {gpu.memory_gib:.0f}: halve --train-batch-size and double "
                "--gradient-accumulation-steps, or use --gradient-checkpointing"
            )
        return line

    time_here, flops_here = _time_here(model, vae, source, loop, dtype, cost, steps)

    def drawing(drawn: TeacherSamples) -> str:
        side = drawn.side // downscale_factor(vae)
        # of a forward and backward pass, the forward pass is a third
        flops = drawn.count * drawn.evaluations * network_cost(network, side, length).flops / 3
        latents = 4 * latent_channels(vae) * side**2 * (2 if drawn.settings.noise else 1)
        rate = flops_here  # of a step, but samples are drawn in float32
        if dtype != torch.float32:
            rate *= matrix_product_rate(state.device, torch.float32) / matrix_product_rate(
                state.device, dtype
            )
        size = drawn.count * (latents + (3 * drawn.side**2 if loss.needs_pixels else 0))
        return (
            f"{drawn.settings.what}s: {drawn.count} of {drawn.side} pixels are drawn before training, in "
            f"{drawn.evaluations} evaluations each, {_flops(flops)}, {_about(flops / rate)} here; "
            f"{size / 2**20:.2g} MiB on the disk"
        )

    return [
        f"autoencoder: {_size(vae)}, latents {latent_channels(vae)} x {latent_size} x {latent_size}",
        f"network: {_size(network)}",
        *([f"text encoder: {_size(encoder)}"] if encoder is not None else []),
        *(
            [f"the run is at step {step}: what follows is for the {steps} steps that are left"]
            if step
            else []
        ),
        f"compute: {_flops(cost.flops)} a sample, {_flops(flops * processes)} a step, "
        f"{_flops(flops * processes * steps)} in all, forward and backward (a multiply-add is 2 FLOPs)",
        *([f"encoding: {encoded} images before training, {_flops(encoding * encoded)}"] if encoded else []),
        *([drawing(drawn)] if drawn else []),
        f"memory: {held(dtype) / 2**30:.2f} GiB for weights, gradients, average and optimiser, and about "
        f"{activations(dtype) / 2**30:.2f} GiB for the activations of {loop.train_batch_size} "
        f"samples, in {str(dtype).removeprefix('torch.')}",
        time_here,
        *map(time_on, GPUS),
        f"assumed of these GPUs: {UTILISATION:.0%} of their peak, at least {_milliseconds(starting)} a step to start "
        f"{operations:,} operations ({SECONDS_TO_START * 1e6:.0f} µs each), {loading_text}",
        f"not counted: {', '.join([*(['the encoding'] if encoded else []), 'the optimiser', *besides])}",
    ]


def _time_here(
    model: TrainedModel,
    vae: Autoencoder,
    source: Source,
    loop: LoopConfig,
    dtype: torch.dtype,
    cost: Cost,
    steps: int,
) -> tuple[str, float]:
    """Time steps on as many samples as take seconds and fit; go by the speed of matrix products where one is too many.

    Args:
        cost: of one sample in float32.
        steps: that are left.

    Returns:
        A line, and the FLOPs of a second.
    """
    device, batch = process_state().device, loop.train_batch_size
    forward_passes = loop.gradient_accumulation_steps * steps  # of one process
    speed = matrix_product_rate(device, dtype)
    room = 0.7 * _free_bytes(device) - 8 * parameter_count(model.loss)  # weights and gradients
    kept = cost.activations * dtype.itemsize / 4
    rows = int(min(batch, _TIMED_SECONDS * speed / cost.flops, room / kept))
    if rows < 1:
        seconds = forward_passes * batch * cost.flops / speed
        line = (
            f"time here: {_about(seconds)}, by the {speed / 1e12:.2g} TFLOP/s of a matrix product on this "
            f"{device.type}; one sample takes too long, or too much memory, to be timed"
        )
        return line, speed
    network = model.flow_model.network
    if any(weight.is_meta for weight in network.parameters()):
        _fill(network, device)
    loss = model.loss.to(device)
    example = to_device(_random_batch(model, vae, source, rows), device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            error = loss(example)["loss"]
        error.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = min(times[1:]) * batch / rows  # the first warms up
    some = "" if rows == batch else f", with {rows} of {batch} samples"
    line = (
        f"time here: {_about(seconds * forward_passes)}, "
        f"{_a_step(seconds * loop.gradient_accumulation_steps)} (forward and backward, measured on this "
        f"{device.type}{some}; at most {peak_gib():.1f} GiB)"
    )
    return line, batch * cost.flops / seconds


@torch.no_grad()
def _fill(network: nn.Module, device: torch.device) -> None:
    """Give random weights to a network on the meta device: its speed does not depend on them."""
    network.to_empty(device=device)
    for weight in network.parameters():
        weight.normal_(std=0.02)
    for buffer in network.buffers():
        buffer.zero_()


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _random_batch(model: TrainedModel, vae: Autoencoder, source: Source, rows: int) -> dict[str, Any]:
    flow_model, size, sample_ids = model.flow_model, model.latent_size, list(range(rows))
    data = torch.zeros(rows, size, size, dtype=torch.long)  # tokens
    if not flow_model.draws_tokens:
        data = CounterRandom(0, sample_ids).normal((latent_channels(vae), size, size))
    batch: dict[str, Any] = {"latents": data, "sample_ids": sample_ids}
    if source.kind == "class":
        batch["class_labels"] = torch.zeros(rows, dtype=torch.long)
    elif source.kind == "text" and model.loss.trains_text:
        texts = (source.captions() * rows)[:rows]
        batch |= flow_model.pipeline.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    elif source.kind == "text":
        batch["text"] = torch.zeros(rows, 16, settings_of(flow_model.network)["text_dim"])
        batch["text_mask"] = torch.ones(rows, 16, dtype=torch.bool)
    if model.loss.needs_pixels:
        side = size * downscale_factor(vae)
        batch["pixels"] = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    return batch


def _size(module: nn.Module) -> str:
    return f"{type(module).__name__}, {parameter_count(module) / 1e6:.1f} M parameters"


def _flops(count: float) -> str:
    for unit, name in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOPs"
    return f"{count / 1e9:.3g} GFLOPs"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def _about(seconds: float) -> str:
    return f"about {duration_text(seconds)}" if seconds >= 1 else duration_text(seconds)


def _a_step(seconds: float) -> str:
    return f"{_milliseconds(seconds)} a step" if seconds < 1 else f"{seconds:.3g} s a step"
