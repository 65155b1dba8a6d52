"""The table and the curves of `recipe.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
COLUMNS = (
    "recipe", "steps", "ms a step", "validation loss", "against default", "as good as vanilla after", "right, %",
    "Fréchet",
)  # fmt: skip
DRAWN = ("vanilla", "vanilla, network of diffusers", "vanilla, learning rate 4e-3", "default")


def write_table(results: Path, file: Path, names: Sequence[str]) -> None:
    """Write FILE.md and FILE.png of what is in the folder ``results``, in the order of ``names``."""
    runs = {
        name: [json.loads(one.read_text()) for one in sorted(results.glob(f"{name}-[0-9]*.json"))]
        for name in names
    }
    runs = {name: one for name, one in runs.items() if one}
    file.with_suffix(".md").write_text("\n".join(rows(runs)) + "\n")
    curves(runs, file.with_suffix(".png"))


def rows(runs: dict[str, list[Result]]) -> list[str]:
    """Markdown. Means over seeds, and half the range between them after the sign."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, seeds in runs.items():
        losses = [final(one) for one in seeds]
        against = [100 * change for change in changes(seeds, runs.get("default", []))]
        shares = [100 * one["samples"]["right"] for one in seeds if "right" in one["samples"]]
        cells = [
            name,
            f"{seeds[0]['steps']}",
            f"{1000 * seeds[0]['step_seconds']:.0f}",
            spread(losses, 4),
            "" if name == "default" else f"{spread(against, 2, sign=True)} %",
            spread(reached(seeds, runs.get("vanilla", [])), 2),
            spread(shares, 0),
            spread([one["samples"]["frechet"] for one in seeds], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def final(run: Result) -> float:
    """The validation loss at the end of the budget."""
    return float(run["curve"][-1]["loss"])


def changes(runs: Sequence[Result], reference: Sequence[Result]) -> list[float]:
    """The relative difference of the final losses, seed by seed."""
    by_seed = {one["seed"]: final(one) for one in reference}
    return [final(one) / by_seed[one["seed"]] - 1 for one in runs if one["seed"] in by_seed]


def reached(runs: Sequence[Result], vanilla: Sequence[Result]) -> list[float]:
    """The share of the budget after which a run is as good as vanilla is at its end, seed by seed."""
    targets = {one["seed"]: final(one) for one in vanilla}
    shares = []
    for run in runs:
        before = None
        for point in run["curve"]:
            target = targets.get(run["seed"], -1.0)
            if point["loss"] <= target:
                seconds = point["seconds"]
                if before is not None:
                    along = (before["loss"] - target) / (before["loss"] - point["loss"])
                    seconds = before["seconds"] + along * (point["seconds"] - before["seconds"])
                shares.append(seconds / run["curve"][-1]["seconds"])
                break
            before = point
    return shares


def spread(values: Sequence[float], digits: int, sign: bool = False) -> str:
    if not values:
        return "-"
    half = (max(values) - min(values)) / 2
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {half:.{digits}f}"


def curves(runs: dict[str, list[Result]], file: Path) -> None:
    """Validation loss against seconds and against images seen, a line for each seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, key, label in zip(axes, ("seconds", "images"), ("seconds", "images seen"), strict=True):
        for number, name in enumerate(one for one in DRAWN if one in runs):
            for run in runs[name]:
                points = run["curve"]
                axis.plot(
                    [one[key] for one in points], [one["loss"] for one in points], color=f"C{number}",
                    label=name if run is runs[name][0] else None,
                )  # fmt: skip
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
