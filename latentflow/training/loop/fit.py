"""The one training loop. What is trained differs by the modules handed to it: each turns a batch into its loss."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function

from ...config import LoopConfig
from ...errors import RunError, UserError, reason
from ...utils.files import replacing
from ...utils.memory import OutOfMemory, is_out_of_memory, keep_freed_memory, memory_phase, release_memory
from . import checkpoint
from .data_order import DataOrder
from .distributed import (
    fast_float32,
    full_rate,
    make_accelerator,
    most_of_any_process,
    together,
    whole,
)
from .loader import (
    BatchPrefetcher,
    DataFailed,
    Part,
    Recovery,
    TrainingData,
    Values,
    groups_of,
    load_batches,
    samples_per_epoch,
    to_device,
)
from .logging import Reporter, profiler
from .optimizers import learning_rate
from .run_folder import clean_up, run_lock
from .saving import AverageSnapshots, Saver, export_once
from .step_figures import StepFigures
from .stopping import EarlyStop, Stop, stop_on_signal
from .timing import Clock
from .trained_module import TrainedModule, tensor_for, with_averages

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that the loop calls, with the averaged weights in place and on the main process only.

    ``begin`` is called, by every process, once the run's checkpoint, if any, is known to fit. A validation or preview
    that fails is a warning. ``export`` fills an empty folder that becomes ``export_to`` at the end of the run, when its
    last checkpoint is complete. A `RunError` of it (a full disk) is tried again; any other error ends the run.
    """

    begin: Callable[[], None] = lambda: None
    validate: Callable[[], dict[str, float]] | None = None
    preview: Callable[[], Image.Image] | None = None
    export: Callable[[Path], None] | None = None
    export_to: Path | None = None


def fit(
    modules: Mapping[str, nn.Module],
    data: TrainingData,
    config: LoopConfig,
    output: str | Path,
    *,
    callbacks: Callbacks | None = None,
    description: Mapping[str, Any] | None = None,
    resume_line: str = "",
    phase: str = "train",
    flops: float | None = None,
    find_unused_parameters: bool = False,
    stop: Stop | None = None,
) -> bool:
    """Train modules until ``config.max_train_steps``, resuming from the newest checkpoint in ``output``.

    Args:
        modules: name -> module. Each step, in this order, every module is called with the batch and returns
            ``{"loss": scalar mean over the batch, ...}``; further scalars are logged. It may return ``per_sample``
            (B,) and ``t`` (B,), which name the culprits of a non-finite loss, or ``{}`` to sit a step out. One with a
            ``watch`` is asked at each report for lines about (step, figures).
        data: the samples; their order depends only on ``config.seed`` and the step.
        config: settings.
        output: the run folder.
        callbacks: validation, previews and export.
        description: what must not change between resumed runs (architecture, data), as nested dicts of plain values.
        resume_line: the command that resumes this run, printed when it stops before its end.
        phase: what to call the training when memory runs out; a key of `latentflow.utils.memory.ADVICE`.
        flops: of a sample, forward and backward; with them the model FLOPs utilisation is reported: the share of the
            machine's rate of matrix products that goes into the model (Chowdhery et al. 2022, arXiv:2204.02311,
            appendix B).
        find_unused_parameters: a pass may leave parameters out, so that several processes must look for those that it
            uses.
        stop: receives the signal that stopped the run, or came during its last step.

    Returns:
        True when the run is finished, False when SIGINT, SIGTERM or SIGHUP stopped it before (after saving): a program
        then exits with ``stop.status``.

    Raises:
        UserError: the checkpoint does not fit the description, another run uses the folder, or the loss stayed
            non-finite.
        RunError: memory, the disk or the data gave out. What could be saved is saved.
    """
    with run_lock(output):
        loop = Loop(
            modules, data, config, Path(output), callbacks or Callbacks(), phase, find_unused_parameters
        )
        return loop.run(dict(description or {}), resume_line, flops, stop or Stop())


class Loop:
    """A run of `fit`: `run`, `train` and `train_step` read downwards."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        data: TrainingData,
        config: LoopConfig,
        output: Path,
        callbacks: Callbacks,
        phase: str,
        find_unused_parameters: bool,
    ) -> None:
        self.config, self.data, self.output = config, data, output
        self.checkpoints = output / "checkpoints"
        self.callbacks, self.phase = callbacks, phase
        self.accelerator = make_accelerator(config, find_unused_parameters)
        self.main = self.accelerator.is_main_process
        self.modules = [
            TrainedModule(name, module, config, self.accelerator) for name, module in modules.items()
        ]
        self.sharded = any(module.sharded for module in self.modules)
        config.check_validated(callbacks.validate is not None)
        self.early = EarlyStop(config.early_stop, self.modules, self.accelerator)
        self.order = DataOrder(
            size=len(data),
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            seed=config.seed,
            groups=groups_of(data),
            mixin_count=getattr(data, "mixin_count", 0),
            mixin_share=getattr(data, "mixin_share", 0.0),
        )
        self.step = 0
        self.shown: dict[str, float] = {}  # in the progress line before
        self.unread: StepFigures | None = None  # of the last step
        self.skipped_in_a_row = 0
        self.validation_loss: float | None = None  # of the running step
        self.snapshots = AverageSnapshots(output, self.modules, config, main=self.main)
        self.recovery = Recovery(self.modules, data, config, self.accelerator, phase)

    # ---- the run, top to bottom ----

    def run(self, description: dict[str, Any], resume_line: str, flops: float | None, stop: Stop) -> bool:
        """Resume, train and export; return whether the run is finished."""
        self.resume_line, self.stop = resume_line, stop
        # As it comes back from a checkpoint.
        self.description = json.loads(json.dumps({"batch": self.order.global_batch} | description))
        self._clean_up()
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        together(self._resume)
        self.callbacks.begin()
        self.saver = Saver(self.checkpoints, self.config.checkpoints_total_limit, sharded=self.sharded)
        self.saver.saved = self.step
        kinds = [kind for kind in self.config.limited if kind != "validation" or self.callbacks.validate]
        self.clock = Clock(self.config.validation_time or 1.0, kinds)
        together(lambda: self._begin_report(flops))
        last = self.config.max_train_steps
        try:
            if self.step < last and not self.early.stopped:
                self.snapshots.begin(self.step)
                return self.train(last)
            done, longer = f"all {last} steps of {self.output} are taken", "more steps"
            if self.early.stopped:
                done, longer = self.early.line(self.step), "a higher --early-stop"
            self.report.say(f"{done}: nothing to train (with {longer} the run goes on)")
            self._export()  # if the run was killed before it was complete
            return True
        finally:
            try:
                self.saver.close()
                self.snapshots.close()
            finally:
                self.report.close()

    def train(self, last: int) -> bool:
        """Take the steps up to ``last``, and export; return whether the run is finished."""
        batches = BatchPrefetcher(
            load_batches(
                self.data,
                self.order.batches(self.step, last, self.accelerator.process_index),
                num_workers=self.config.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )
        profile: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
        if self.config.profile and self.main:
            profile = profiler(self.output / "profile", self.report.say)
        with stop_on_signal() as asked, fast_float32(self.accelerator), profile as profiled:
            while self.step < last and not self.early.stopped:
                try:
                    with self.clock.step():
                        figures = self.train_step(batches)
                except (DataFailed, OutOfMemory) as error:
                    if self.recovery.finished:  # an optimiser ran out of memory: some weights have changed
                        raise
                    self._read_figures()
                    kept = self._save_before(error)
                    # SIGTERM to all of a run ends the processes that load its data at once.
                    if isinstance(error, DataFailed) and self._asked_to_stop(asked):
                        self.report.say(f"stopped: {kept}")
                        return False
                    what = f"step {self.step + 1}: {error.what}"
                    raise type(error)(what, f"{error.fix}\n{kept}") from error
                self.step += 1
                stopping = self._asked_to_stop(asked)
                with record_function("report"):
                    self._after_step(figures, stopping)
                profiled()
                if stopping and self.step < last and not self.early.stopped:
                    self.report.stopped(self.resume_line)
                    return False
            # While the last step was saved, perhaps: the caller may have more to do than this run.
            self._asked_to_stop(asked)
        if self.config.early_stop:
            self.report.say(self.early.line(self.step))
        self._export()
        return True

    def train_step(self, batches: BatchPrefetcher) -> StepFigures:
        """Take one optimiser step: load, forward and backward, clip, optimiser (if all is finite), average.

        Nothing here waits for the device: the figures are read after the next step was begun (`_read_figures`).

        Raises:
            DataFailed, OutOfMemory: as of `Recovery.run`; or an optimiser ran out of memory.
        """
        step, rate = self.step + 1, learning_rate(self.step, self.config)
        # Loads; tries again in smaller parts when memory runs out; waits for other processes.
        sums = self.recovery.run(batches, step, self.forward_backward)
        with record_function("clip"):
            limit = self.config.max_grad_norm or math.inf
            norms = [
                whole(self.accelerator.clip_grad_norm_(module.trained.parameters(), limit))
                for module in self.modules
            ]
        figures = StepFigures(step, rate, sums, norms, self.recovery.losses, self.accelerator)
        batches.load()  # of the next step, while the device computes this one
        with memory_phase(self.phase):
            for module in self.modules:
                with record_function("optimizer"):
                    module.update(rate, skip=figures.bad)
                with record_function("average"):
                    module.update_averages(step)
        return figures

    def forward_backward(self, parts: Iterable[Part]) -> Values:
        """Leave the mean gradients over a step's samples in the modules; return values to log, on the device."""
        sums: Values = {}
        samples = self.config.gradient_accumulation_steps * self.config.train_batch_size
        for part in parts:
            parts_in_step = samples / len(part.batch["sample_ids"])
            batch = to_device(part.batch, self.accelerator.device)
            for module in self.modules:
                with nullcontext() if part.last else self.accelerator.no_sync(module.prepared):
                    with record_function("forward"):
                        result = module.prepared(batch)
                    if not result:
                        continue
                    with record_function("backward"):
                        self.accelerator.backward(result["loss"] / parts_in_step * part.counts)
                if part.counts:
                    self.recovery.remember(batch, result)
                    for name, value in result.items():
                        if isinstance(value, Tensor) and value.ndim == 0:
                            value = value.detach().double() / parts_in_step
                            sums[name] = sums[name] + value if name in sums else value
        return sums

    def _read_figures(self) -> None:
        """Read and report the last step whose figures are not read yet, if any; waits until the device has taken it."""
        figures, self.unread = self.unread, None
        if figures is None:
            return
        values, finite = figures.read()
        self._count_skipped(figures, values, finite)
        step, final = figures.step, figures.step == self.config.max_train_steps
        if math.isfinite(values["loss"]) and (step % self.config.log_steps == 0 or final or step == 1):
            self.report.metrics(step, step * self.order.global_batch, values, figures.seconds)
            for module in self.modules:
                watch = getattr(module.module, "watch", None)
                for line in watch(step, values) if watch else []:
                    self.report.say(line)
        self.report.step(step)

    def _count_skipped(self, figures: StepFigures, values: dict[str, float], finite: bool) -> None:
        """Report a step whose update was skipped; too many in a row end the run."""
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        suspects = gather_object(self.recovery.suspects(figures.losses))  # any process may have them
        culprits = f"; samples: {', '.join(suspects[:5])}" if suspects else "; no single sample is to blame"
        what = (
            f"step {figures.step}: the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}){culprits}"
        )
        self.report.say(f"WARNING: {what}. The update is skipped.")
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row were not finite. Last: {what}",
                f"The last good checkpoint is kept in {self.checkpoints}. Lower --learning-rate, use "
                "--mixed-precision no, or remove the samples named above; the same command then goes on from there.",
            )

    def _after_step(self, figures: StepFigures, stopping: bool) -> None:
        """Report the step before this one; validate, preview and save, as far as they are due."""
        step, config = self.step, self.config
        final = step == config.max_train_steps
        self.saver.poll()
        self._read_figures()  # of the step before, while the device computes this one
        self.unread, figures.seconds = figures, self.clock.seconds
        validating, previewing = (
            _due(step, every, final) and (final or self.clock.affords(kind, self.accelerator))
            for kind, every in (("validation", config.validation_steps), ("preview", config.preview_steps))
        )
        saving = _due(step, config.checkpointing_steps, final or stopping)
        if validating or previewing or saving:
            self._read_figures()  # of this step as well: what is kept must be known to be good
        if validating or previewing:
            self._gather_averages()
        if validating:
            self.validation_loss = None
            if self.main:
                with self.clock.interruption("validation"):
                    self.report.attempt("validate", step, self._validate)
            self.early.validated(step, self.validation_loss)
        if self.main and previewing:
            with self.clock.interruption("preview"):
                self.report.attempt("preview", step, self._preview)
        ending = final or stopping or self.early.stopped
        if _due(step, config.snapshot_steps, ending):
            self.snapshots.take(step)  # before a checkpoint, which has all before it
        if _due(step, config.checkpointing_steps, ending):
            together(lambda: self._save(now=ending))
        elif validating or previewing:
            self.accelerator.wait_for_everyone()

    # ---- parts ----

    def _asked_to_stop(self, asked: Stop) -> bool:
        """Return whether a signal came in any process of the run, and note which; all of them must call this."""
        self.stop.signal = most_of_any_process(self.accelerator, asked.signal)
        return self.stop.signal > 0

    def _begin_report(self, flops: float | None) -> None:
        self.report = Reporter(
            self.output,
            self.step,
            self.config.max_train_steps,
            samples_per_epoch=samples_per_epoch(self.data),
            report_to=self.config.report_to,
            active=self.main,
            full_rate=None if flops is None else full_rate(self.accelerator, self.config, flops),
            shown=self.shown,
            clock=self.clock,
        )

    def _validate(self) -> None:
        if self.callbacks.validate is not None:
            values = with_averages(self.modules, self.callbacks.validate)
            self.validation_loss = values.get("loss")
            self.report.validation(self.step, values)

    def _preview(self) -> None:
        if self.callbacks.preview is None:
            return
        image = with_averages(self.modules, self.callbacks.preview)
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        file = folder / f"step-{self.step:06d}.png"
        with replacing(file) as partial:
            image.save(partial, format="PNG")
        self.report.image(self.step, image)

    def _gather_averages(self) -> None:
        for module in self.modules:
            module.gather_averages()

    # ---- saving, resuming, the result ----

    def _state(self, random: checkpoint.State) -> checkpoint.State:
        state = {
            "step": self.step,
            "saved_at": time.time(),
            "description": self.description,
            "processes": self.accelerator.num_processes,
            "micro_batch": self.recovery.micro_batch,
            "scaler": scaler.state_dict() if (scaler := self.accelerator.scaler) is not None else None,
            "random": random,
            "shown": self.report.shown,
        }
        for module in self.modules:
            state |= module.state()
        return state | self.early.state()

    def _save(self, *, now: bool) -> None:
        if not (self.main or self.sharded):
            return
        state = self._state(checkpoint.random_state())
        if not now:
            self.saver.save(self.step, state)
            return
        try:
            self.saver.save_now(self.step, state)
        except RunError as error:
            raise RunError(
                f"step {self.step} is trained, but its {error.what}; {self.saver.last_good()}",
                f"{error.fix} Then the same line goes on from there.",
            ) from error

    def _save_before(self, error: RunError) -> str:
        """Save what the last finished step left; return what is kept of the run, and how it goes on."""
        for module in self.modules:
            module.trained.zero_grad()
        release_memory()
        kept = "Nothing was trained yet"
        # Only of data that failed do the other processes, which have their parts of the weights, know.
        if self.sharded and not isinstance(error, DataFailed):
            kept = f"No checkpoint could be written; {self.saver.last_good()}"
        elif (self.main or self.sharded) and self.step > 0:
            try:
                self.saver.save_now(self.step, self._state(self.recovery.random), retry=False)
                kept = f"Saved at step {self.step}"
            except Exception as second:  # the first error is the one to report
                kept = f"Step {self.step} could not be saved ({reason(second)})"
                if not (isinstance(second, RunError) or is_out_of_memory(second)):
                    self.report.say(traceback.format_exc())
        return kept + (f"; resume with:\n  {self.resume_line}" if self.resume_line else "")

    def _resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        state = checkpoint.load_latest(self.checkpoints, partial(tensor_for, self.modules))
        if state is None:
            return
        checkpoint.refuse_changes(
            self.output, state, self.description, self.config, self.accelerator.num_processes
        )
        self.snapshots.check(state)
        try:
            for module in self.modules:
                module.load(state)
            self.early.load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {self.output} does not fit the networks: {reason(error)}",
                "Use another output folder, or --init-from to start a new run from its weights.",
            ) from error
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpoint.restore_random_state(state["random"])
        self.step = int(state["step"])
        before, now = state.get("processes"), self.accelerator.num_processes
        if before not in (None, now):
            log.info(f"resumed on {now} processes (before: {before}); every step still has the same samples")
        if self.config.auto_micro_batch and state.get("micro_batch", math.inf) < self.recovery.micro_batch:
            self.recovery.micro_batch = int(state["micro_batch"])
            log.info(
                f"batches pass in parts of {self.recovery.micro_batch}: larger ones ran out of memory before"
            )
        self.shown = state.get("shown", {})

    def _export(self) -> None:
        self.early.take_best()
        self._gather_averages()
        together(self._export_by_main)

    def _export_by_main(self) -> None:
        export, folder = self.callbacks.export, self.callbacks.export_to
        if self.main and export is not None and folder is not None:
            averaged = partial(with_averages, self.modules)
            export_once(self.checkpoints, folder, lambda place: averaged(partial(export, place)))

    def _clean_up(self) -> None:
        """Remove what a killed run left half-written; only here, where nobody else writes."""
        folder = self.callbacks.export_to
        places = [(place, checkpoint.CHECKPOINT_NAME) for place in (self.checkpoints, self.snapshots.folder)]
        places += [(folder.parent, re.escape(folder.name))] if folder is not None else []
        for parent, name in places if self.main else ():
            for path in clean_up(parent, name):
                log.info(f"removed {path}, left by a run that was killed while writing it")
        self.accelerator.wait_for_everyone()  # before anybody looks for checkpoints


def _due(step: int, every: int, final: bool) -> bool:
    return every > 0 and (step % every == 0 or final)
