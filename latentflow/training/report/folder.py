"""Reading a run folder for a report or a model card. Any file may be missing or torn, as a run may be killed."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError, is_number
from ...utils.files import read_settings, read_yaml
from ..losses.autoencoder import autoencoder_steps

Row = dict[str, float]


def metric_lines(folder: Path) -> Iterator[Row]:
    """Yield every line of ``metrics.jsonl`` that can be read, as it was written: killed runs repeat and tear some."""
    for row in _lines(folder / "metrics.jsonl"):
        if isinstance(row.get("step"), int):
            # JSON as Python writes it has NaN and Infinity too: no curve can show them.
            yield {name: value for name, value in row.items() if is_number(value)}


def read_metrics(folder: Path) -> list[Row]:
    """Return one row for each step that was logged, in order, with all its figures.

    A run that was resumed from an earlier step took the steps after it once more: the later rows count.
    """
    kept: dict[int, Row] = {}
    last = 0
    for row in metric_lines(folder):
        step = int(row["step"])
        if step < last:
            kept = {earlier: values for earlier, values in kept.items() if earlier < step}
        kept[step] = kept.get(step, {}) | row
        last = step
    return list(kept.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A line torn by a kill may hold the next start's first one at its end; ours are flat.
        for text in (line, line[line.rfind("{") :]):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
                break


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of a run folder.

    Attributes:
        config: settings of config.yaml.
        rows: figures of each logged step, in order; see `read_metrics`.
        starts: what each start ran on, oldest first; see `record_start`.
        log: lines of train.log.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    starts: list[dict[str, Any]]
    log: list[str]

    @property
    def step(self) -> int:
        """Return the last logged step."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_student(self) -> bool:
        """Return whether this is a run of `latentflow distill`."""
        return "method" in self.config

    @property
    def is_autoencoder(self) -> bool:
        """Return whether this trains an autoencoder: `latentflow autoencoder`, or the first stage of `train`."""
        return "network" not in self.config and not self.is_student

    @property
    def program(self) -> str:
        """Return the command of latentflow that the run belongs to."""
        return "autoencoder" if self.is_autoencoder else "distill" if self.is_student else "train"

    @property
    def target(self) -> int | None:
        """Return the number of steps that the run should reach."""
        steps: int | None = self.config.get("max_train_steps")
        if self.is_autoencoder and steps is not None:
            return autoencoder_steps(self.config.get("autoencoder_steps"), steps)
        return steps

    @property
    def result(self) -> Path:
        """Return the folder of the exported model; of a pretrained model's adapter, that of the adapter."""
        if self.is_autoencoder:
            return self.folder / "autoencoder"
        pipeline, adapter = self.folder / "pipeline", self.folder / "adapter"
        return adapter if adapter.is_dir() and not pipeline.is_dir() else pipeline

    @property
    def is_pretrained(self) -> bool:
        """Return whether its result is a pretrained model of diffusers, or an adapter of one."""
        if self.result.name == "adapter":
            return True
        index = self.result / "model_index.json"
        return index.is_file() and not str(read_settings(index).get("_class_name")).startswith("LatentFlow")

    @property
    def finished(self) -> bool:
        """Return whether the run is complete and its model is exported."""
        at_end = self.target is None or self.step >= self.target
        return self.result.is_dir() and (at_end or self.stopped_early)

    @property
    def stopped_early(self) -> bool:
        """Return whether it stopped early and was not resumed since; see `EarlyStop.line`."""
        return any(f"stopped early at step {self.step};" in line for line in self.log)

    @property
    def result_step(self) -> int:
        """Return the step of the exported weights: the last one, or that which `EarlyStop.line` names."""
        named = re.compile(rf"step {self.step}(?: is reached)?; the result is of step (\d+)")
        found = [match for line in self.log if (match := named.search(line))]
        return int(found[-1][1]) if found else self.step

    @property
    def processes(self) -> int:
        """Return the number of processes of the last start."""
        return int(self.starts[-1]["processes"]) if self.starts else 1

    @property
    def batch(self) -> int:
        """Return the number of samples in one step of all processes."""
        if self.is_autoencoder:
            return int(self.config.get("autoencoder_batch_size", 1)) * self.processes
        accumulation = int(self.config.get("gradient_accumulation_steps", 1))
        return int(self.config.get("train_batch_size", 1)) * accumulation * self.processes

    @cached_property
    def seconds(self) -> float:
        """Return the seconds spent in training steps by all starts.

        They follow from the logged speed: a run may pause between lines, and clocks jump.
        """
        total, last = 0.0, 0
        for row in metric_lines(self.folder):
            step, rate = int(row["step"]), row.get("images_per_second", 0.0)
            if rate > 0:
                total += max(0, step - last) * self.batch / rate
            last = step
        return total

    def previews(self) -> list[Path]:
        """Return the files of preview images, oldest first."""
        return sorted((self.folder / "samples").glob("step-*.png"), key=preview_step)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a figure, where it was logged."""
        rows = [row for row in self.rows if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    def resume(self, steps: int | None = None) -> str:
        """Return the command that resumes the run; a finished one up to ``steps`` (default: twice its own), or with
        more patience."""
        command = ["latentflow", self.program]
        command += ["--config", str(self.folder / "config.yaml"), "-o", str(self.folder)]
        if self.finished and self.stopped_early:
            command += ["--early-stop", str(2 * int(self.config.get("early_stop", 1)))]
        elif self.finished:
            flag = "--autoencoder-steps" if self.is_autoencoder else "--max-train-steps"
            command += [flag, str(steps or 2 * self.step)]
        return shlex.join(command)


def read_run(folder: str | Path, config: dict[str, Any] | None = None) -> Run:
    """Read a run folder, of which any file may be missing.

    Args:
        config: settings of a first stage, which has no config.yaml.

    Raises:
        UserError: it is no run folder, as it has neither config.yaml nor metrics.jsonl; or config.yaml is not YAML.
    """
    folder = Path(folder)
    settings, log = folder / "config.yaml", folder / "train.log"
    if not settings.is_file() and not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        fix = f"Did you mean '{inside[0]}'?" if inside else "Give what -o of `latentflow train` named."
        if not folder.exists():
            raise UserError(f"there is no folder '{folder}'", "Give what -o of `latentflow train` named.")
        raise UserError(f"'{folder}' is not a run folder: it holds no config.yaml and no metrics.jsonl", fix)
    if config is None and settings.is_file():
        config = read_yaml(settings, "Mend it or move it away.")
    return Run(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        rows=read_metrics(folder),
        starts=list(_lines(folder / "environment.jsonl")),
        log=log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else [],
    )


def first_stage(run: Run) -> Run:
    """Return the run of the autoencoder that a run trains first; it may not have begun.

    Raises:
        UserError: it has none.
    """
    settings = {name: value for name, value in run.config.items() if name != "network"}
    return read_run(run.folder / "autoencoder", settings)


def preview_step(path: Path) -> int:
    """Return the step in a preview's name; -1 if there is none."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def data_lines(log: list[str]) -> list[str]:
    """Return the lines that the last start logged about its data, which are those before its plan, each once."""
    messages = [_message(line) for line in log]
    plans = [index for index, line in enumerate(messages) if line.startswith("plan: ")]
    if not plans:
        return []
    ends = ("step ", "stopped", "done:", "verdict:", "pushed:", "  ")  # "  ": a command below one of these
    first = next((i for i in range(plans[-1], 0, -1) if messages[i - 1].startswith(ends)), 0)
    # Old runs logged "pictures" for images.
    warnings = [line for line in messages[plans[-1] : plans[-1] + 3] if "s are few" in line]
    return list(dict.fromkeys([*messages[first : plans[-1]], *warnings]))


def _message(line: str) -> str:
    """Return a line of train.log without its date and time."""
    parts = line.split(" ", 2)
    return parts[2] if len(parts) == 3 and parts[0][:4].isdigit() else line
