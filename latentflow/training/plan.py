"""What a run is going to do, in words: printed before it starts and by `--dry-run`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ..autoencoder import Autoencoder, downscale_factor, latent_channels
from ..data import Source
from ..memory import peak_gib
from .config import LoopConfig
from .flow import FlowStage
from .order import SampleRandom
from .precision import resolve
from .processes import process_state
from .start import Networks

_FEW = 1000


def plan_lines(source: Source, training: Source, validation: Source, loop: LoopConfig) -> list[str]:
    """The data and the schedule."""
    state = process_state()
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * state.num_processes
    epochs = loop.max_train_steps * batch / max(1, len(training.uses()))
    lines = [f"{source.name}: {note}" for note in source.notes]
    lines += [
        f"data: {len(training)} pictures to train on, {len(validation)} held out; condition: {source.kind}",
        f"plan: {loop.max_train_steps} steps of {batch} samples = {epochs:.1f} epochs, {loop.optimizer}, learning rate "
        f"{loop.learning_rate:g}, {_precision(loop)} on {state.device}",
    ]
    if len(training) < _FEW:
        lines.append(
            f"WARNING: {len(training)} pictures are few: the model will memorise many of them. `latentflow evaluate` "
            "measures it; more pictures, fewer steps or fine-tuning (--init-from) lessen it."
        )
    if state.device.type == "cpu":
        lines.append("WARNING: no GPU: expect 10 to 100 times the time of one; --dry-run estimates it.")
    return lines


def estimate_lines(
    stage: FlowStage, networks: Networks, vae: Autoencoder, source: Source, loop: LoopConfig, latent_size: int
) -> list[str]:
    """Sizes, memory and time; the time is measured on three steps with random latents."""
    device = process_state().device
    stage = stage.to(device)
    batch = _random_batch(stage, networks, vae, source, loop, latent_size, device)
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=resolve(loop.mixed_precision, device) == "bf16"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with autocast:
            loss = stage(batch)["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = min(seconds[1:]) * loop.gradient_accumulation_steps
    trained = _count(stage)
    # Weights, gradients, weight average: 4 bytes each; the optimiser 4 (Muon's momentum) or 8 (AdamW).
    state_bytes = trained * (12 + (4 if loop.optimizer == "muon" else 8))
    hours = step * loop.max_train_steps / 3600
    encoder = networks.text_encoder
    return [
        f"autoencoder: {_size(vae)}, latents {latent_channels(vae)} x {latent_size} x {latent_size}",
        f"network: {_size(networks.network)}",
        *([f"text encoder: {_size(encoder)}"] if encoder is not None else []),
        f"memory: {state_bytes / 2**30:.2f} GiB for weights, gradients, average and optimiser, and the "
        f"activations of {loop.train_batch_size} samples (at most {peak_gib():.1f} GiB in all, as measured)",
        f"time: {step:.2f} s a step, {hours:.1f} hours in all (measured; the autoencoder's training, caching, "
        "validation and previews come on top)",
    ]


def _random_batch(
    stage: FlowStage,
    networks: Networks,
    vae: Autoencoder,
    source: Source,
    loop: LoopConfig,
    latent_size: int,
    device: torch.device,
) -> dict[str, Any]:
    rows = loop.train_batch_size
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
    if stage.masked:
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
