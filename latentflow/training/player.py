"""What one module needs in the loop: its optimisers, its weight average, and their state."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from .config import LoopConfig
from .ema import WeightAverage
from .optimizers import make_optimizers


class Player:
    """A module with its optimisers and its weight average. Most runs have one, an adversarial run two."""

    def __init__(self, name: str, module: nn.Module, config: LoopConfig, accelerator: Accelerator) -> None:
        self.name = name
        self.module = module.to(accelerator.device)
        self.average = WeightAverage(self.module, config.ema_decay)
        optimizers = make_optimizers(self.module, config)
        self.prepared: nn.Module = accelerator.prepare_model(self.module)
        self.optimizers = [accelerator.prepare_optimizer(one) for one in optimizers]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, live: not a copy."""
        return {
            f"{self.name}-weights": self.module.state_dict(),
            f"{self.name}-average": self.average.averages,
            f"{self.name}-optimizer": [one.optimizer.state_dict() for one in self.optimizers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.module.load_state_dict(state[f"{self.name}-weights"])
        self.average.load(state[f"{self.name}-average"])
        for optimizer, one in zip(self.optimizers, state[f"{self.name}-optimizer"], strict=True):
            optimizer.optimizer.load_state_dict(one)

    def update(self, step: int, rate: float, *, skip: bool) -> None:
        """Step ``step`` (1-based): the optimisers, unless ``skip``, at learning rate ``rate``; and the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(step)

    def forget_gradients(self) -> None:
        """Drop what backward passes have left so far."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
