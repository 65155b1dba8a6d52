"""Speed of the training loop against a bare PyTorch loop over the same network and latents, turn by turn.

    python benchmarks/training_speed.py [--rounds 5] [--steps 12] [--threads 2]

Both train a DiT of width 256 and depth 8 on 64 latent tokens, batch 64, bfloat16 autocast, fused AdamW. The bare loop
has nothing else: no gradient clipping, no weight average, no checks, no reports, one call of randn per batch. Ours is
`latentflow.training.fit` with its defaults. Prints one line a round and the ratio's median and range.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from latentflow.data import LatentTable
from latentflow.data.shapes import train_source
from latentflow.models import DiT
from latentflow.training import LoopConfig, fit
from latentflow.training.flow import FlowConfig, FlowStage
from latentflow.training.latent_data import LatentData

BATCH, CHANNELS, SIDE = 64, 16, 8
WARM_UP = 3  # steps of each turn that are not timed


def network() -> DiT:
    """The network of both loops, with the same weights."""
    torch.manual_seed(0)
    return DiT(in_channels=CHANNELS, width=256, depth=8, heads=4, sample_size=SIDE)


def bare(latents: torch.Tensor, steps: int) -> float:
    """Images per second of the bare loop."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    start = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        x1 = latents[torch.randint(len(latents), (BATCH,))]
        x0, t = torch.randn_like(x1), torch.sigmoid(torch.randn(BATCH))
        xt = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(xt, t).float() - (x1 - x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return steps * BATCH / (time.perf_counter() - start)


class Timed(LatentData):
    """Notes when each batch is asked for."""

    def __getitems__(self, draws: list) -> dict:
        self.times.append(time.perf_counter())
        return super().__getitems__(draws)


def ours(latents: torch.Tensor, steps: int) -> float:
    """Images per second of `fit`, from asking for batch WARM_UP to asking for the last."""
    source = train_source()
    rows = (list(range(len(source))) * (len(latents) // len(source) + 1))[: len(latents)]
    data = Timed(source.subset(rows), LatentTable(latents[:, None], None), {})
    data.times = []
    config = LoopConfig(
        max_train_steps=WARM_UP + steps + 1,
        train_batch_size=BATCH,
        validation_steps=0,
        preview_steps=0,
        checkpointing_steps=10**9,
    )
    stage = FlowStage(network(), FlowConfig(), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        fit({"flow": stage}, data, config, Path(folder))
    return steps * BATCH / (data.times[WARM_UP + steps] - data.times[WARM_UP])


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    latents = torch.randn(2048, CHANNELS, SIDE, SIDE)
    ratios = []
    for turn in range(arguments.rounds):
        first, second = (
            (bare, ours) if turn % 2 == 0 else (ours, bare)
        )  # neither always has the warmer machine
        speeds = {one.__name__: one(latents, arguments.steps) for one in (first, second)}
        ratios.append(speeds["ours"] / speeds["bare"])
        both = f"bare {speeds['bare']:.1f} img/s, ours {speeds['ours']:.1f} img/s"
        print(f"round {turn + 1}: {both}, ratio {ratios[-1]:.3f}", flush=True)
    ratios.sort()
    print(f"ratio: median {ratios[len(ratios) // 2]:.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
