"""What a checkpoint costs the training loop: the copy that it waits for, beside all of the save and a training step.

    OMP_NUM_THREADS=1 python benchmarks/saving.py

Saves the state of a transformer of width 256 and depth 8 (weights, average, AdamW's two moments) five times, and trains
three steps of 64 samples with 64 tokens. Times are CPU seconds, which other programs on the machine do not change, and
for the copy also the clock's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from latentflow.config import LoopConfig
from latentflow.training.loop.saving import Saver
from latentflow.training.loop.trained_module import TrainedModule


def main() -> None:
    """Print one line a save, one line a step, and what a save every 20 steps costs."""
    steps, copies, saves = [], [], []
    torch.set_num_threads(1)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
    module = TrainedModule("flow", network, LoopConfig(mixed_precision="no"), Accelerator(cpu=True))
    x = torch.randn(64, 64, 256)
    for step in range(1, 4):
        start = time.process_time()
        network(x).square().mean().backward()
        module.update(1e-3, skip=torch.tensor(False))
        module.update_averages(step)
        steps.append(time.process_time() - start)
        print(f"step {step}: {steps[-1]:.2f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), 2)
        for step in range(1, 6):
            clock, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
            saver.save(step, {"step": step} | module.state())
            copies.append(time.thread_time() - thread)
            waited = time.perf_counter() - clock
            saver.wait()
            saves.append(time.process_time() - process)
            print(
                f"save {step}: copy {copies[-1]:.3f} s (clock {waited:.3f} s), all of it {saves[-1]:.3f} s",
                flush=True,
            )
        saver.close()
    copy, whole = (statistics.median(times) / (20 * min(steps)) for times in (copies, saves))
    print(
        f"at a save every 20 steps: {copy:.2%} of the time, {whole:.2%} where the thread has no core of its own"
    )


if __name__ == "__main__":
    main()
