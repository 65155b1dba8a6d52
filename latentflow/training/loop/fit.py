"""The one training loop. What is trained differs by the modules handed to it: each turns a batch into its loss."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object, patch_environment
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ...config import LoopConfig
from ...errors import RunError, UserError, reason
from ...utils.memory import OutOfMemory, is_out_of_memory, memory_phase, out_of_memory, release_memory
from . import checkpoint
from .callbacks import Callbacks, with_averages
from .data_order import DataOrder
from .distributed import compute_dtype, most_of_any_process, process_state, resolve, together, whole
from .early_stop import EarlyStop, refuse_unvalidated
from .ema_snapshots import Snapshots
from .folders import begin_folder, clean_up, finish_folder
from .gradients import Gradients
from .loader import DataFailed, TrainingData, groups_of, load_batches, second_of
from .logging import Reporter
from .optimizers import learning_rate
from .profiling import matrix_product_rate, profiler
from .run_folder import run_lock
from .saving import Saver, attempts, writing
from .signals import Stop, stop_on_signal
from .trained_module import Player

log = logging.getLogger(__name__)


def fit(
    players: Mapping[str, nn.Module],
    data: TrainingData,
    config: LoopConfig,
    output: str | Path,
    *,
    callbacks: Callbacks | None = None,
    description: Mapping[str, Any] | None = None,
    resume_line: str = "",
    phase: str = "train",
    flops: float | None = None,
    partly: bool = False,
    stop: Stop | None = None,
) -> bool:
    """Train modules until ``config.max_train_steps``, resuming from the newest checkpoint in ``output``.

    Args:
        players: name -> module. Each step, in this order, every module is called with the batch and returns
            ``{"loss": scalar mean over the batch, ...}``; further scalars are logged. It may return ``per_sample``
            (B,) and ``t`` (B,), which name the culprits of a non-finite loss, or ``{}`` to sit a step out.
        data: the samples; which are used when depends only on ``config.seed`` and the step.
        config: settings.
        output: the run folder.
        callbacks: validation, previews and export.
        description: what must not change between resumed runs (architecture, data), as nested dicts of plain values.
        resume_line: the command that resumes this run, printed when it stops before its end.
        phase: what to call the training when memory runs out; a key of `latentflow.utils.memory.ADVICE`.
        flops: of a sample, forward and backward; with them the model FLOPs utilisation is reported: the share of the
            machine's rate of matrix products that goes into the model (Chowdhery et al. 2022, arXiv:2204.02311,
            appendix B).
        partly: whether a pass may leave parameters out, so that several processes must look for those that it uses.
        stop: is told which signal stopped the run, or came during its last step.

    Returns:
        True when the run is finished, False when SIGINT, SIGTERM or SIGHUP stopped it before (after saving): a program
        then exits with ``stop.status``.

    Raises:
        UserError: the checkpoint does not fit the description, another run uses the folder, or the loss stayed
            non-finite.
        RunError: memory, the disk or the data gave out. What could be saved is saved.
    """
    with run_lock(output):
        loop = _Loop(
            players,
            data,
            config,
            Path(output),
            callbacks or Callbacks(),
            dict(description or {}),
            phase,
            flops,
            partly,
            stop or Stop(),
        )
        return loop.run(resume_line)


class _Loop:
    def __init__(
        self,
        players: Mapping[str, nn.Module],
        data: TrainingData,
        config: LoopConfig,
        output: Path,
        callbacks: Callbacks,
        description: dict[str, Any],
        phase: str,
        flops: float | None,
        partly: bool,
        stop: Stop,
    ) -> None:
        self.config, self.data, self.output, self.callbacks = config, data, output, callbacks
        self.stop = stop
        self.accelerator = _accelerator(config, partly)
        self.main = self.accelerator.is_main_process
        self.players = [Player(name, one, config, self.accelerator) for name, one in players.items()]
        self.sharded = any(player.sharded for player in self.players)
        refuse_unvalidated(config, callbacks.validate is not None)
        self.early = EarlyStop(config.early_stop, self.players, self.accelerator)
        second, second_share = second_of(data)
        self.order = DataOrder(
            size=len(data),
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            seed=config.seed,
            groups=groups_of(data),
            second=second,
            second_share=second_share,
        )
        # As it comes back from a checkpoint.
        self.description = json.loads(json.dumps({"batch": self.order.global_batch} | description))
        self.step = 0
        self.skipped_in_a_row = 0
        self._validated: float | None = None  # the loss of the running step's validation
        self._shown: dict[str, float] = {}  # in the progress line, before a resume
        self.phase, self.flops = phase, flops
        self.snapshots = Snapshots(output, self.players, config, main=self.main)
        self.gradients = Gradients(self.players, data, config, self.accelerator, phase)

    # ---- the run, top to bottom ----

    def run(self, resume_line: str) -> bool:
        self.resume_line = resume_line
        self._clean_up()
        together(self._resume)
        last = self.config.max_train_steps
        self.saver = Saver(
            self.output / "checkpoints", self.config.checkpoints_total_limit, sharded=self.sharded
        )
        self.saver.saved = self.step
        together(self._begin_report)
        try:
            if self.step < last and not self.early.stopped:
                self.snapshots.begin(self.step)
                return self._train(last)
            if self.early.stopped:
                self.report.say(
                    f"{self.early.line(self.step)}: nothing to do (a higher --early-stop goes on)"
                )
            else:
                self.report.say(
                    f"step {last}, the target, is already reached in {self.output}: nothing to do (a higher target "
                    "goes on)"
                )
            self._export()  # if the run was killed before it was complete
            return True
        finally:
            try:
                self.saver.close()
                self.snapshots.close()
            finally:
                self.report.close()

    def _train(self, last: int) -> bool:
        batches = load_batches(
            self.data,
            self.order.batches(self.step, last, self.accelerator.process_index),
            num_workers=self.config.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with stop_on_signal() as asked, self._profiler() as profiled:
            while self.step < last and not self.early.stopped:
                try:
                    computed = self.gradients.compute(batches, self.step + 1)
                except (DataFailed, OutOfMemory) as error:  # no weight has changed in this step
                    kept = self._kept_before(error)
                    # SIGTERM to all of a run ends the processes that load its data at once.
                    if isinstance(error, DataFailed) and self._asked_to_stop(asked):
                        self.report.say(f"stopped: {kept}")
                        return False
                    what = f"step {self.step + 1}: {error.what}"
                    raise type(error)(what, f"{error.fix}\n{kept}") from error
                values = self._update(computed)
                self.step += 1
                stopping = self._asked_to_stop(asked)
                with record_function("report"):
                    self._after_step(values, stopping)
                profiled()
                if stopping and self.step < last and not self.early.stopped:
                    self.report.say(f"stopped at step {self.step}, saved; resume with:\n  {self.resume_line}")
                    return False
            # While the last step was saved, perhaps: the caller may have more to do than this run.
            self._asked_to_stop(asked)
        if self.config.early_stop:
            self.report.say(self.early.line(self.step))
        self._export()
        return True

    def _update(self, computed: dict[str, Tensor]) -> dict[str, float]:
        rate = learning_rate(self.step, self.config)
        with record_function("clip"):
            norms = [self._clip(player) for player in self.players]
        values, read_norms = self._read(computed, norms)
        values |= {"lr": rate, "grad_norm": read_norms[0]}
        # fp16: the scaler deals with overflowing gradients itself.
        scaled = self.accelerator.scaler is not None
        finite = math.isfinite(values["loss"]) and (scaled or all(map(math.isfinite, read_norms)))
        if finite:
            self.skipped_in_a_row = 0
        else:
            self._skip(values)
        with memory_phase(self.phase):
            for player in self.players:
                player.update(self.step + 1, rate, skip=not finite)
        return values

    def _after_step(self, values: dict[str, float], stopping: bool) -> None:
        step, config = self.step, self.config
        final = step == config.max_train_steps
        self.report.step(self.order.global_batch)
        self.saver.poll()
        if math.isfinite(values["loss"]) and (step % config.log_steps == 0 or final or step == 1):
            self.report.metrics(step, step * self.order.global_batch, values)
        validating, previewing = (
            _due(step, every, final) for every in (config.validation_steps, config.preview_steps)
        )
        if validating or previewing:
            self._gather_averages()
        if validating:
            self._validated = None
            if self.main:
                self._attempt("validate", self._validate)
            self.early.validated(step, self._validated)
        if self.main and previewing:
            self._attempt("preview", self._preview)
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

    def _begin_report(self) -> None:
        self.report = Reporter(
            self.output,
            self.step,
            self.config.max_train_steps,
            samples_per_epoch=len(self.data),
            report_to=self.config.report_to,
            active=self.main,
            full_rate=self._full_rate() if self.main else None,
            shown=self._shown,
        )

    def _profiler(self) -> AbstractContextManager[Callable[[], None]]:
        if self.config.profile and self.main:
            return profiler(self.output / "profile", self.report.say)
        return nullcontext(lambda: None)

    def _full_rate(self) -> float | None:
        """Samples per second if all devices did nothing but multiply matrices."""
        if self.flops is None:
            return None
        device = self.accelerator.device
        rate = matrix_product_rate(device, compute_dtype(self.config.mixed_precision, device))
        return float(rate * self.accelerator.num_processes / self.flops)

    def _read(self, computed: dict[str, Tensor], norms: list[Tensor]) -> tuple[dict[str, float], list[float]]:
        """The step's values, their mean over the processes, and norms: read at once, as that waits for the device."""
        device = self.accelerator.device
        values = torch.stack([one.double().to(device) for one in computed.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        # The norm of no gradients at all (a player that sits out) is on the CPU.
        numbers = torch.cat([values, torch.stack([one.to(values) for one in norms])]).tolist()
        return dict(zip(computed, numbers, strict=False)), numbers[len(computed) :]

    def _clip(self, player: Player) -> Tensor:
        limit = self.config.max_grad_norm or math.inf
        return whole(self.accelerator.clip_grad_norm_(player.trained.parameters(), limit))

    def _skip(self, values: dict[str, float]) -> None:
        self.skipped_in_a_row += 1
        suspects = gather_object(self.gradients.suspects())  # any process may have them
        culprits = f"; samples: {', '.join(suspects[:5])}" if suspects else "; no single sample is to blame"
        what = (
            f"step {self.step + 1}: the loss or its gradient is not finite (loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}){culprits}"
        )
        self.report.say(f"WARNING: {what}. The update is skipped.")
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row were not finite. Last: {what}",
                f"The last good checkpoint is kept in {self.output / 'checkpoints'}. Lower --learning-rate, use "
                "--mixed-precision no, or remove the samples named above; the same command then goes on from there.",
            )

    def _validate(self) -> None:
        if self.callbacks.validate is not None:
            values = with_averages(self.players, self.callbacks.validate)
            self._validated = values.get("loss")
            self.report.validation(self.step, values)

    def _preview(self) -> None:
        if self.callbacks.preview is None:
            return
        image = with_averages(self.players, self.callbacks.preview)
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        file = folder / f"step-{self.step:06d}.png"
        half = file.with_name(f".{file.name}")
        try:
            image.save(half, format="PNG")
            half.replace(file)
        finally:
            half.unlink(missing_ok=True)
        self.report.image(self.step, image)

    def _attempt(self, phase: str, function: Callable[[], None]) -> None:
        """Call what training can do without: a failure is a warning, with its traceback where it is a defect."""
        defect = None
        try:
            function()
            return
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            if is_out_of_memory(error):
                why = str(out_of_memory(phase, error))
            elif not isinstance(error, UserError | OSError):
                defect = traceback.format_exc()
        release_memory()
        self.report.say(
            f"WARNING: step {self.step}: could not {phase}: {why}\nTraining goes on; the next time is the next try."
        )
        if defect is not None:
            self.report.say(defect)

    def _gather_averages(self) -> None:
        for player in self.players:
            player.gather_averages()

    # ---- when something gives out ----

    def _kept_before(self, error: RunError) -> str:
        """Save what the last finished step left; say what is kept of the run, and how it goes on."""
        for player in self.players:
            player.forget_gradients()
        release_memory()
        kept = "Nothing was trained yet"
        # Only of data that failed do the other processes, which have their parts of the weights, know.
        if self.sharded and not isinstance(error, DataFailed):
            newest = self.saver.newest()
            kept = kept if newest is None else f"The last checkpoint is step-{newest:06d}"
        elif (self.main or self.sharded) and self.step > 0:
            try:
                self.saver.save_now(self.step, self._state(self.gradients.random), retry=False)
                kept = f"Saved at step {self.step}"
            except Exception as second:  # the first one is what has to be told
                kept = f"Step {self.step} could not be saved ({reason(second)})"
                if not (isinstance(second, RunError) or is_out_of_memory(second)):
                    self.report.say(traceback.format_exc())
        return kept + (f"; resume with:\n  {self.resume_line}" if self.resume_line else "")

    # ---- saving and resuming ----

    def _state(self, random: checkpoint.State) -> checkpoint.State:
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "saved_at": time.time(),
            "description": self.description,
            "processes": self.accelerator.num_processes,
            "micro_batch": self.gradients.micro_batch,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random,
            "shown": self.report.shown,
        }
        for player in self.players:
            state |= player.state()
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
            newest = self.saver.newest()
            kept = (
                "there is no earlier checkpoint"
                if newest is None
                else f"the last good one is step-{newest:06d}"
            )
            raise RunError(
                f"step {self.step} is trained, but its {error.what}; {kept}",
                f"{error.fix} Then the same line goes on from there.",
            ) from error

    def _export(self) -> None:
        self.early.take_best()
        self._gather_averages()
        together(self._export_by_main)

    def _export_by_main(self) -> None:
        export, folder = self.callbacks.export, self.callbacks.export_to
        if self.main and export is not None and folder is not None:
            # Beside the weights that it was made of: an export of an earlier target is made again.
            done = checkpoint.list_checkpoints(self.output / "checkpoints")[-1] / "exported"
            if not (done.exists() and folder.exists()):
                try:
                    attempts(lambda: self._export_to(folder, export, done))
                except RunError as error:
                    rest = "The checkpoint is complete: the same line makes the rest."
                    raise type(error)(error.what, f"{error.fix} {rest}") from error

    def _export_to(self, folder: Path, export: Callable[[Path], None], done: Path) -> None:
        what = f"the result {folder}"
        with writing(what, folder):
            temporary = begin_folder(folder)
        try:  # what this raises is the caller's own, and no failure of the disk
            with_averages(self.players, lambda: export(temporary))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with writing(what, folder):
            finish_folder(folder)
            done.touch()

    def _clean_up(self) -> None:
        """Remove what a killed run left half-written; only here, where nobody else writes."""
        folder = self.callbacks.export_to
        places = [
            (one, checkpoint.CHECKPOINT_NAME) for one in (self.output / "checkpoints", self.snapshots.folder)
        ]
        places += [(folder.parent, re.escape(folder.name))] if folder is not None else []
        for parent, name in places if self.main else ():
            for path in clean_up(parent, name):
                log.info(f"removed {path}, left by a run that was killed while writing it")
        self.accelerator.wait_for_everyone()  # before anybody looks for checkpoints

    def _resume(self) -> None:
        state = checkpoint.load_latest(self.output / "checkpoints", self._place)
        if state is None:
            return
        self._check_same(state)
        self.snapshots.check(state)
        try:
            for player in self.players:
                player.load(state)
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
        self._shown = state.get("shown", {})
        before, now = state.get("processes"), self.accelerator.num_processes
        if before not in (None, now):
            log.info(
                f"resumed by {now} processes ({before} before): every step has the same samples as it would have"
            )
        if (
            self.config.auto_micro_batch
            and state.get("micro_batch", self.gradients.micro_batch) < self.gradients.micro_batch
        ):
            self.gradients.micro_batch = int(state["micro_batch"])
            log.info(f"forward passes of {self.gradients.micro_batch}: more ran out of memory before")

    def _place(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Where to read a tensor of a checkpoint to: of what is sharded, a process reads its part."""
        for player in self.players:
            parameter = player.parameter_of(name)
            if isinstance(parameter, DTensor) and parameter.shape == shape:
                return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    def _changes(self, before: dict[str, Any]) -> Iterator[str]:
        now, order = self.description, "data_order"
        if order not in before and order in now:  # a run of before says none
            before = before | {order: now[order]}
        for line in checkpoint.difference(before, now):
            if not line.startswith(f"{order}: "):
                yield line
            elif before.get("data") == now.get("data"):  # else that line says enough
                yield (
                    f"{order}: the same images in another order (files were renamed or moved), so that each step "
                    "would use others than it would have"
                )

    def _check_same(self, state: checkpoint.State) -> None:
        before = state["description"]
        # A finished stage: nothing is left of which the batch could change anything.
        if state["step"] >= self.config.max_train_steps:
            before = before | {"batch": self.description["batch"]}
        changes = list(self._changes(before))
        if not changes or self.config.allow_changes:
            return
        fix = "Use another output folder, undo the changes, or pass --allow-changes to go on all the same."
        batch = before.get("batch")
        if batch != self.description["batch"]:
            fix += (
                f" A step has train-batch-size x gradient-accumulation-steps x processes samples: here that must be "
                f"{batch}, over {self.accelerator.num_processes} processes."
            )
        raise UserError(
            f"the run in {self.output} (step {state['step']}) was made with other settings:\n  "
            + "\n  ".join(changes[:12]),
            fix,
        )


def _accelerator(config: LoopConfig, partly: bool) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "--mixed-precision fp16 needs a GPU", "Leave it out: auto takes the fastest there is."
        )
    # `process_state` comes before accelerate makes a state of its own.
    precision = resolve(config.mixed_precision, process_state().device)
    AcceleratorState._reset_state()  # a process may train an autoencoder and then a flow with other settings
    kwargs = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=partly
    )
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `LoopConfig.shard` decides; see sharding.py
        return Accelerator(mixed_precision=precision, kwargs_handlers=[kwargs])


def _due(step: int, every: int, final: bool) -> bool:
    return every > 0 and (step % every == 0 or final)
