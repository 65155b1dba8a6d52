"""One cell of the table: a method trained and measured on a task. Finished cells are files, and are not run again."""

from __future__ import annotations

import functools
import json
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentflow.flow import euler_maruyama, integrate, time_grid

from . import peer
from .distributions import TASKS
from .methods import BRIDGE, METHODS, PAIRINGS, build, draw_pool, pair, rectify
from .metrics import euler, mode_metrics, normalized_path_energy, wasserstein2_squared
from .network import Ensemble, Pool, train

#: A progress bar for (what, how many): returns what to call once for each.
Progress = Callable[[str, int], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run: replicates (seeds), training steps, minibatches paired for each replicate, test points, and
    how many of those the exact W2 takes."""

    seeds: int
    steps: int
    batches: int
    batch: int = 512
    points: int
    w2_points: int


def seeded(*words: object) -> torch.Generator:
    """A generator of its own for each purpose, whatever ran before."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, words)).encode()))


class Cells:
    """The cells in ``folder``, all of one scale."""

    def __init__(self, folder: Path, scale: Scale, progress: Progress) -> None:
        self.folder, self.scale, self.progress = folder, scale, progress
        self.pool = functools.cache(self._pool)

    def file(self, task: str, method: str, suffix: str = ".json") -> Path:
        return self.folder / f"{task}--{method}{suffix}"

    def result(self, task: str, method: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        file = self.file(task, method)
        return json.loads(file.read_text()) if file.is_file() else None

    def networks(self, task: str, method: str) -> nn.ModuleDict:
        """The trained networks; trains them if they are not there."""
        self.run(task, method)
        networks = build(METHODS[method], self.scale.seeds, torch.Generator())
        networks.load_state_dict(load_file(self.file(task, method, ".safetensors")))
        return networks.requires_grad_(False)

    def run(self, task: str, method: str) -> None:
        """Train and measure, unless that is done."""
        if self.result(task, method) is not None:
            return
        start = time.perf_counter()
        pool = self.pool(task, METHODS[method].pairs)
        paired = time.perf_counter()
        networks = self._train(task, method, pool)
        trained = time.perf_counter()
        measures = self._measure(task, networks)
        seconds = {
            "pairing": paired - start,
            "training": trained - paired,
            "measuring": time.perf_counter() - trained,
        }
        save_file(networks.state_dict(), self.file(task, method, ".safetensors"))
        self._write(self.file(task, method), {"measures": measures, "seconds": seconds})

    def reference(self, task: str) -> dict[str, list[float]]:
        """W2^2 between source and target, and what two samples of the target are apart: one value per replicate."""
        file = self.folder / f"{task}--reference.json"
        if not file.is_file():
            tick = self.progress(f"{task}: W2 of source and target", self.scale.seeds)
            generator = seeded(task, "reference")
            values: dict[str, list[float]] = {"w2_squared": [], "floor": [], "within_modes_floor": []}
            for _ in range(self.scale.seeds):
                source, target = self._draw(task, 2 * self.scale.w2_points, generator)
                values["w2_squared"].append(wasserstein2_squared(source, target))
                one, other = target.chunk(2)
                values["floor"].append(wasserstein2_squared(one, other) ** 0.5)
                if task.endswith("-8gaussians"):
                    values["within_modes_floor"].append(mode_metrics(one, other)[0])
                tick()
            self._write(file, values)
        return json.loads(file.read_text())  # type: ignore[no-any-return]

    def _draw(self, task: str, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return TASKS[task].source(points, generator), TASKS[task].target(points, generator)

    def _pool(self, task: str, pairs: str) -> Pool:
        shape = (self.scale.seeds, self.scale.batches, self.scale.batch)
        pool = draw_pool(TASKS[task], shape, seeded(task, "pool"))
        if pairs == "rectified":
            velocity = self.networks(task, "i-cfm")["velocity"]
            return rectify(pool, velocity, self.progress(f"{task}: pairs of the first flow", shape[1]))
        tick = self.progress(f"{task}: pairs, {pairs}", shape[0] * shape[1])
        if pairs == "torchcfm":
            peer.seed_everything(zlib.crc32(task.encode()))
            return peer.pair(pool, tick)
        return pair(pool, PAIRINGS[pairs](), seeded(task, pairs), tick)

    def _train(self, task: str, method: str, pool: Pool) -> nn.ModuleDict:
        networks = build(METHODS[method], self.scale.seeds, seeded(task, "initial weights"))
        loss = peer.loss if method == "torchcfm" else METHODS[method].loss
        tick = self.progress(f"{task}: {METHODS[method].title}", self.scale.steps)
        train(networks, loss, pool, self.scale.steps, seeded(task, "training"), tick)
        return networks.requires_grad_(False)

    def _measure(self, task: str, networks: nn.ModuleDict) -> dict[str, list[float]]:
        """One value per replicate. All methods start from the same points and are held against the same target."""
        scale, generator = self.scale, seeded(task, "test")
        x0, x1 = self._draw(task, scale.seeds * scale.points, generator)
        velocity: Ensemble = networks["velocity"]
        reference = statistics.fmean(self.reference(task)["w2_squared"])
        ends, energy = euler(velocity, x0, steps=100)
        few, _ = euler(velocity, x0, steps=4)
        energies = energy.view(scale.seeds, -1).mean(1).tolist()
        measures: dict[str, list[float]] = {
            "npe": [normalized_path_energy(value, reference) for value in energies],
            "energy": energies,
            "w2": self._w2(ends, x1),
            "w2_4": self._w2(few, x1),
        }
        if task.endswith("-8gaussians"):
            split = [mode_metrics(a, b) for a, b in zip(*map(self._split, (ends, x1)), strict=True)]
            measures["within_modes"], measures["wrong_mode"] = map(list, zip(*split, strict=True))
        if "score" in networks:
            solver = euler_maruyama(diffusion="constant", scale=BRIDGE.sigma)
            noisy = integrate(
                velocity, x0, time_grid(100), solver, score=networks["score"], generator=generator
            )
            measures["w2_sde"] = self._w2(noisy, x1)
        return measures

    def _split(self, x: Tensor) -> Tensor:
        """The points of each replicate that W2 takes: (seeds, w2_points, 2)."""
        return x.view(self.scale.seeds, -1, 2)[:, : self.scale.w2_points]

    def _w2(self, x: Tensor, y: Tensor) -> list[float]:
        return [
            wasserstein2_squared(a, b) ** 0.5 for a, b in zip(self._split(x), self._split(y), strict=True)
        ]

    def _write(self, file: Path, values: dict[str, Any]) -> None:
        """Whole or not at all: what is there counts as finished."""
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(values, indent=1) + "\n")
        draft.rename(file)
