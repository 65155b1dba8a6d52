"""Flow matching between 2-D distributions: trains, scores and draws the methods of Tong et al., beside their figures.

    python benchmarks/transport_2d.py --quick                     minutes: does it run, is the order right
    python benchmarks/transport_2d.py                             the paper's protocol, more than an hour
    python benchmarks/transport_2d.py --table docs/measurements/transport-2d.md \\
        --figure docs/measurements/transport-2d.png

A line that is run again goes on where it was stopped: finished cells lie in --output and are not run again.

The protocol of arXiv:2307.03672, table 2: three hidden layers of 64 SELU units, AdamW (1e-3, weight decay 1e-5), batch
512, 19,000 steps, 5 seeds, 100 Euler steps from 10,000 test points, Schrodinger bridges with sigma = 1. What differs:
a seed's minibatches are a pool of --batches fresh ones, paired once and visited again and again in new orders, with
fresh t and noise each time (the paper visits 10,000 fixed points again and again); W2 is exact, but of --w2-points
points, and so has a floor, which the table states.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from two_dimensional import peer
from two_dimensional.cells import Cells, Scale
from two_dimensional.distributions import TASKS
from two_dimensional.figure import FIGURE_METHODS, FIGURE_TASK, draw
from two_dimensional.methods import METHODS
from two_dimensional.report import report

from latentflow.cli import parse, run
from latentflow.errors import UserError
from latentflow.utils.flags import flag_of

FULL = Scale(seeds=5, steps=19_000, batches=300, points=10_000, w2_points=2500)
QUICK = Scale(seeds=2, steps=500, batches=30, points=2000, w2_points=800)

TaskName = Literal[
    "normal-8gaussians", "moons-8gaussians", "normal-moons", "normal-scurve", "8gaussians-moons"
]
MethodName = Literal["ot-cfm", "torchcfm", "i-cfm", "fm", "sf2m", "2-rf", "sb-cfm"]


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """What to run, and where the results go."""

    tasks: tuple[TaskName, ...] = tuple(TASKS)  # type: ignore[assignment]
    """Which transports."""

    methods: tuple[MethodName, ...] = tuple(METHODS)  # type: ignore[assignment]
    """Which methods; torchcfm is left out where it is not installed."""

    quick: bool = False
    """Minutes instead of hours: fewer steps, seeds and points. Its numbers are not the paper's."""

    seeds: int | None = None
    """Replicates, trained side by side. Default: 5, with --quick 2."""

    steps: int | None = None
    """Training steps. Default: 19,000, with --quick 500."""

    batches: int | None = None
    """Minibatches of 512 that are paired for each seed. Default: 300, with --quick 30."""

    w2_points: int | None = None
    """Points that the exact W2 takes, of each side. Default: 2,500, with --quick 800."""

    threads: int = 1
    """Threads of PyTorch. The tensors are small: more than 2 do not help."""

    output: Path = Path("runs/transport-2d")
    """Folder of the results: one JSON and one safetensors file for each cell."""

    table: Path | None = None
    """Where the table goes. Default: table.md in --output."""

    figure: Path | None = None
    """Where the figure goes. Default: figure.png in --output."""

    def scale(self) -> Scale:
        """The scale of the run."""
        given = {name: getattr(self, name) for name in ("seeds", "steps", "batches", "w2_points")}
        scale = dataclasses.replace(
            QUICK if self.quick else FULL,
            **{name: value for name, value in given.items() if value is not None},
        )
        for name, value in dataclasses.asdict(scale).items():
            if value < (2 if name == "seeds" else 1):
                raise UserError(f"{flag_of(name)} {value}", "Use at least 1, and 2 seeds for a spread.")
        return dataclasses.replace(scale, points=max(scale.points, scale.w2_points))


def order(config: TransportConfig) -> Iterator[tuple[str, str]]:
    """(task, method) of all cells: what is held against torchcfm first, then task by task."""
    chosen = [
        (task, name)
        for task in config.tasks
        for name in config.methods
        if task in METHODS[name].tasks and (name != "torchcfm" or peer.installed())
    ]
    compared = [
        cell for cell in chosen if cell[1] in ("ot-cfm", "torchcfm") and cell[0] in METHODS["torchcfm"].tasks
    ]
    yield from compared
    yield from (cell for cell in chosen if cell not in compared)


def progress(what: str, total: int) -> Callable[[], object]:
    """A bar on stderr."""
    return tqdm(total=total, desc=what, mininterval=10, leave=False).update


def claim(folder: Path, scale: Scale) -> None:
    """The folder holds cells of one scale only."""
    folder.mkdir(parents=True, exist_ok=True)
    file, values = folder / "scale.json", dataclasses.asdict(scale)
    if file.is_file() and (found := json.loads(file.read_text())) != values:
        raise UserError(
            f"{folder} holds results of another scale: {found}, not {values}", "Give another --output."
        )
    file.write_text(json.dumps(values) + "\n")


def step_times(config: TransportConfig) -> dict[str, dict[str, list[float]]]:
    """Seconds per training step, ours and torchcfm's, on the tasks that both are compared on."""
    file = config.output / "step-times.json"
    if not file.is_file() and peer.installed() and "torchcfm" in config.methods:
        tasks = [task for task in config.tasks if task in METHODS["torchcfm"].tasks]
        times = {
            task: peer.step_times(TASKS[task], batch=512, steps=10 if config.quick else 50) for task in tasks
        }
        file.write_text(json.dumps(times) + "\n")
    return json.loads(file.read_text()) if file.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    """Run what is not finished, then write the table and the figure."""
    config = parse(TransportConfig, argv, prog="python benchmarks/transport_2d.py", description=__doc__ or "")
    scale = config.scale()
    torch.set_num_threads(config.threads)
    claim(config.output, scale)
    cells = Cells(config.output, scale, progress)
    times = step_times(config)
    chosen = list(order(config))
    for task, method in tqdm(chosen, desc="cells"):
        cells.run(task, method)
        seconds = cells.result(task, method)["seconds"]  # type: ignore[index]
        tqdm.write(
            f"{task}, {method}: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        )
        text = report(cells, chosen, times)  # after each cell: a run that is stopped leaves what it has
        (config.table or config.output / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if FIGURE_TASK in config.tasks and (names := [name for name in FIGURE_METHODS if name in config.methods]):
        draw(cells, names, config.figure or config.output / "figure.png")


if __name__ == "__main__":
    run(main)
