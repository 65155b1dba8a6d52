"""The table of a run, beside the paper's figures, and whether the run holds what it must."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable
from typing import Any

import torch

from . import peer
from .cells import Cells
from .distributions import TASKS
from .methods import METHODS, SIGMA

#: Tong et al. 2023 (arXiv:2307.03672), table 2: method -> task -> (W2, NPE).
_PAPER_TASKS = ("normal-8gaussians", "moons-8gaussians", "normal-moons", "normal-scurve")
PAPER: dict[str, dict[str, tuple[float | None, float | None]]] = {
    method: dict(zip(_PAPER_TASKS, zip(w2, npe, strict=True), strict=True))
    for method, w2, npe in (
        ("ot-cfm", (0.303, 0.601, 0.130, 0.144), (0.031, 0.015, 0.083, 0.027)),
        ("i-cfm", (0.373, 1.557, 0.178, 0.242), (0.202, 2.680, 0.891, 0.856)),
        ("fm", (0.343, None, 0.209, 0.198), (0.190, None, 0.762, 0.743)),
        ("sf2m", (0.275, 0.726, 0.124, 0.128), (0.016, 0.045, 0.053, 0.034)),
        ("2-rf", (0.421, 1.525, 0.283, 0.345), (0.044, 0.203, 0.130, 0.099)),
    )
}
PAPER["torchcfm"] = PAPER["ot-cfm"]

_MEASURES = {
    "npe": "Normalised path energy, |E ∫|v|² dt − W2²| / W2²",
    "w2": "W2 to the target, 100 Euler steps",
    "w2_4": "W2 to the target, 4 Euler steps",
    "w2_sde": "W2 to the target, 100 Euler-Maruyama steps of the SDE",
    "within_modes": "W2 within the modes of the 8 Gaussians, 100 Euler steps",
    "wrong_mode": "Share of the mass in wrong modes of the 8 Gaussians, 100 Euler steps",
}


def report(cells: Cells, chosen: Iterable[tuple[str, str]], times: dict[str, dict[str, list[float]]]) -> str:
    """Markdown of the finished ones among the ``chosen`` (task, method)."""
    done = {cell: found for cell in chosen if (found := cells.result(*cell)) is not None}
    tasks = [task for task in TASKS if any(cell[0] == task for cell in done)]
    floors = {task: cells.reference(task) for task in tasks}
    parts = [_heading(cells, floors)]
    for measure, title in _MEASURES.items():
        parts.append(_table(measure, title, done, tasks, floors, cells))
    parts += [_gates(done), _speed(times), _seconds(done)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(cells: Cells, floors: dict[str, dict[str, list[float]]]) -> str:
    scale = cells.scale
    distances = ", ".join(
        f"{TASKS[task].title} {_spread(values['w2_squared'], 2)}" for task, values in floors.items()
    )
    return f"""# Transport in two dimensions

Written by `benchmarks/transport_2d.py`: {scale.seeds} seeds, {scale.steps:,} steps of batch {scale.batch}, \
{scale.batches} minibatches paired for each seed and visited in turn with fresh t and noise; measured from \
{scale.points:,} test points, W2 exactly but between {scale.w2_points:,} points. Mean ± standard deviation over seeds; \
in brackets the figure of Tong et al. 2023 (arXiv:2307.03672, table 2), whose W2 takes another number of points. \
FM, I-CFM and OT-CFM have sigma = {SIGMA:g}, the bridges 1; the first flow of the 2-rectified flow is that of I-CFM. \
"Floor": two samples of the target, of the same number of points. On the 8 Gaussians that floor is mostly chance in \
the number of points per mode, so that W2 hardly tells good methods apart there: look at NPE, W2 within the modes, and \
W2 at 4 steps. PyTorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s).

W2² of source and target (for NPE; {2 * scale.w2_points:,} points, {scale.seeds} draws): {distances}."""


def _spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _table(
    measure: str,
    title: str,
    done: dict[tuple[str, str], dict[str, Any]],
    tasks: list[str],
    floors: dict[str, dict[str, list[float]]],
    cells: Cells,
) -> str:
    tasks = [
        task for task in tasks if any(c[0] == task and measure in v["measures"] for c, v in done.items())
    ]
    if not tasks:
        return ""
    lines = [
        f"## {title}",
        "",
        "| | " + " | ".join(TASKS[task].title for task in tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    for name, method in METHODS.items():
        row = [
            _cell(done[task, name]["measures"], measure, name, task) if (task, name) in done else "–"
            for task in tasks
        ]
        if any(text != "–" for text in row):
            lines.append(f"| {method.title} | " + " | ".join(row) + " |")
    kind = {"w2": "floor", "w2_4": "floor", "w2_sde": "floor", "within_modes": "within_modes_floor"}.get(
        measure
    )
    if kind:
        lines.append("| Floor | " + " | ".join(_spread(floors[task][kind]) for task in tasks) + " |")
    if measure == "wrong_mode":
        chance = f"about {0.93 / math.sqrt(cells.scale.w2_points):.3f}"
        lines.append("| Floor | " + " | ".join(chance for _ in tasks) + " |")
    return "\n".join(lines)


def _cell(measures: dict[str, list[float]], measure: str, method: str, task: str) -> str:
    if measure not in measures:
        return "–"
    paper = PAPER.get(method, {}).get(task, (None, None))
    # The paper samples [SF]2M by its SDE.
    column = {"npe": 1, "w2_sde": 0, "w2": None if method == "sf2m" else 0}.get(measure)
    beside = None if column is None else paper[column]
    return _spread(measures[measure]) + ("" if beside is None else f" ({beside:.3f})")


def _gates(done: dict[tuple[str, str], dict[str, Any]]) -> str:
    """OT-CFM's NPE against the paper's and against torchcfm's."""
    lines = []
    for task in METHODS["torchcfm"].tasks:
        if (task, "ot-cfm") not in done:
            continue
        ours = done[task, "ot-cfm"]["measures"]["npe"]
        mean, std, paper = statistics.fmean(ours), statistics.stdev(ours), PAPER["ot-cfm"][task][1]
        assert paper is not None
        low, high = paper - 2 * std, paper + 2 * std
        verdict = "within" if low <= mean <= high else ("below" if mean < low else "ABOVE")
        line = (
            f"- {TASKS[task].title}: {mean:.3f}, {verdict} the paper's {paper:.3f} ± 2 · {std:.3f} (our std)"
        )
        if (task, "torchcfm") in done:
            theirs = done[task, "torchcfm"]["measures"]["npe"]
            spread = math.hypot(std, statistics.stdev(theirs))
            worse = mean - statistics.fmean(theirs)
            verdict = "not worse than" if worse <= spread else "WORSE than"
            line += f"; {verdict} torchcfm's {statistics.fmean(theirs):.3f} (spread {spread:.3f})"
        lines.append(line)
    return "## Normalised path energy of OT-CFM\n\n" + "\n".join(lines) if lines else ""


def _speed(times: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"- {TASKS[task].title}: {peer.describe(found)}" for task, found in times.items()]
    title = "## Time of an OT-CFM training step, batch 512, exact pairing included, one network"
    return f"{title}\n\n" + "\n".join(lines) if lines else ""


def _seconds(done: dict[tuple[str, str], dict[str, Any]]) -> str:
    parts = []
    for name, method in METHODS.items():
        found = [values["seconds"]["training"] for cell, values in done.items() if cell[1] == name]
        if found:
            parts.append(f"{method.title} {statistics.median(found):.0f}")
    return "Seconds of training, all seeds together, median over tasks: " + ", ".join(parts) + "."
