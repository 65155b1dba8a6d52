"""What a run is going to do and to cost, in words: printed before it starts and by `--dry-run`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import nn

from ...autoencoder import Autoencoder, downscale_factor, latent_channels
from ...data import Source
from ...memory import peak_gib
from ..loop.config import LoopConfig
from ..loop.order import SampleRandom
from ..loop.precision import compute_dtype, resolve
from ..loop.processes import process_state
from ..loop.speed import matrix_product_rate
from ..stages.flow import FlowStage
from .cost import GPUS, UTILISATION, Cost, Gpu, encoding_flops, network_cost, state_bytes, text_encoder_cost
from .start import Networks

_FEW = 1000
_LONGEST = 512  # tokens of a caption, where the tokenizer names no limit
_TIMED_SECONDS = 3.0  # of one of the steps that are timed, at the speed of a matrix product


def plan_lines(
    source: Source, training: Source, validation: Source, loop: LoopConfig, own_share: float | None = None
) -> list[str]:
    """The data and the schedule.

    Args:
        own_share: of a fine-tune, the share of the samples that are pictures of the data.
    """
    state = process_state()
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * state.num_processes
    epochs = (own_share or 1.0) * loop.max_train_steps * batch / max(1, len(training.uses()))
    lines = [f"{source.name}: {note}" for note in source.notes]
    lines += [
        f"data: {len(training)} pictures to train on, {len(validation)} held out; condition: {source.kind}",
        f"plan: {loop.max_train_steps} steps of {batch} samples = {epochs:.1f} epochs, {loop.optimizer}, learning rate "
        f"{loop.learning_rate:g}, {_precision(loop)} on {state.device}",
    ]
    if len(training) < _FEW and own_share is None:  # a fine-tune has lines of its own for few pictures
        lines.append(
            f"WARNING: {len(training)} pictures are few: the model will memorise many of them. `latentflow evaluate` "
            "measures it; more pictures, fewer steps or fine-tuning (--init-from) lessen it."
        )
    if state.device.type == "cpu":
        lines.append("WARNING: no GPU: expect 10 to 100 times the time of one; --dry-run estimates it.")
    return lines


def estimate_lines(
    stage: FlowStage,
    networks: Networks,
    vae: Autoencoder,
    source: Source,
    loop: LoopConfig,
    latent_size: int,
    views: int,
) -> list[str]:
    """Sizes, operations, memory and time of a run; each picture is encoded ``views`` times before it.

    Operations and memory come from shapes alone, the time from steps with random latents on this machine. The network
    may be on the meta device: it gets (random) weights only to be timed, and only if they take little of the memory.
    """
    return _Estimate(stage, networks, vae, source, loop, latent_size, views).lines()


@dataclass(frozen=True)
class _Estimate:
    stage: FlowStage
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
            f"to encode the pictures before it, {_flops(self.encoding * len(self.source) * self.views)}",
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
        # What is left of each masked picture is encoded at each step.
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
        room = 0.7 * _free_bytes(device) - 8 * _count(self.stage)  # weights and gradients
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
    stage: FlowStage,
    networks: Networks,
    vae: Autoencoder,
    source: Source,
    rows: int,
    latent_size: int,
    device: torch.device,
) -> dict[str, Any]:
    noise = SampleRandom(0, list(range(rows))).normal((latent_channels(vae), latent_size, latent_size))
    batch: dict[str, Any] = {"latents": noise.to(device), "numbers": list(range(rows))}
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
    return f"{type(module).__name__}, {_count(module) / 1e6:.1f} M parameters"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(count: float) -> str:
    for unit, name in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOPs"
    return f"{count / 1e9:.3g} GFLOPs"


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.1g} min"
