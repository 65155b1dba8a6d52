"""What a checkpoint costs the training loop, in the loop's own time, beside saving at once as before.

    python benchmarks/saving.py [--steps 60] [--every 20] [--rounds 3]

Trains a DiT of width 256 and depth 8 (batch 64, 64 tokens, float32 on a CPU) turn by turn without saving, with saving
beside training, and with saving while the loop waits. Prints seconds per step, and what one save costs: the added time
over the saves made. From it follows the share at any cadence: cost / (steps between saves * seconds per step).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from training_speed import BATCH, CHANNELS, SIDE, network

from latentflow.training import LoopConfig, fit, saving
from latentflow.training.flow import FlowConfig, FlowStage
from latentflow.training.order import Draw


class Latents:
    """Random latents that note when each batch is asked for."""

    def __init__(self) -> None:
        self.table, self.times = torch.randn(2048, CHANNELS, SIDE, SIDE), []

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, draws: list[Draw]) -> dict:
        self.times.append(time.perf_counter())
        return {"latents": self.table[[draw.index for draw in draws]]}

    def name(self, index: int) -> str:
        return str(index)


def seconds_per_step(warm_up: int, steps: int, every: int) -> float:
    """Mean over ``steps`` steps after the first ``warm_up``, saving every ``every``."""
    data = Latents()
    config = LoopConfig(
        max_train_steps=warm_up + steps + 2,
        train_batch_size=BATCH,
        validation_steps=0,
        preview_steps=0,
        checkpointing_steps=every,
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        fit({"flow": FlowStage(network(), FlowConfig(), seed=0)}, data, config, Path(folder))
    return (data.times[warm_up + steps + 1] - data.times[warm_up + 1]) / steps


class Waiting(saving.Saver):
    """Saves while the loop waits."""

    def save(self, step: int, state: dict) -> None:
        super().save(step, state)
        self.wait()


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from latentflow.training import loop

    savers = {"none": saving.Saver, "beside": saving.Saver, "waiting": Waiting}
    found: dict[str, list[float]] = {name: [] for name in savers}
    for turn in range(arguments.rounds):
        for name in sorted(found, reverse=bool(turn % 2)):  # none always has the warmer machine
            loop.Saver = savers[name]
            every = 10**9 if name == "none" else arguments.every
            found[name].append(seconds_per_step(arguments.every, arguments.steps, every))
            print(f"round {turn + 1}: saving {name}, {found[name][-1]:.3f} s a step", flush=True)
    plain = median(found["none"])
    size = sum(one.numel() for one in network().parameters()) * 16 / 2**20  # weights, average, two moments
    print(f"a checkpoint has {size:.0f} MiB, a step without saving takes {plain:.3f} s")
    for name in ("beside", "waiting"):
        cost = (median(found[name]) - plain) * arguments.every
        print(
            f"saving {name}: {cost:.2f} s a save; every 1000 steps that is {cost / (plain * 1000):.2%} of the run"
        )


if __name__ == "__main__":
    main()
