"""The page of `latentflow report`: one run, or a run of two stages, from the files in its folder."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ..autoencoder import AutoencoderConfig
from ..data.config import DataConfig
from ..errors import UserError
from ..html_page import Page, Section
from ..models.config import NetworkConfig, TextConfig
from .config import LoopConfig
from .flow import FlowConfig
from .run_files import Row, metric_lines, read_metrics, read_starts

_MOST_PICTURES, _PICTURE_WIDTH = 12, 640
_MOST_POINTS = 1000  # of a curve: more cannot be seen
_LOG_LINES = 200
_LONG = 600  # seconds without a line after which a run is hardly running


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a run folder say. Every part may be missing: a run can be killed at any instant.

    Attributes:
        rows: one for each logged step, in order; see `read_metrics`.
        seconds: time in the training loop, of all starts, by the clock that also measured the throughput.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    starts: list[dict[str, Any]]
    log: list[str]
    seconds: float

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_autoencoder(self) -> bool:
        """Whether this is what trains an autoencoder: `latentflow autoencoder`, or the first stage of `train`."""
        return "network" not in self.config

    @property
    def target(self) -> int | None:
        """The steps that the run shall have."""
        key = "max_train_steps"
        if self.is_autoencoder and self.config.get("autoencoder_steps"):
            key = "autoencoder_steps"
        return self.config.get(key)

    @property
    def result(self) -> Path:
        return self.folder / ("autoencoder" if self.is_autoencoder else "pipeline")

    @property
    def finished(self) -> bool:
        return self.result.is_dir() and (self.target is None or self.step >= self.target)

    def batch(self) -> int:
        """Samples in one step of all processes."""
        processes = int(self.starts[-1]["processes"]) if self.starts else 1
        if self.is_autoencoder:
            return int(self.config.get("autoencoder_batch_size", 1)) * processes
        accumulation = int(self.config.get("gradient_accumulation_steps", 1))
        return int(self.config.get("train_batch_size", 1)) * accumulation * processes

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, where it was logged."""
        rows = [row for row in self.rows if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    def resume(self) -> str:
        """The command that goes on with the run."""
        command = ["latentflow", "autoencoder" if self.is_autoencoder else "train"]
        command += ["--config", str(self.folder / "config.yaml"), "-o", str(self.folder)]
        if self.finished:
            steps = "--autoencoder-steps" if self.config.get("autoencoder_steps") else "--max-train-steps"
            command += [steps if self.is_autoencoder else "--max-train-steps", str(2 * self.step)]
        return shlex.join(command)


def read_run(folder: str | Path) -> Run:
    """Read a run folder, whatever of it is there.

    Raises:
        UserError: it is none: there is neither a config.yaml nor a metrics.jsonl.
    """
    folder = Path(folder)
    settings = folder / "config.yaml"
    if not settings.is_file() and not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        fix = f"Did you mean '{inside[0]}'?" if inside else "Give what -o of `latentflow train` named."
        raise UserError(f"'{folder}' is not a run folder: it holds no config.yaml and no metrics.jsonl", fix)
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    log = folder / "train.log"
    run = Run(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        rows=read_metrics(folder),
        starts=read_starts(folder),
        log=log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else [],
        seconds=0.0,
    )
    return dataclasses.replace(run, seconds=_seconds(folder, run.batch()))


def _seconds(folder: Path, batch: int) -> float:
    """Time in the loop. The hour of a line says nothing: a run may have lain still, and clocks jump."""
    total, last = 0.0, 0
    for row in metric_lines(folder):
        step, rate = int(row["step"]), row.get("images_per_second", 0.0)
        if rate > 0:
            total += max(0, step - last) * batch / rate
        last = step
    return total


def report_page(folder: str | Path) -> Page:
    """The page of a run: what became of it, curves, samples, settings, data, environment, and how to go on.

    Args:
        folder: a run of `latentflow train` or `latentflow autoencoder`, finished or not.

    Raises:
        UserError: it is no run folder, or matplotlib is missing.
    """
    run = read_run(folder)
    page = Page(run.folder.resolve().name)
    _summary(page, run)
    _curves(page, run)
    _samples(page, run.folder / "samples")
    first_stage = run.folder / "autoencoder"
    if not run.is_autoencoder and (first_stage / "metrics.jsonl").is_file():
        stage = read_run(first_stage)
        stage = dataclasses.replace(stage, config={k: v for k, v in run.config.items() if k != "network"})
        page.heading("The autoencoder, trained first")
        page.table([], _facts(stage))
        _curves(page, stage, heading=False)
        _samples(page, first_stage / "samples", heading=False)
    _data(page, run)
    _settings(page, run)
    _environment(page, run)
    _log(page, run)
    return page


def _summary(page: Page, run: Run) -> None:
    page.table([], _facts(run))
    for line in _remarks(run):
        page.text(line)
    if run.finished and not run.is_autoencoder:
        page.text("To draw with it:")
        page.code(shlex.join(["latentflow", "generate", "--checkpoint", str(run.result)]))
    page.text("To go on, for as many steps again:" if run.finished else "To go on where it stopped:")
    page.code(run.resume())


def _facts(run: Run) -> list[tuple[str, str]]:
    target = f" of {run.target}" if run.target else ""
    facts = [("state", f"{_state(run)}: step {run.step}{target}")]
    facts.append(("samples seen", f"{run.step * run.batch():,}, {run.batch()} a step"))
    if run.seconds:
        rate = run.step * run.batch() / run.seconds
        facts.append(("time in training", f"{_duration(run.seconds)}, {rate:.3g} pictures a second"))
    for name, best in (("val_loss", min), ("val_psnr", max)):
        steps, values = run.curve(name)
        if values:
            index = values.index(best(values))
            facts.append(
                (name, f"{values[-1]:.4f} at the end, best {values[index]:.4f} at step {steps[index]}")
            )
    memory = run.curve("memory_gib")[1]
    if memory:
        facts.append(("peak memory", f"{max(memory):.2f} GiB"))
    kept = [path.name for path in sorted((run.folder / "checkpoints").glob("step-*"))]
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
    """What a reader of the curves should not miss."""
    remarks = []
    steps, values = run.curve("val_loss")
    if len(values) >= 3 and values[-1] > 1.02 * min(values):
        best = values.index(min(values))
        remarks.append(
            f"The validation loss has risen by {values[-1] / values[best] - 1:.0%} since step {steps[best]}: "
            "from there on the network learns the training pictures by heart. Fewer steps or more pictures help."
        )
    skipped = sum("The update is skipped" in line for line in run.log)
    if skipped:
        remarks.append(
            f"{skipped} updates were skipped because the loss or its gradient was not finite (log below)."
        )
    return remarks


# ---- curves ----


def _curves(page: Section, run: Run, heading: bool = True) -> None:
    if heading:
        page.heading("Curves")
    names = list(dict.fromkeys(name for row in run.rows for name in row if name not in ("step", "time")))
    if not names:
        page.text("No figures were logged yet.")
        return
    # `val_x` is drawn with `x`; the loss comes first.
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
        if panel == "loss":
            axes.legend(frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=10)
    page.figure(
        figure, "Blue: in training; orange: on held-out pictures, always with the same noises and times."
    )


_TITLES = {
    "lr": "learning rate",
    "grad_norm": "norm of the gradient, before clipping",
    "images_per_second": "pictures per second",
    "memory_gib": "peak memory, GiB",
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
    if name == "loss" and len(y) > 20:  # noisy: the mean of the nearest twentieth on top
        axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(x, _smooth(y, len(y) // 20), color=color, label=name)
    else:
        axes.plot(
            x, y, color=color, label=name, marker="o" if len(y) < 20 else "", markersize=3, linewidth=1.2
        )


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most 1000 points of a curve: means of equally many neighbours."""
    stride = -(-len(steps) // _MOST_POINTS)
    edges = range(0, len(steps), stride)
    x, y = np.asarray(steps, float), np.asarray(values, float)
    return (
        np.array([x[i : i + stride].mean() for i in edges]),
        np.array([y[i : i + stride].mean() for i in edges]),
    )


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean over ``reach`` neighbours on either side, of fewer at the ends."""
    sums = np.concatenate([[0.0], values.cumsum()])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    smooth: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smooth


# ---- the other sections ----


def _samples(page: Section, folder: Path, heading: bool = True) -> None:
    pictures = sorted(folder.glob("step-*.png"))
    if not pictures:
        return
    if heading:
        page.heading("Samples")
    chosen = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, _MOST_PICTURES)})
    if len(chosen) < len(pictures):
        page.text(f"{len(chosen)} of {len(pictures)} in {folder}.")
    for path in (pictures[index] for index in chosen):
        try:
            with Image.open(path) as image:
                image.load()
                shown = image.convert("RGB")
        except OSError:
            page.text(f"{path.name} cannot be read: the run was killed while writing it.")
            continue
        if shown.width > _PICTURE_WIDTH:
            shown.thumbnail((_PICTURE_WIDTH, 2 * _PICTURE_WIDTH))
        page.picture(shown, f"step {path.stem.removeprefix('step-').lstrip('0')}", "webp")


def _data(page: Page, run: Run) -> None:
    page.heading("Data")
    lines = data_lines(run.log)
    page.list(lines or ["train.log says nothing about the data."])
    if data := run.config.get("data"):
        page.text("All that can be said about the pictures, with a contact sheet:")
        page.code(shlex.join(["latentflow", "check", str(data)]))


def data_lines(log: Sequence[str]) -> list[str]:
    """What the last start of a run said about its data: all up to its plan, each line once."""
    told = [_message(line) for line in log]
    plans = [index for index, line in enumerate(told) if line.startswith("plan: ")]
    if not plans:
        return []
    first = next(
        (i for i in range(plans[-1], 0, -1) if told[i - 1].startswith(("step ", "stopped", "done:"))), 0
    )
    warnings = [line for line in told[plans[-1] : plans[-1] + 3] if "pictures are few" in line]
    return list(dict.fromkeys([*told[first : plans[-1]], *warnings]))


def _message(line: str) -> str:
    """A line of train.log without its date and time."""
    parts = line.split(" ", 2)
    return parts[2] if len(parts) == 3 and parts[0][:4].isdigit() else line


def _settings(page: Page, run: Run) -> None:
    if not run.config:
        return
    page.heading("Settings")
    usual = _defaults()
    changed = [
        (k, _text(v), _text(usual[k])) for k, v in run.config.items() if k in usual and _differs(v, usual[k])
    ]
    page.table(["other than usual", "here", "usual"], changed)
    every = page.details("all settings (config.yaml)")
    every.code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))


def _defaults() -> dict[str, Any]:
    """The defaults of all settings of all programs."""
    defaults: dict[str, Any] = {}
    for config in (DataConfig, AutoencoderConfig, NetworkConfig, TextConfig, FlowConfig, LoopConfig):
        for field in dataclasses.fields(config):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
    return defaults


def _differs(value: Any, usual: Any) -> bool:
    return bool((tuple(value) if isinstance(value, list) else value) != usual)


def _text(value: Any) -> str:
    return (
        "-" if value is None else " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    )


def _environment(page: Page, run: Run) -> None:
    page.heading("Environment")
    if not run.starts:
        page.text("The run recorded none.")
        return
    page.table(
        ["", "value"], [(k, v) for k, v in run.starts[-1].items() if k not in ("started", "step", "command")]
    )
    names = ("started", "step", "device", "processes", "command")
    page.table(
        ["started", "at step", "device", "processes", "command"],
        [[s.get(n) for n in names] for s in run.starts],
    )


def _log(page: Page, run: Run) -> None:
    if run.log:
        page.heading("Log")
        some = run.log[-_LOG_LINES:]
        page.details(f"train.log: {len(some)} of {len(run.log)} lines").code("\n".join(some))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest} s"
