"""Reports of a run while it trains: log lines, metrics.jsonl, progress, trackers, the profile of a step."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import secrets
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import yaml
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL.Image import Image
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm.auto import tqdm

from ... import __version__
from ...errors import UserError, printable
from ...utils.components import quiet_libraries
from ...utils.libraries import missing
from ...utils.memory import is_out_of_memory, out_of_memory, peak_gib, release_memory
from ...utils.progress import QUIET_SECONDS, duration_text
from .distributed import process_state
from .timing import Clock

log = logging.getLogger(__name__)

_LEAST_UTILISATION = 0.01  # below it, it says nothing that the images per second do not


class _Terminal(logging.Handler):
    """A handler that writes above the progress bar; a terminal that is gone (closed, disconnected) ends no run."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _Printable(logging.Formatter):
    """A formatter that keeps names of files and words of captions from steering the terminal that shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _File(logging.FileHandler):
    """A handler for which a disk that is full or gone costs lines of the file only: the terminal has them all."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Do nothing: the default prints a traceback for every line."""


def log_to(folder: Path | None) -> logging.Logger:
    """Return the logger of all our modules, writing to the terminal and, with a folder, to its ``train.log``.

    Of several processes only the main one writes; other libraries write errors only.
    """
    quiet_libraries()
    logger = logging.getLogger("latentflow")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    if not process_state().is_main_process:
        logger.addHandler(logging.NullHandler())
        return logger
    logger.setLevel(logging.INFO)
    if folder is not None:
        file = _File(folder / "train.log")
        file.setFormatter(_Printable("%(asctime)s %(message)s"))
        logger.addHandler(file)
    terminal = _Terminal()
    terminal.setFormatter(_Printable())
    logger.addHandler(terminal)
    return logger


def resume_line(command: str, argv: Sequence[str] | None) -> str:
    """Return the command line that started this program, for the message that says how to resume it."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["latentflow", command, *arguments])


def open_metrics(folder: Path) -> TextIO:
    """Open ``metrics.jsonl`` to append; a line that a killed run left torn is ended, so that the next one is whole."""
    path = folder / "metrics.jsonl"
    file = path.open("a", encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")
    return file


def record_start(folder: Path, step: int) -> None:
    """Append machine, packages and command of this start of the run, at ``step``, to ``environment.jsonl``."""
    state = process_state()
    device = str(state.device)
    if state.device.type == "cuda":
        device = torch.cuda.get_device_name(state.device)
    packages = ("diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
    line = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "processes": state.num_processes,
        "machine": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "latentflow": __version__,
        "torch": str(torch.__version__),  # with the CUDA that it was built for
        **{name: importlib.metadata.version(name) for name in packages},
    }
    with (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Tracker:
    """Curves and images of a run at TensorBoard or Weights & Biases. A failure is a warning, and ends no run.

    Raises:
        UserError: its library is not installed, or it could not start.
    """

    def __init__(self, report_to: str, folder: Path) -> None:
        self._tracker: GeneralTracker | None = None
        if report_to == "none":
            return
        process_state()  # accelerate's trackers need it
        try:
            if report_to == "wandb":
                import wandb  # noqa: F401

                # An autoencoder and its generator share the last part.
                name = "/".join(folder.resolve().parts[-2:])
                options = {"name": name, "dir": str(folder), "id": _wandb_id(folder), "resume": "allow"}
                self._tracker = WandBTracker("latentflow", **options)
            else:
                import tensorboard  # noqa: F401

                self._tracker = TensorBoardTracker("tensorboard", str(folder))
            self._tracker.start()
        except ImportError as error:
            raise missing(f"--report-to {report_to} needs", report_to) from error
        except Exception as error:
            fix = "Run `wandb login`, or set WANDB_MODE=offline (and `wandb sync` later)."
            raise UserError(
                f"--report-to {report_to} could not start: {error}", fix if report_to == "wandb" else ""
            ) from error
        settings = folder / "config.yaml"
        if report_to == "wandb" and settings.is_file():
            self._call("store_init_configuration", yaml.safe_load(settings.read_text(encoding="utf-8")))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._call("log", values, step=step)

    def image(self, step: int, image: Image) -> None:
        options = {"dataformats": "NHWC"} if isinstance(self._tracker, TensorBoardTracker) else {}
        self._call("log_images", {"preview": np.asarray(image)[None]}, step=step, **options)  # (1, H, W, 3)

    def close(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:  # a server that went away, a full disk: the run goes on
            log.warning("WARNING: --report-to: %s; the run goes on without it", error)
            self._tracker = None


def _wandb_id(folder: Path) -> str:
    """Return the id of a run, the same for every start of it, so that a resumed one goes on with its curves."""
    file = folder / "wandb" / "run-id.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()


class Reporter:
    """Report of one process; silent except on the main one.

    Args:
        folder: the run folder.
        first_step, last_step: the range that this process will run.
        samples_per_epoch: number in which each of the user's images comes once, others that are mixed in included.
        report_to: "none", "tensorboard" or "wandb".
        full_rate: samples per second if the devices did nothing but multiply matrices; None: not known.
        active: False on every process but the main one.
        shown: ``shown`` of the run that this one goes on from.
        clock: of the run.

    Attributes:
        shown: name -> figure of the progress line that depends on earlier steps: the running mean of the loss, and the
            last validation's.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        last_step: int,
        *,
        samples_per_epoch: float,
        report_to: str,
        active: bool,
        full_rate: float | None = None,
        shown: Mapping[str, float] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._active = active
        self._step, self._last_step = first_step, last_step
        self._samples_per_epoch = samples_per_epoch
        self._full_rate = full_rate
        self.shown: dict[str, float] = dict(shown or {})
        self._clock = clock or Clock()
        self._mark = (first_step, 0.0)  # step, and seconds of training up to it, of the metrics before
        self._figures: dict[str, str] = {}
        self._metrics_failed = False
        self._metrics = open_metrics(folder) if active else None
        self._tracker = Tracker(report_to if active else "none", folder)
        if active:
            record_start(folder, first_step)
        self._on_gpu = process_state().device.type != "cpu"
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            disable=not (active and self._terminal and first_step < last_step),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # the time left is ours
            dynamic_ncols=True,
        )
        self._printed, self._printed_at = (
            (first_step, dict(self.shown)),
            0.0,
        )  # what the last line showed, and when

    def step(self, step: int) -> None:
        """Show that a step is finished."""
        self._step = step
        self._show()
        self._bar.update(1)
        if step < self._last_step and time.perf_counter() - self._printed_at > QUIET_SECONDS:
            self._print_line()

    def metrics(
        self, step: int, samples_seen: int, values: dict[str, float], seconds: float | None = None
    ) -> None:
        """Record training metrics of a step, begun after ``seconds`` of training; None: all until now."""
        if not self._active:
            return
        self.shown["loss"] = 0.9 * self.shown.get("loss", values["loss"]) + 0.1 * values["loss"]
        seconds = self._clock.seconds if seconds is None else seconds
        taken, done = seconds - self._mark[1], samples_seen / step * (step - self._mark[0])
        rate = done / taken if taken > 0 else 0.0
        self._mark = (step, seconds)
        speed = {"images_per_second": rate, "memory_gib": peak_gib()}
        if self._full_rate is not None:
            speed["model_flops_utilisation"] = rate / self._full_rate
        self._write(step, values | speed)
        self._figures = {
            "epoch": f"{samples_seen / self._samples_per_epoch:.1f}",
            "lr": f"{values['lr']:.1e}",
            "images/s": f"{rate:.3g}" if rate < 100 else f"{rate:.0f}",
            "memory": f"{peak_gib():.1f} GiB",
        }
        # The rate of a CPU's matrix products is no measure of what it could do here.
        used = rate / self._full_rate if self._full_rate is not None and self._on_gpu else 0.0
        if used >= _LEAST_UTILISATION:
            self._figures["MFU"] = f"{used:.0%}"

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Record validation figures; they stay in the progress line."""
        if self._active:
            figures = {f"val_{name}": value for name, value in values.items()}
            self.shown |= figures
            self._write(step, figures)
            self._show()
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def image(self, step: int, image: Image) -> None:
        """Hand a preview image to the tracker; its file is the caller's."""
        self._tracker.image(step, image)

    def say(self, text: str) -> None:
        """Log a line for people: on the terminal above the bar, and in train.log."""
        if self._active:
            log.info(text)

    def attempt(self, phase: str, step: int, function: Callable[[], None]) -> None:
        """Call what training can do without: a failure is a warning, with its traceback where it is a defect."""
        try:
            function()
            return
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            defect = None
            if is_out_of_memory(error):
                why = str(out_of_memory(phase, error))
            elif not isinstance(error, UserError | OSError):
                defect = traceback.format_exc()
        release_memory()
        self.say(
            f"WARNING: step {step}: could not {phase}: {why}\nTraining goes on, and tries again when the next is due."
        )
        if defect is not None:
            self.say(defect)

    def stopped(self, resume_line: str) -> None:
        """Log that the run has stopped, below the finished bar: how it goes on is the last line."""
        self._finish_bar()
        self.say(f"stopped at step {self._step}, saved; resume with:\n  {resume_line}")

    def _finish_bar(self) -> None:
        """Finish the bar, with the figures of the last step."""
        self._show()
        self._bar.close()
        if self._printed != (self._step, self.shown):
            self._print_line()

    def close(self) -> None:
        """Finish the bar, and the files."""
        self._finish_bar()
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.close()
        self._tracker.close()

    def _shown(self) -> dict[str, str]:
        """Return the figures of the progress line, by name."""
        epoch = {name: value for name, value in self._figures.items() if name == "epoch"}
        losses = {name: f"{value:.4f}" for name, value in self.shown.items()}
        figures = epoch | losses | self._figures
        left = self._clock.seconds_left(self._last_step - self._step)
        if left is not None and self._step < self._last_step:
            figures["left"] = duration_text(left)
        return figures

    def _show(self) -> None:
        self._bar.set_postfix(self._shown(), refresh=False)

    def _print_line(self) -> None:
        """Print the progress line where there is no bar."""
        if self._terminal or not self._active:
            return
        figures = "  ".join(f"{name} {value}" for name, value in self._shown().items())
        line = f"step {self._step}/{self._last_step}  {figures}"
        self._printed, self._printed_at = (self._step, dict(self.shown)), time.perf_counter()
        with suppress(OSError):  # nobody reads it any more
            print(line, file=sys.stderr, flush=True)

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
        self._tracker.metrics(step, values)


# The sections of a step; the loop marks each with `torch.profiler.record_function`.
SECTIONS = ("load", "forward", "backward", "clip", "optimizer", "average", "report")
_WAIT, _WARM_UP, _STEPS = 3, 2, 6  # the first steps of a process allocate, tune and compile
_OPERATORS = 15


@contextmanager
def profiler(folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Profile six steps, from the sixth of this process on: ``folder`` gets ``trace.json`` and ``table.txt``.

    Within the context, call what it yields after every step. ``say`` gets the table. Profiled steps take longer, and
    learn the same.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def ready(profiled: Any) -> None:
        folder.mkdir(exist_ok=True)
        profiled.export_chrome_trace(str(folder / "trace.json"))
        lines = _table(profiled.key_averages())
        (folder / "table.txt").write_text("\n".join(lines) + "\n")
        say(
            "\n".join(lines)
            + f"\nthe trace of {_STEPS} steps is {folder / 'trace.json'}; https://ui.perfetto.dev shows it"
        )

    plan = schedule(wait=_WAIT, warmup=_WARM_UP, active=_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=ready) as running:
        yield running.step


def _table(events: Any) -> list[str]:
    """Return lines with the milliseconds of a step by section, and the operators that take most of it.

    On a GPU they are those of its own work: it runs behind the host, whose sections only start the work.
    """
    by_name = {event.key: event for event in events}
    steps = [event for event in events if event.key.startswith("ProfilerStep")]
    count = sum(event.count for event in steps)
    whole = sum(event.cpu_time_total for event in steps) / count / 1000
    gpu = any(event.self_device_time_total > 0 for event in events)
    name = "device_time_total" if gpu else "cpu_time_total"
    sections = {key: getattr(by_name[key], name) / count / 1000 for key in SECTIONS if key in by_name}
    if not gpu:
        sections["everything else"] = whole - sum(sections.values())
    lines = [f"a step takes {whole:.1f} ms" + (", of which the GPU computes" if gpu else "")]
    lines += [f"  {key:<42}{value:9.2f} ms {value / whole:6.1%}" for key, value in sections.items()]
    own = f"self_{name}"
    operators = [event for event in events if event.key not in SECTIONS and event not in steps]
    operators.sort(key=lambda event: -getattr(event, own))
    lines += ["operators, without what they call" + (" (GPU)" if gpu else "")]
    for event in operators[:_OPERATORS]:
        value = getattr(event, own) / count / 1000
        calls = f"{event.count / count:.0f} calls"
        lines.append(f"  {event.key[:40]:<42}{value:9.2f} ms {value / whole:6.1%} {calls:>12}")
    return lines
