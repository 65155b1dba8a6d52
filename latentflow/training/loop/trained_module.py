"""What one module needs in the loop: its optimisers, its weight average, and their state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from ...config import LoopConfig
from ...errors import UserError
from .distributed import is_sharded, sharded, whole
from .ema import WeightAverage, power_function, warmed_up
from .optimizers import evaluated_weights, make_optimizers


class Player:
    """A module with its optimisers and its weight average. Most runs have one, an adversarial run two.

    A module with a true ``learns_from_average`` is given its average (``use_average``), to call while it is applied.

    Attributes:
        module: the module as the loop got it, and callbacks see it.
        trained: what is trained: the same, or in a sharded run its sharded copy.
        prepared: `trained` as the loop calls it.
    """

    def __init__(self, name: str, module: nn.Module, config: LoopConfig, accelerator: Accelerator) -> None:
        self.name, self.module = name, module
        self.sharded = is_sharded(config, accelerator)
        if self.sharded and getattr(module, "learns_from_average", False):
            raise UserError(
                "--alignment self cannot be used with --shard: no process holds the averaged network",
                "Leave out one of the two; --alignment encoder can be sharded.",
            )
        self._device, self._main = accelerator.device, accelerator.is_main_process
        if self.sharded:
            self.trained = sharded(
                module, accelerator.device, accelerator.num_processes, compiled=config.compile
            )
        else:
            self.trained = module.to(accelerator.device)
        # Schedule-free's x is an average by itself: with a decay of 0 this one is x.
        decay = 0.0 if config.optimizer == "schedule-free" else config.ema_decay
        self.average = WeightAverage(self.trained, warmed_up(decay))
        self._tracked = {
            f"{name}-average-{length:g}": WeightAverage(self.trained, power_function(length))
            for length in config.ema_lengths
        }
        if getattr(module, "learns_from_average", False):
            module.use_average(self.average)  # type: ignore[operator]
        optimizers = make_optimizers(self.trained, config)
        # Evaluation mode: autocast only, without averaging gradients over the processes, which FSDP2 does itself.
        self.prepared: nn.Module = accelerator.prepare_model(
            self.trained, device_placement=not self.sharded, evaluation_mode=self.sharded
        )
        self.optimizers = [accelerator.prepare_optimizer(one) for one in optimizers]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, live: not a copy."""
        return {
            f"{self.name}-weights": self.trained.state_dict(),
            f"{self.name}-average": self.average.averages,
            f"{self.name}-optimizer": [one.optimizer.state_dict() for one in self.optimizers],
            **self.tracked(),
        }

    def tracked(self) -> dict[str, dict[str, Tensor]]:
        """The power-function averages by their names in a checkpoint, live: not a copy."""
        return {name: one.averages for name, one in self._tracked.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.trained.load_state_dict(state[f"{self.name}-weights"])
        self.average.load(state[f"{self.name}-average"])
        for name, average in self._tracked.items():
            average.load(state[name])
        for optimizer, one in zip(self.optimizers, state[f"{self.name}-optimizer"], strict=True):
            optimizer.optimizer.load_state_dict(one)
            _lay_out_as_parameters(optimizer.optimizer)
            optimizer.train()  # schedule-free's, if it was saved in its other mode

    def parameter_of(self, key: str) -> Tensor | None:
        """The parameter that a tensor of `state` belongs to, by its name in a checkpoint; None if to none."""
        part, *path = key.split("/")
        weights = (f"{self.name}-weights", f"{self.name}-average", f"{self.name}-best", *self._tracked)
        if part in weights:
            return dict(self.trained.named_parameters(remove_duplicate=False)).get("/".join(path))
        # <optimiser>/state/<parameter>/exp_avg
        if part == f"{self.name}-optimizer" and path[1:2] == ["state"]:
            with suppress(IndexError):  # of another optimiser: `load` refuses it in words
                groups = self.optimizers[int(path[0])].param_groups
                parameter: Tensor = [one for group in groups for one in group["params"]][int(path[2])]
                return parameter
        return None

    @torch.no_grad()
    def gather_averages(self) -> None:
        """In a sharded run, give the averaged weights to the main process's `module`. All processes must call it."""
        if not self.sharded:
            return
        target, averages = self.module.state_dict(), self.average.averages
        rest = {name: one for name, one in self.trained.state_dict().items() if name not in averages}
        for name, one in (*rest.items(), *averages.items()):  # averages last: tied weights have a second name
            value = whole(one)
            if self._main:
                target[name].copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context `module` has the averaged weights, in a sharded run as of `gather_averages`."""
        if not self.sharded:
            with self.average.applied():
                yield
            return
        try:
            self.module.to(self._device)
            yield
        finally:
            self.module.cpu()  # training needs the room

    def update(self, step: int, rate: float, *, skip: bool) -> None:
        """Step ``step`` (1-based): the optimisers, unless ``skip``, at learning rate ``rate``; and the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            with record_function("optimizer"):
                # One that sat the step out has no gradients, and float16's scaler refuses to step without.
                if not skip and any(
                    one.grad is not None for group in optimizer.param_groups for one in group["params"]
                ):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        with record_function("average"):
            weights = evaluated_weights(one.optimizer for one in self.optimizers)
            for average in (self.average, *self._tracked.values()):
                average.update(step, weights)

    def forget_gradients(self) -> None:
        """Drop what backward passes have left so far."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out in memory as their parameters are, such as channels last.

    A file holds them row by row, and sums over another layout round otherwise: a resumed run would drift away.
    """
    for parameter, state in optimizer.state.items():
        for name, one in state.items():
            if (
                isinstance(one, Tensor)
                and one.shape == parameter.shape
                and one.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=one.dtype).copy_(one)
