"""The one training loop. What is trained differs by the modules handed to it: each turns a batch into its loss."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UserError
from . import checkpoint
from .config import LoopConfig
from .ema import WeightAverage
from .optimizers import learning_rate, make_optimizers
from .order import DataOrder, Draw
from .precision import resolve
from .processes import process_state
from .report import Reporter

Batch = dict[str, Any]


class TrainingData(Protocol):
    """What the loop needs of a data set."""

    def __len__(self) -> int: ...

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """A batch for these draws: tensors with B rows; the loop adds ``numbers``, the draws' running numbers."""

    def name(self, index: int) -> str:
        """What to call a sample in a message, such as its file name."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the loop calls, always with the averaged weights in place and on the main process only.

    ``export`` fills a folder that becomes ``export_to``, at the end of the run.
    """

    validate: Callable[[], dict[str, float]] | None = None
    preview: Callable[[], Image.Image] | None = None
    export: Callable[[Path], None] | None = None
    export_to: Path | None = None


class _Player:
    """A module with its optimisers and its weight average. Most runs have one, an adversarial run two."""

    def __init__(self, name: str, module: nn.Module, config: LoopConfig, accelerator: Accelerator) -> None:
        self.name = name
        self.module = module.to(accelerator.device)
        self.average = WeightAverage(self.module, config.ema_decay)
        optimizers = make_optimizers(self.module, config)
        self.prepared: nn.Module = accelerator.prepare_model(self.module)
        self.optimizers = [accelerator.prepare_optimizer(one) for one in optimizers]

    def state(self) -> dict[str, Any]:
        return {
            f"{self.name}-weights": self.module.state_dict(),
            f"{self.name}-average": self.average.averages,
            f"{self.name}-optimizer": [one.optimizer.state_dict() for one in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state[f"{self.name}-weights"])
        self.average.load(state[f"{self.name}-average"])
        for optimizer, one in zip(self.optimizers, state[f"{self.name}-optimizer"], strict=True):
            optimizer.optimizer.load_state_dict(one)


def fit(
    players: Mapping[str, nn.Module],
    data: TrainingData,
    config: LoopConfig,
    output: str | Path,
    *,
    callbacks: Callbacks | None = None,
    description: Mapping[str, Any] | None = None,
    resume_line: str = "",
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
        resume_line: the command that resumes this run, printed when a signal stops it.

    Returns:
        True when the target step is reached, False when a signal stopped the run (after saving).

    Raises:
        UserError: the checkpoint does not fit the description, or the loss stayed non-finite.
    """
    Path(output).mkdir(parents=True, exist_ok=True)
    loop = _Loop(players, data, config, Path(output), callbacks or Callbacks(), dict(description or {}))
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
    ) -> None:
        self.config, self.data, self.output, self.callbacks = config, data, output, callbacks
        self.description = json.loads(json.dumps(description))  # as it comes back from a checkpoint
        self.accelerator = _accelerator(config)
        self.main = self.accelerator.is_main_process
        self.players = [_Player(name, one, config, self.accelerator) for name, one in players.items()]
        self.order = DataOrder(
            size=len(data),
            batch_size=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            processes=self.accelerator.num_processes,
            seed=config.seed,
        )
        self.step = 0
        self.skipped_in_a_row = 0

    # ---- the run, top to bottom ----

    def run(self, resume_line: str) -> bool:
        self._resume()
        last = self.config.max_train_steps
        self.report = Reporter(
            self.output,
            self.step,
            last,
            samples_per_epoch=len(self.data),
            report_to=self.config.report_to,
            active=self.main,
        )
        if self.step >= last:
            self.report.say(
                f"step {last}, the target, is already reached in {self.output}: nothing to do (a higher target goes on)"
            )
            self.report.close()
            if self.callbacks.export_to is not None and not self.callbacks.export_to.exists():
                self._export()  # the run was killed after its last checkpoint
            return True
        batches = self._batches(last)
        try:
            with _stop_on_signal() as stop:
                while self.step < last:
                    values = self._train_step(batches)
                    self.step += 1
                    stopping = self._agree(stop.requested)
                    self._after_step(values, stopping)
                    if stopping and self.step < last:
                        self.report.say(f"stopped at step {self.step}, saved; resume with:\n  {resume_line}")
                        return False
            self._export()
            return True
        finally:
            self.report.close()

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        rate = learning_rate(self.step, self.config)
        values: dict[str, float] = {}
        suspects: list[str] = []
        micro_steps = self.config.gradient_accumulation_steps
        for micro in range(micro_steps):
            batch = to_device(next(batches), self.accelerator.device)
            for player in self.players:
                with ExitStack() as stack:
                    if micro < micro_steps - 1:
                        stack.enter_context(self.accelerator.no_sync(player.prepared))
                    result = player.prepared(batch)
                    if not result:
                        continue
                    self.accelerator.backward(result["loss"] / micro_steps)
                _accumulate(values, result, micro_steps)
                suspects += self._nonfinite_samples(batch, result)
        values = self._mean_over_processes(values)
        norms = [self._clip(player) for player in self.players]
        values |= {"lr": rate, "grad_norm": norms[0]}
        scaled = (
            self.accelerator.scaler is not None
        )  # fp16: the scaler deals with overflowing gradients itself
        finite = math.isfinite(values["loss"]) and (scaled or all(map(math.isfinite, norms)))
        if finite:
            self.skipped_in_a_row = 0
        else:
            self._skip(suspects, values)
        for player in self.players:
            for optimizer in player.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                if finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            player.average.update(self.step + 1)
        return values

    def _after_step(self, values: dict[str, float], stopping: bool) -> None:
        step, config = self.step, self.config
        final = step == config.max_train_steps
        self.report.step(self.order.global_batch)
        if math.isfinite(values["loss"]) and (step % config.log_steps == 0 or final or step == 1):
            self.report.metrics(step, step * self.order.global_batch, values)
        if self.main and self.callbacks.validate and _due(step, config.validation_steps, final):
            self.report.validation(step, self._call(self.callbacks.validate))
        if self.main and self.callbacks.preview and _due(step, config.preview_steps, final):
            self._preview(step)
        if _due(step, config.checkpointing_steps, final) or stopping:
            self._save()
        self.accelerator.wait_for_everyone()

    # ---- parts ----

    def _batches(self, last: int) -> Iterator[Batch]:
        draws = self.order.batches(self.step, last, self.accelerator.process_index)
        numbered: Any = _Numbered(self.data)
        sampler: Any = draws  # an iterator of lists of draws is all that the loader needs
        collate: Any = _identity
        loader: DataLoader[Batch] = DataLoader(
            numbered,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.config.num_workers,
            # Its own seed must not be drawn from the run's random state.
            generator=torch.Generator(),
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(loader)

    def _clip(self, player: _Player) -> float:
        limit = self.config.max_grad_norm or math.inf
        return float(self.accelerator.clip_grad_norm_(player.module.parameters(), limit))

    def _nonfinite_samples(self, batch: Batch, result: Batch) -> list[str]:
        if "per_sample" not in result or torch.isfinite(result["loss"]):
            return []
        bad = (~torch.isfinite(result["per_sample"])).nonzero().flatten().tolist()
        times = result.get("t")
        return [
            self.data.name(int(batch["index"][row]))
            + (f" (t = {float(times[row]):.4f})" if times is not None else "")
            for row in bad
        ]

    def _skip(self, suspects: list[str], values: dict[str, float]) -> None:
        self.skipped_in_a_row += 1
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

    def _mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return values
        stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        mean = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(values, mean.tolist(), strict=True))

    def _agree(self, stop: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    def _preview(self, step: int) -> None:
        image = self._call(self.callbacks.preview)
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step-{step:06d}.png")
        self.report.picture(step, image)

    def _export(self) -> None:
        export, folder = self.callbacks.export, self.callbacks.export_to
        if export is not None and folder is not None:
            self._call(lambda: checkpoint.write_folder(folder, export))
        self.accelerator.wait_for_everyone()

    def _call(self, function: Callable[[], Any] | None) -> Any:
        """Call with averaged weights, in evaluation mode, without gradients; the run's random state is kept."""
        if function is None or not self.main:
            return None
        modes = [(module, module.training) for player in self.players for module in player.module.modules()]
        for module, _ in modes:
            module.training = False
        try:
            with self._averaged(), torch.random.fork_rng(), torch.no_grad():
                return function()
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with ExitStack() as stack:
            for player in self.players:
                stack.enter_context(player.average.applied())
            yield

    # ---- saving and resuming ----

    def _save(self) -> None:
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "saved_at": time.time(),
                "description": self.description,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "random": checkpoint.random_state(),
            }
            for player in self.players:
                state |= player.state()
            folder = self.output / "checkpoints" / f"step-{self.step:06d}"
            checkpoint.save_checkpoint(folder, state, total_limit=self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = checkpoint.load_latest(self.output / "checkpoints")
        if state is None:
            return
        changes = list(checkpoint.difference(state["description"], self.description))
        if changes and not self.config.allow_changes:
            raise UserError(
                f"the run in {self.output} (step {state['step']}) was made with other settings:\n  "
                + "\n  ".join(changes[:12]),
                "Use another output folder, undo the changes, or pass --allow-changes to go on all the same.",
            )
        try:
            for player in self.players:
                player.load(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {self.output} does not fit the networks: {str(error).splitlines()[0]}",
                "Use another output folder, or --init-from to start a new run from its weights.",
            ) from error
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        checkpoint.restore_random_state(state["random"])
        self.step = int(state["step"])


class _Numbered:
    """The data set with what identifies its rows added to every batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        batch = self._data.__getitems__(draws)
        numbers = {"index": [draw.index for draw in draws], "numbers": [draw.number for draw in draws]}
        return batch | numbers


class _Stop:
    requested = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask the loop to finish its step and save; a second SIGINT interrupts at once."""
    stop = _Stop()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _accelerator(config: LoopConfig) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "--mixed-precision fp16 needs a GPU", "Leave it out: auto takes the fastest there is."
        )
    precision = resolve(
        config.mixed_precision, process_state().device
    )  # and before accelerate makes its own state
    AcceleratorState._reset_state()  # a process may train an autoencoder and then a flow with other settings
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=precision, kwargs_handlers=[kwargs])


def _due(step: int, every: int, final: bool) -> bool:
    return every > 0 and (step % every == 0 or final)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _accumulate(values: dict[str, float], result: Batch, micro_steps: int) -> None:
    for name, value in result.items():
        if isinstance(value, Tensor) and value.ndim == 0:
            values[name] = values.get(name, 0.0) + float(value.detach()) / micro_steps


def _identity(batch: Batch) -> Batch:
    return batch
