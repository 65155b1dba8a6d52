"""What one module needs in the loop: its optimisers, its weight average, and their state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from .config import LoopConfig
from .ema import WeightAverage
from .optimizers import make_optimizers
from .sharding import is_sharded, sharded, whole


class Player:
    """A module with its optimisers and its weight average. Most runs have one, an adversarial run two.

    Attributes:
        module: the module as the loop got it, and callbacks see it.
        trained: what is trained: the same, or in a sharded run its sharded copy.
        prepared: `trained` as the loop calls it.
    """

    def __init__(self, name: str, module: nn.Module, config: LoopConfig, accelerator: Accelerator) -> None:
        self.name, self.module = name, module
        self.sharded = is_sharded(config, accelerator)
        self._device, self._main = accelerator.device, accelerator.is_main_process
        if self.sharded:
            self.trained = sharded(
                module, accelerator.device, accelerator.num_processes, compiled=config.compile
            )
        else:
            self.trained = module.to(accelerator.device)
        self.average = WeightAverage(self.trained, config.ema_decay)
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
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.trained.load_state_dict(state[f"{self.name}-weights"])
        self.average.load(state[f"{self.name}-average"])
        for optimizer, one in zip(self.optimizers, state[f"{self.name}-optimizer"], strict=True):
            optimizer.optimizer.load_state_dict(one)

    def parameter_of(self, key: str) -> Tensor | None:
        """The parameter that a tensor of `state` belongs to, by its name in a checkpoint; None if to none."""
        part, *path = key.split("/")
        if part in (f"{self.name}-weights", f"{self.name}-average"):
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
                group["lr"] = rate
            with record_function("optimizer"):
                if not skip:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        with record_function("average"):
            self.average.update(step)

    def forget_gradients(self) -> None:
        """Drop what backward passes have left so far."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
