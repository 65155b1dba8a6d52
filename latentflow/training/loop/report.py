"""What a run says while it runs: a progress line, train.log, metrics.jsonl, and a tracker if one is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL.Image import Image
from tqdm.auto import tqdm

from ...memory import peak_gib
from . import run_files, trackers

log = logging.getLogger(__name__)


class Reporter:
    """Reports of one process; silent except on the main one.

    Args:
        folder: the run folder.
        first_step, last_step: the range that this process will run.
        samples_per_epoch: size of the data set.
        report_to: "none", "tensorboard" or "wandb".
        full_rate: samples per second if the devices did nothing but multiply matrices; None: not known.
        active: False on every process but the main one.
        shown: the attribute of the run that this one goes on from.

    Attributes:
        shown: name -> figure of the progress line that earlier steps have a part in: the running mean of the loss, and
            the last validation's.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        last_step: int,
        *,
        samples_per_epoch: int,
        report_to: str,
        active: bool,
        full_rate: float | None = None,
        shown: Mapping[str, float] | None = None,
    ) -> None:
        self._active = active
        self._last_step = last_step
        self._samples_per_epoch = samples_per_epoch
        self._full_rate = full_rate
        self.shown: dict[str, float] = dict(shown or {})
        self._mark = (time.perf_counter(), 0)
        self._samples = 0
        self._metrics_failed = False
        self._metrics = run_files.open_metrics(folder) if active else None
        self._tracker = trackers.start(report_to, folder) if active else None
        if active:
            run_files.record_start(folder, first_step)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            disable=not (active and terminal),
            unit="step",
            dynamic_ncols=True,
        )
        self._lines = active and not terminal
        self._last_line = 0.0

    def step(self, samples: int) -> None:
        """Count one finished step of ``samples`` samples over all processes."""
        self._samples += samples
        self._bar.update(1)

    def metrics(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Record training metrics of a step."""
        if not self._active:
            return
        self.shown["loss"] = 0.9 * self.shown.get("loss", values["loss"]) + 0.1 * values["loss"]
        now = time.perf_counter()
        elapsed, done = now - self._mark[0], self._samples - self._mark[1]
        rate = done / elapsed if elapsed > 0 else 0.0
        self._mark = (now, self._samples)
        speed = {"images_per_second": rate, "memory_gib": peak_gib()}
        if self._full_rate is not None:
            speed["model_flops_utilisation"] = rate / self._full_rate
        self._write(step, values | speed)
        per_step = samples_seen / step
        eta = (self._last_step - step) * per_step / rate if rate else 0.0
        parts = {
            "epoch": f"{samples_seen / self._samples_per_epoch:.1f}",
            **{name: f"{value:.4f}" for name, value in self.shown.items()},
            "lr": f"{values['lr']:.1e}",
            "img/s": f"{rate:.0f}",
            **({} if self._full_rate is None else {"MFU": f"{rate / self._full_rate:.0%}"}),
            "mem": f"{peak_gib():.1f}G",
            "ETA": _duration(eta),
        }
        self._bar.set_postfix(parts, refresh=False)
        if self._lines and now - self._last_line > 5:
            self._last_line = now
            line = "  ".join(f"{name} {value}" for name, value in parts.items())
            with suppress(OSError):  # nobody reads it any more
                print(f"step {step}/{self._last_step}  {line}", file=sys.stderr, flush=True)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Record validation figures; they stay in the progress line."""
        if self._active:
            figures = {f"val_{name}": value for name, value in values.items()}
            self.shown |= figures
            self._write(step, figures)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def picture(self, step: int, image: Image) -> None:
        """Hand a preview picture to the tracker; its file is the caller's."""
        if self._tracker is not None:
            self._tracker.picture(step, image)

    def say(self, text: str) -> None:
        """A line for people: on the terminal above the bar, and in train.log."""
        if self._active:
            log.info(text)

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.close()
        if self._tracker is not None:
            self._tracker.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        assert self._metrics is not None
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **rounded}) + "\n"
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:  # what could not be written stays in the buffer, for the next time
            if not self._metrics_failed:
                self.say(
                    f"WARNING: {self._metrics.name} cannot be written ({error.strerror}); training goes on"
                )
            self._metrics_failed = True
        if self._tracker is not None:
            with suppress(OSError):  # its files are on the same disk
                self._tracker.metrics(step, values)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds) % 60:02d}s"
