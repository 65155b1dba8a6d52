"""Speed of the training loop against other loops, step by step in turns.

    python benchmarks/training_speed.py [--steps 40] [--threads 2] [--precision bf16] [--sit FOLDER] [--compile]

All train a transformer of width 256 and depth 8 with 10 classes on 64 latent tokens, batch 64, with AdamW. Ours is
`latentflow.training.fit` over our DiT with its defaults: gradient clipping, weight average, checks, reports, noise that
depends on the sample alone. The others:

- bare: a loop over our DiT with none of these, in fused AdamW;
- diffusers: the same loop over diffusers' `DiTTransformer2DModel` of the same width, depth and heads;
- sit (with --sit, a clone of https://github.com/willisma/SiT; it needs timm and torchdiffeq): the step of its
  `train.py` with its `models.py` and `transport`, weight average included, under autocast for bf16.

With --block plain our network is SiT's, layer by layer. Every step of `fit` is followed by one of each other loop, in
one process, so that all have the same machine. Prints the medians of a step's CPU and wall time, and of the ratios of
neighbouring steps, with their quartiles. With --profile, `fit` writes the profile of six steps instead.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from latentflow.config import FlowConfig, FramingConfig, LoopConfig
from latentflow.data import LatentTable, crop, find_source
from latentflow.models import Condition, DiT
from latentflow.models.dit import BLOCKS
from latentflow.training import fit
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

CHANNELS, SIDE, CLASSES = 16, 8, 10
WIDTH, DEPTH, HEADS = 256, 8, 4
WARM_UP = 5  # steps that are not timed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_network(block: str) -> DiT:
    """With the same weights each time."""
    torch.manual_seed(0)
    return DiT(
        in_channels=CHANNELS, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=CLASSES, sample_size=SIDE,
        **BLOCKS[block],
    ).to(DEVICE)  # fmt: skip


def diffusers_network() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=DEPTH, sample_size=SIDE, patch_size=1, num_embeds_ada_norm=CLASSES,
    ).to(DEVICE)  # fmt: skip


def autocast(options: argparse.Namespace) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=options.precision == "bf16")


def bare(model: torch.nn.Module, call: Call, latents: Tensor, options: argparse.Namespace) -> Iterator[None]:
    """Take a step of a bare loop at every `next`."""
    if options.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        x1, labels = batch(latents, options)
        x0, t = torch.randn_like(x1), torch.sigmoid(torch.randn(len(x1), device=DEVICE))
        xt = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
        with autocast(options):
            output = call(xt, t, labels)
        loss = (output.float() - (x1 - x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def sit(latents: Tensor, options: argparse.Namespace) -> Iterator[None]:
    """Take a step of SiT's `train.py` at every `next`."""
    sys.path.insert(0, str(options.sit))
    models, transport = (
        importlib.import_module("models"),
        importlib.import_module("transport").create_transport(),
    )
    torch.manual_seed(0)
    model = models.SiT(
        input_size=SIDE, patch_size=1, in_channels=CHANNELS, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS,
        num_classes=CLASSES, learn_sigma=False,
    ).to(DEVICE)  # fmt: skip
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    if options.compile:
        model.compile()
    model.train()
    while True:
        x1, labels = batch(latents, options)
        with autocast(options):
            loss = transport.training_losses(model, x1, {"y": labels})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # `update_ema`
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        loss.item()
        yield


def batch(latents: Tensor, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(latents), (options.batch,))
    return latents[rows].to(DEVICE), torch.randint(CLASSES, (options.batch,)).to(DEVICE)


class Paired(LatentData):
    """Takes a step of every other loop whenever `fit` asks for a batch, once a step; notes the seconds of each."""

    others: dict[str, Iterator[None]]
    seconds: dict[str, list[tuple[float, float]]]  # CPU and wall
    left: tuple[float, float] | None = None

    def __getitems__(self, draws: list) -> dict:
        now = clock()
        if self.left is not None:
            self.seconds["fit"].append(passed(self.left, now))
        turn = len(self.seconds["fit"]) % 2
        for name in list(self.others)[:: 1 - 2 * turn]:  # none always comes after the same one
            start = clock()
            next(self.others[name])
            self.seconds[name].append(passed(start, clock()))
        self.left = clock()
        return super().__getitems__(draws)


def clock() -> tuple[float, float]:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def passed(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def run(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Return the CPU and wall seconds of every timed step, by loop."""
    latents = torch.randn(2048, CHANNELS, SIDE, SIDE)
    source = find_source("shapes", condition="class")
    source = source.subset((list(range(len(source))) * (len(latents) // len(source) + 1))[: len(latents)])
    conditions = {"class_labels": torch.arange(len(latents)) % CLASSES}
    table = LatentTable(latents[:, None], None)
    data = Paired(crop(source, 64, 8, FramingConfig()), [BucketData(table)], conditions, flips=False)
    network, theirs = our_network(options.block), diffusers_network()
    ours = our_network(options.block)
    data.others = {
        "bare": bare(ours, lambda x, t, y: ours(x, t, Condition(class_labels=y)), latents, options),
        "diffusers": bare(
            theirs, lambda x, t, y: theirs(x, timestep=1000 * t, class_labels=y).sample, latents, options
        ),
    }
    if options.sit is not None:
        data.others["sit"] = sit(latents, options)
    if options.only is not None or options.profile:
        data.others = {name: loop for name, loop in data.others.items() if name in (options.only or ())}
    data.seconds = {name: [] for name in ("fit", *data.others)}
    config = LoopConfig(
        max_train_steps=WARM_UP + options.steps + 1,
        train_batch_size=options.batch,
        mixed_precision=options.precision,
        validation_steps=0,
        preview_steps=0,
        checkpointing_steps=10**9,
        profile=options.profile,
    )
    if options.compile:
        network.compile()
    with tempfile.TemporaryDirectory() as folder:
        fit({"flow": FlowLoss(network, FlowConfig(), seed=0)}, data, config, Path(folder))
        if options.profile:
            print((Path(folder) / "profile" / "table.txt").read_text())
    return {name: values[WARM_UP:][: options.steps] for name, values in data.seconds.items()}


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Take the steps and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--block", choices=tuple(BLOCKS), default="modern")
    parser.add_argument("--sit", type=Path, help="a clone of SiT")
    parser.add_argument("--only", nargs="+", choices=("bare", "diffusers", "sit"), help="loops beside fit")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds = run(options)
    kinds = ("CPU", "wall")
    for name, values in seconds.items():
        middle = [1000 * statistics.median(value[kind] for value in values) for kind in range(2)]
        print(f"{name}: a step takes {middle[0]:.1f} ms of CPU time, {middle[1]:.1f} ms of wall time")
    for name in list(seconds)[1:]:
        pairs = list(zip(seconds["fit"], seconds[name], strict=False))
        ratios = {kind: [other[k] / own[k] for own, other in pairs] for k, kind in enumerate(kinds)}
        print(f"speed of fit / {name}: " + ", ".join(f"{kind} {quartiles(ratios[kind])}" for kind in kinds))


if __name__ == "__main__":
    main()
