"""Speed of the training loop against bare PyTorch loops, turn by turn.

    python benchmarks/training_speed.py [--rounds 5] [--steps 12] [--threads 2] [--compile]

All train a transformer of width 256 and depth 8 with 10 classes on 64 latent tokens, batch 64, with fused AdamW, in
bfloat16 autocast where the machine computes in it, else in float32. Ours is `latentflow.training.fit` over our DiT
with its defaults: gradient clipping, weight average, checks, reports, noise that depends on the sample alone. The bare
loops have none of these: one over our DiT, one over diffusers' `DiTTransformer2DModel` of the
same width, depth and heads. Prints a line a round and the ratios' medians and ranges. With --compile, all networks are
compiled.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from latentflow.config import FlowConfig, FramingConfig, LoopConfig
from latentflow.data import LatentTable, crop, find_source
from latentflow.models import Condition, DiT
from latentflow.training import fit
from latentflow.training.loop.distributed import compute_dtype
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

BATCH, CHANNELS, SIDE, CLASSES = 64, 16, 8, 10
WIDTH, DEPTH, HEADS = 256, 8, 4
WARM_UP = 3  # steps of each turn that are not timed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_network() -> DiT:
    """With the same weights each time."""
    torch.manual_seed(0)
    return DiT(
        in_channels=CHANNELS, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=CLASSES, sample_size=SIDE
    )


def bare_ours(compiled: bool) -> tuple[torch.nn.Module, Call]:
    model = our_network().to(DEVICE)
    if compiled:
        model.compile()
    return model, lambda x, t, labels: model(x, t, Condition(class_labels=labels))


def bare_diffusers(compiled: bool) -> tuple[torch.nn.Module, Call]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=DEPTH, sample_size=SIDE, patch_size=1, num_embeds_ada_norm=CLASSES,
    ).to(DEVICE)  # fmt: skip
    if compiled:
        model.compile()
    return model, lambda x, t, labels: model(x, timestep=1000 * t, class_labels=labels).sample


def bare(
    make: Callable[[bool], tuple[torch.nn.Module, Call]], latents: Tensor, steps: int, compiled: bool
) -> float:
    """Images per second of a bare loop."""
    model, call = make(compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = compute_dtype("auto", DEVICE)
    start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            wait()
            start = time.perf_counter()
        x1 = latents[torch.randint(len(latents), (BATCH,))].to(DEVICE)
        labels = torch.randint(CLASSES, (BATCH,)).to(DEVICE)
        x0, t = torch.randn_like(x1), torch.sigmoid(torch.randn(BATCH, device=DEVICE))
        xt = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            output = call(xt, t, labels)
        loss = (output.float() - (x1 - x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait()
    return steps * BATCH / (time.perf_counter() - start)


class Timed(LatentData):
    """Notes when each batch is asked for."""

    times: list[float]

    def __getitems__(self, draws: list) -> dict:
        wait()
        self.times.append(time.perf_counter())
        return super().__getitems__(draws)


def ours(latents: Tensor, steps: int, compiled: bool) -> float:
    """Images per second of `fit`, from asking for batch WARM_UP to asking for the last."""
    source = find_source("shapes", condition="class")
    source = source.subset((list(range(len(source))) * (len(latents) // len(source) + 1))[: len(latents)])
    labels = {"class_labels": torch.arange(len(latents)) % CLASSES}
    table = LatentTable(latents[:, None], None)
    data = Timed(crop(source, 64, 8, FramingConfig()), [BucketData(table)], labels, flips=False)
    data.times = []
    config = LoopConfig(
        max_train_steps=WARM_UP + steps + 1,
        train_batch_size=BATCH,
        validation_steps=0,
        preview_steps=0,
        checkpointing_steps=10**9,
    )
    network = our_network()
    if compiled:
        network.compile()
    with tempfile.TemporaryDirectory() as folder:
        fit({"flow": FlowLoss(network, FlowConfig(), seed=0)}, data, config, Path(folder))
    return steps * BATCH / (data.times[WARM_UP + steps] - data.times[WARM_UP])


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    latents = torch.randn(2048, CHANNELS, SIDE, SIDE)
    runs: dict[str, Callable[[], float]] = {
        "fit": lambda: ours(latents, options.steps, options.compile),
        "bare loop, our DiT": lambda: bare(bare_ours, latents, options.steps, options.compile),
        "bare loop, diffusers' DiT": lambda: bare(bare_diffusers, latents, options.steps, options.compile),
    }
    ratios: dict[str, list[float]] = {name: [] for name in runs if name != "fit"}
    for turn in range(options.rounds):
        order = list(runs) if turn % 2 == 0 else list(reversed(runs))  # none always has the warmer machine
        speeds = {name: runs[name]() for name in order}
        print(
            f"round {turn + 1}: " + ", ".join(f"{name} {speeds[name]:.1f} img/s" for name in runs), flush=True
        )
        for name, values in ratios.items():
            values.append(speeds["fit"] / speeds[name])
    for name, values in ratios.items():
        values.sort()
        print(
            f"fit / {name}: median {values[len(values) // 2]:.3f}, range {values[0]:.3f} to {values[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
