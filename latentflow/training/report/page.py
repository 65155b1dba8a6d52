"""The page of `latentflow report`: one run, or a run of two stages, from the files in its folder."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...config import (
    AdapterConfig,
    AutoencoderConfig,
    DataConfig,
    FineTuningConfig,
    FlowConfig,
    FramingConfig,
    LoopConfig,
    NetworkConfig,
    TextConfig,
)
from ...data.images import open_image, to_rgb
from ...errors import UserError
from ...utils.html_page import Page, Section
from ...utils.libraries import missing
from ...utils.progress import duration_text
from ..loop.checkpoint import list_checkpoints
from .folder import Run, data_lines, first_stage, preview_step, read_run
from .verdict import judge, measured_lines, trend

_MOST_IMAGES, _IMAGE_WIDTH = 12, 640
_LOG_LINES = 200
_MOST_POINTS = 1000  # of a curve; more cannot be seen
_LONG = 600  # seconds without a line after which a run has probably ended


def report_page(folder: str | Path) -> Page:
    """Build the page of a run: its state, curves, samples, settings, data, environment, and how to resume it.

    Args:
        folder: a run of `latentflow train` or `latentflow autoencoder`, finished or not.

    Raises:
        UserError: it is no run folder, or matplotlib is missing.
    """
    run = read_run(folder)
    page = Page(run.folder.resolve().name)
    _summary(page, run)
    page.heading("Curves")
    add_curves(page, run)
    if run.previews():
        page.heading("Samples")
        _samples(page, run)
    if not run.is_autoencoder and (run.folder / "autoencoder" / "metrics.jsonl").is_file():
        stage = first_stage(run)
        page.heading("The autoencoder, trained first")
        page.table([], _facts(stage))
        if verdict := judge(stage):
            page.text(f"Verdict: {verdict.remark}")
        add_curves(page, stage)
        _samples(page, stage)
    _data(page, run)
    _settings(page, run)
    _environment(page, run)
    _log(page, run)
    return page


def _generate_line(run: Run) -> str:
    """Return the line that generates an image with the result, as its model card has it."""
    card = run.result / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    lines = re.findall(r"^latentflow generate .+$", text, re.MULTILINE)
    opened = run.folder if run.result.name == "adapter" else run.result
    return lines[0] if lines else shlex.join(["latentflow", "generate", "--checkpoint", str(opened)])


def _summary(page: Page, run: Run) -> None:
    page.table([], _facts(run))
    if verdict := judge(run):
        page.text(f"Verdict: {verdict.text}")
        if verdict.command:
            page.code(verdict.command)
    for line in [*measured_lines(run, verdict), *_remarks(run)]:
        page.text(line)
    if run.finished and not run.is_autoencoder:
        page.text("Generate images:")
        page.code(_generate_line(run))
    if not (verdict and verdict.command):  # what to do next: one command
        page.text("Train for as many steps again:" if run.finished else "Resume:")
        page.code(run.resume())
    if run.processes > 1:
        page.text(
            f"The run used {run.processes} processes. Start as many again, or multiply --gradient-accumulation-steps "
            f"by {run.processes}, so that a step has as many samples as before."
        )


def _facts(run: Run) -> list[tuple[str, str]]:
    target = f" of {run.target}" if run.target else ""
    facts = [("state", f"{_state(run)}: step {run.step}{target}")]
    facts.append(("samples seen", f"{run.step * run.batch:,}, {run.batch} per step"))
    if run.seconds:
        rate = run.step * run.batch / run.seconds
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        facts.append(("time in training", f"{duration_text(run.seconds)}, {shown} images per second"))
    for name, best, unit in (("val_loss", min, ""), ("val_psnr", max, " dB")):
        steps, values = run.curve(name)
        if values:
            figures = [
                f"{values[at]:.4f}{unit} at step {steps[at]}" for at in (-1, values.index(best(values)))
            ]
            facts.append((name, f"{figures[0]}, best {figures[1]}"))
    memory = run.curve("memory_gib")[1]
    if memory:
        facts.append(("peak memory", f"{max(memory):.2f} GiB"))
    kept = [path.name for path in list_checkpoints(run.folder / "checkpoints")]
    if kept:
        facts.append(("checkpoints kept", ", ".join(kept)))
    return facts


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.rows and (quiet := time.time() - run.rows[-1].get("time", 0.0)) < _LONG:
        return f"not finished, last line {quiet:.0f} s ago"
    return "not finished"


def _remarks(run: Run) -> list[str]:
    """Return remarks on the curves."""
    remarks = []
    found = trend(*run.curve("val_loss"))
    if found.kind == "rising" and not run.finished:
        remarks.append(
            f"The loss on held-out images has risen by {found.change:.0%} since step {found.step}: the network has "
            "begun to learn the training images by heart. Fewer steps or more images help. If the training loss rises "
            "as well, lower --learning-rate."
        )
    skipped = sum("The update is skipped" in line for line in run.log)
    if skipped:
        remarks.append(
            f"Updates skipped because the loss or its gradient was not finite: {skipped} (see the log below)."
        )
    return remarks


def _samples(page: Section, run: Run) -> None:
    images = run.previews()
    chosen = sorted({round(i) for i in np.linspace(0, len(images) - 1, _MOST_IMAGES)} if images else ())
    if len(chosen) < len(images):
        page.text(f"{len(chosen)} of the {len(images)} previews in {run.folder / 'samples'}.")
    for path in (images[index] for index in chosen):
        try:
            with open_image(path) as image:
                shown = to_rgb(image)
        except UserError:
            page.text(f"{path.name} cannot be read: the run was killed while writing it.")
            continue
        if shown.width > _IMAGE_WIDTH:
            shown.thumbnail((_IMAGE_WIDTH, 2 * _IMAGE_WIDTH))
        page.image(shown, f"step {preview_step(path)}", "webp")


def _data(page: Page, run: Run) -> None:
    page.heading("Data")
    lines = data_lines(run.log)
    page.list(lines or ["train.log has no lines about the data."])
    if data := run.config.get("data"):
        page.text("A full check of the images, with a contact sheet:")
        page.code(shlex.join(["latentflow", "check", str(data), "--report", "data.html"]))


def _settings(page: Page, run: Run) -> None:
    if not run.config:
        return
    page.heading("Settings")
    defaults = _defaults()
    changed = [
        (k, _text(v), _text(defaults[k]))
        for k, v in run.config.items()
        if k in defaults and (tuple(v) if isinstance(v, list) else v) != defaults[k]
    ]
    default = "default of a training from scratch" if run.config.get("init_from") else "default"
    page.table(["changed setting", "here", default], changed)
    every = page.details("all settings (config.yaml)")
    every.code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))


def _defaults() -> dict[str, Any]:
    """Return the defaults of all settings of all programs; the data have none."""
    sections = (
        AutoencoderConfig(), NetworkConfig(), TextConfig(), FlowConfig(), LoopConfig(), FramingConfig(),
        FineTuningConfig(), AdapterConfig(),
    )  # fmt: skip
    defaults = {
        name: value for section in (DataConfig(data=""), *sections) for name, value in vars(section).items()
    }
    del defaults["data"]
    return {"init_from": None, **defaults}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _environment(page: Page, run: Run) -> None:
    page.heading("Environment")
    if not run.starts:
        page.text("The run recorded nothing about it.")
        return
    hidden = ("started", "step", "command")  # those are in the table of starts
    page.table([], [(name, value) for name, value in run.starts[-1].items() if name not in hidden])
    names = ("started", "step", "device", "processes", "command")
    page.table(names, [[start.get(name) for name in names] for start in run.starts])


def _log(page: Page, run: Run) -> None:
    if run.log:
        page.heading("Log")
        last = run.log[-_LOG_LINES:]
        page.details(f"train.log: last {len(last)} of {len(run.log)} lines").code("\n".join(last))


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("the curves of `latentflow report` need", "matplotlib") from error
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.5, 2.2 * rows + 0.4), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, 2, number + 1)
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
    page.figure(figure, "Blue: training; orange: held-out images, always with the same noise and times.")


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
    "rate": "information in the latents, nats per value",
    "flow": "flow loss",
    "encoder_alignment": "distance of features, through the encoder",
    "latent_std": "standard deviation of raw latents over images",
    "lpips": "LPIPS",
    "perceptual": "distance of features, 0 to 4",
    "commitment": "squared distance of latents from their codes",
    "codebook_used": "share of the codes that are used",
    "perplexity": "perplexity of the codes; their number: all used alike",
}


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
