"""Curves of a run as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from ...utils.html_page import Section
from .folder import Run

_MOST_POINTS = 1000  # of a curve; more cannot be seen


def add_curves(page: Section, run: Run) -> None:
    """Add a figure with a panel for each quantity that was logged.

    Raises:
        UserError: matplotlib is missing.
    """
    names = list(dict.fromkeys(name for row in run.rows for name in row if name not in ("step", "time")))
    if not names:
        page.text("No figures were logged yet.")
        return
    # `val_x` shares a panel with `x`; the loss comes first.
    panels = sorted(
        dict.fromkeys(name.removeprefix("val_") for name in names), key=lambda name: name != "loss"
    )
    figure = _new_figure(len(panels))
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number + 1)
        for name, color in ((panel, "tab:blue"), (f"val_{panel}", "tab:orange")):
            steps, values = run.curve(name)
            if values:
                _draw(axes, steps, values, name, color)
        axes.set_title(_TITLES.get(panel, panel), loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        if number >= len(panels) - 2:
            axes.set_xlabel("step", fontsize=9)
        if panel == "loss":
            axes.legend(frameon=False, fontsize=9)
    page.figure(figure, "Blue: training; orange: held-out images, always with the same noises and times.")


_TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "images_per_second": "images per second",
    "model_flops_utilisation": "model FLOPs utilisation; 1: as fast as a matrix product",
    "memory_gib": "peak memory, GiB",
    "psnr": "PSNR, dB",
    "ssim": "SSIM, 1: equal",
    "l1": "mean absolute error, values in -1 to 1",
    "kl": "KL divergence, nats per value",
    "lpips": "LPIPS",
}


def _new_figure(panels: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "`latentflow report` needs the package matplotlib for its curves",
            'pip install "latentflow[report]"',
        ) from error
    return Figure(figsize=(9.5, 2.2 * -(-panels // 2) + 0.4), layout="constrained")


def _draw(axes: Any, steps: Sequence[int], values: Sequence[float], name: str, color: str) -> None:
    x, y = thinned(steps, values)
    if name == "loss" and len(y) > 20:  # noisy, so its moving mean is drawn on top
        axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(x, _smooth(y, len(y) // 20), color=color, label=name)
    else:
        axes.plot(
            x, y, color=color, label=name, marker="o" if len(y) < 20 else "", markersize=3, linewidth=1.2
        )


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 1000 points of a curve, each the mean of equally many neighbours."""
    stride = -(-len(steps) // _MOST_POINTS)
    edges = np.arange(0, len(steps), stride)
    counts = np.diff(edges, append=len(steps))
    x, y = (np.add.reduceat(np.asarray(points, float), edges) / counts for points in (steps, values))
    return x, y


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the moving mean over ``reach`` neighbours on either side, of fewer at the ends."""
    window = np.ones(2 * reach + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
