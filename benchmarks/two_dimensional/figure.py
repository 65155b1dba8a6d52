"""The figure everybody knows: source, trajectories, target, and the vector field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentflow.flow import euler_maruyama, integrate, time_grid
from latentflow.utils.libraries import missing

from .cells import Cells, seeded
from .distributions import TASKS
from .methods import BRIDGE, METHODS

FIGURE_TASK = "moons-8gaussians"
FIGURE_METHODS = ("i-cfm", "ot-cfm", "2-rf", "sf2m")
_FIELD_TIMES = (0.0, 0.5, 0.9)
_LIMIT = 7.5


def draw(cells: Cells, methods: list[str], file: Path) -> None:
    """One row per method: its trajectories, what it makes of the source, its field at a few times."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise missing("the figure needs", "matplotlib") from error
    columns = 2 + len(_FIELD_TIMES)
    figure, axes = plt.subplots(
        len(methods),
        columns,
        figsize=(2.2 * columns, 2.25 * len(methods)),
        squeeze=False,
        layout="constrained",
        dpi=110,
    )
    points, seeds = 500, cells.scale.seeds
    generator = seeded("figure")
    source = TASKS[FIGURE_TASK].source(seeds * points, generator)
    target = TASKS[FIGURE_TASK].target(4 * points, generator)
    for row, name in zip(axes, methods, strict=True):
        networks = cells.networks(FIGURE_TASK, name)
        path = _trajectories(networks, source, generator)[:, :points]  # those of the first seed
        row[0].set_ylabel(METHODS[name].title)
        _draw_trajectories(row[0], path)
        row[1].scatter(*target.T, s=1, color="silver", linewidths=0)
        row[1].scatter(*path[-1].T, s=2, color="blue", linewidths=0)
        for axis, t in zip(row[2:], _FIELD_TIMES, strict=True):
            _draw_field(axis, networks["velocity"], seeds, t)
            axis.scatter(*path[round(t * (len(path) - 1))].T, s=1, color="black", linewidths=0)
    titles = [
        "source, trajectories, end",
        "end (blue), target (grey)",
        *(f"field at t = {t:g}" for t in _FIELD_TIMES),
    ]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xlim=(-_LIMIT, _LIMIT), ylim=(-_LIMIT, _LIMIT), aspect="equal", xticks=[], yticks=[])
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels.quantize(64, dither=Image.Dither.NONE).save(
        file, optimize=True
    )  # few colours: a third of the size
    plt.close(figure)


def _trajectories(networks: torch.nn.ModuleDict, source: Tensor, generator: torch.Generator) -> Tensor:
    """(101, B, 2): by the SDE where there is a score."""
    states = [source]
    score = dict(networks.items()).get("score")
    solver = euler_maruyama(diffusion="constant", scale=BRIDGE.sigma) if score is not None else "euler"
    integrate(
        networks["velocity"],
        source,
        time_grid(100),
        solver,
        score=score,
        generator=generator,
        callback=lambda index, t, x: states.append(x),
    )
    return torch.stack(states)


def _draw_trajectories(axis: Any, path: Tensor) -> None:
    from matplotlib.collections import LineCollection

    axis.add_collection(
        LineCollection(path.transpose(0, 1).numpy(), colors="olive", linewidths=0.4, alpha=0.4)
    )
    axis.scatter(*path[0].T, s=3, color="black", linewidths=0, zorder=3)
    axis.scatter(*path[-1].T, s=3, color="blue", linewidths=0, zorder=3)


def _draw_field(axis: Any, velocity: torch.nn.Module, seeds: int, t: float) -> None:
    """Arrows of one length that point where the first seed's velocity does; their colour is the speed."""
    line = torch.linspace(-_LIMIT + 0.5, _LIMIT - 0.5, 17)
    grid = torch.cartesian_prod(line, line)
    arrows = velocity(grid.repeat(seeds, 1), torch.tensor(t))[: len(grid)]
    speed = arrows.norm(dim=1, keepdim=True)
    style = {
        "cmap": "viridis_r",
        "clim": (0, 12),
        "angles": "xy",
        "scale": 24,
        "width": 0.006,
        "pivot": "mid",
    }
    axis.quiver(*grid.T, *(arrows / speed).T, speed.flatten(), **style)
