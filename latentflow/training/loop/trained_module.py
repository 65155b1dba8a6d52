"""A module with what the loop keeps beside it: optimisers, weight averages, and their state.

Power-function averages: Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3. The weights of time tau <= t count in
proportion to tau^gamma, so that an average grows with the run. Its length (sigma_rel) is the standard deviation of that
profile as a share of t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...config import LoopConfig
from ...errors import UserError
from .compiling import compiles
from .distributed import is_sharded, local, sharded, whole
from .optimizers import evaluated_weights, make_optimizers

T = TypeVar("T")

_GIVEN = ("weight_decay", "betas")  # settings of an optimiser that a resumed run may change
LONGEST = 12.0**-0.5  # gamma = 0: the plain mean of the whole run


def exponent(length: float) -> float:
    """Return gamma of the profile tau^gamma that has a relative ``length``.

    The length is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)): a cubic equation in gamma.

    Raises:
        UserError: there is none; the length is not above 0 and at most `LONGEST`.
    """
    if not 0.0 < length <= LONGEST:
        raise UserError(
            f"a weight average of relative length {length}",
            f"Use above 0 to {LONGEST:.3f} (the mean of the whole run); 0.05 to 0.1 are usual.",
        )
    roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
    return max(0.0, float(roots.real.max()))


def warmed_up(decay: float) -> Callable[[int], float]:
    """Return the decay min(decay, (1 + step) / (10 + step)), so that initial weights do not rule short runs."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_function(length: float) -> Callable[[int], float]:
    """Return the decay of an average whose profile is a power of time: Karras et al. 2024 (EDM2), section 3.1.

    Args:
        length: relative; see `exponent`.
    """
    power = exponent(length) + 1.0
    return lambda step: (1.0 - 1.0 / step) ** power


class WeightAverage:
    """Moving average of a module's trainable parameters, kept in float32 beside them.

    Args:
        decay: step (1-based) -> the share of the average that stays; see `warmed_up` and `power_function`.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        self.decay = decay
        named = module.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the averages towards the current weights, after ``step`` (1-based) updates.

        Args:
            instead: parameter -> the tensor to average in its place, or this process's part of it.
        """
        averages = [local(average) for average in self.averages.values()]
        weights = [
            local((instead or {}).get(parameter, parameter)) for parameter in self._parameters.values()
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore the averages from a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module's weights are the averages; afterwards they are the live ones again.

        Not for a sharded module, whose weights' place in memory must stay.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            live = parameter.data
            parameter.data = self.averages[name]
            self.averages[name] = live


class TrainedModule:
    """A module with its optimisers and its weight average. Most runs have one, an adversarial run two.

    A module with a true ``learns_from_average`` is given its average (``use_average``), to call while it is applied.
    One that learns without gradients as well has a ``finish_step(skip)``, which each step ends with in every process.

    Attributes:
        module: the module as the loop got it, and callbacks see it.
        trained: the module that is trained: the same, or in a sharded run its sharded copy.
        prepared: `trained` as the loop calls it.
    """

    def __init__(self, name: str, module: nn.Module, config: LoopConfig, accelerator: Accelerator) -> None:
        self.name, self.module = name, module
        needs_average = getattr(module, "learns_from_average", False)
        self.sharded = is_sharded(config, accelerator.num_processes, needs_average)
        self._device, self._main = accelerator.device, accelerator.is_main_process
        if self.sharded:
            self.trained = sharded(module, accelerator, compiled=compiles(config, accelerator.device))
        else:
            self.trained = module.to(accelerator.device)
        # A scaler sets what we would, and parts of weights need it in parts.
        self._may_skip = accelerator.scaler is None and not self.sharded
        # Schedule-free's x is an average by itself: with a decay of 0 this one is x.
        decay = 0.0 if config.optimizer == "schedule-free" else config.ema_decay
        self.average = WeightAverage(self.trained, warmed_up(decay))
        self._tracked = {
            f"{name}-average-{length:g}": WeightAverage(self.trained, power_function(length))
            for length in config.ema_lengths
        }
        if getattr(module, "learns_from_average", False):
            module.use_average(self.average)  # type: ignore[operator]
        self._make_optimizers = partial(make_optimizers, self.trained, config)
        optimizers = self._make_optimizers()
        # Evaluation mode: autocast only, without averaging gradients over the processes, which FSDP2 does itself.
        self.prepared: nn.Module = accelerator.prepare_model(
            self.trained, device_placement=not self.sharded, evaluation_mode=self.sharded
        )
        self.optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, live: not a copy."""
        return {
            f"{self.name}-weights": self.trained.state_dict(),
            f"{self.name}-average": self.average.averages,
            f"{self.name}-optimizer": [optimizer.optimizer.state_dict() for optimizer in self.optimizers],
            **self.tracked(),
        }

    def tracked(self) -> dict[str, dict[str, Tensor]]:
        """Return the power-function averages by their names in a checkpoint, live: not a copy."""
        return {name: average.averages for name, average in self._tracked.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.trained.load_state_dict(state[f"{self.name}-weights"])
        self.average.load(state[f"{self.name}-average"])
        for name, average in self._tracked.items():
            average.load(state[name])
        # A run that was begun before shares the parameters out as it did.
        made = self._make_optimizers(state[f"{self.name}-optimizer"])
        for optimizer, other in zip(self.optimizers, made, strict=True):
            optimizer.optimizer.param_groups[:] = other.param_groups
        for optimizer, saved in zip(self.optimizers, state[f"{self.name}-optimizer"], strict=True):
            groups = optimizer.optimizer.param_groups
            # Those of this start, which a saved state would replace without a word; `update` sets the rate.
            given = [{name: group[name] for name in _GIVEN if name in group} for group in groups]
            optimizer.optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.optimizer.param_groups, given, strict=True):
                group.update(settings)
            _match_memory_format(optimizer.optimizer)
            optimizer.train()  # schedule-free's, if it was saved in its other mode

    def parameter_of(self, key: str) -> Tensor | None:
        """Return the parameter that a tensor of `state` belongs to, by its name in a checkpoint; None if to none."""
        part, *path = key.split("/")
        weights = (f"{self.name}-weights", f"{self.name}-average", f"{self.name}-best", *self._tracked)
        if part in weights:
            return dict(self.trained.named_parameters(remove_duplicate=False)).get("/".join(path))
        # <optimiser>/state/<parameter>/exp_avg
        if part == f"{self.name}-optimizer" and path[1:2] == ["state"]:
            with suppress(IndexError):  # of another optimiser: `load` refuses it in words
                groups = self.optimizers[int(path[0])].param_groups
                parameter: Tensor = [each for group in groups for each in group["params"]][int(path[2])]
                return parameter
        return None

    @torch.no_grad()
    def gather_averages(self) -> None:
        """Give the averaged weights of a sharded run to the main process's `module`; all processes must call it."""
        if not self.sharded:
            return
        target, averages = self.module.state_dict(), self.average.averages
        rest = {name: tensor for name, tensor in self.trained.state_dict().items() if name not in averages}
        for name, tensor in (rest | averages).items():  # averages last: tied weights have a second name
            value = whole(tensor)
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

    def update(self, rate: float, *, skip: Tensor) -> None:
        """Step the optimisers at learning rate ``rate``, unless ``skip`` (on the device), and drop the gradients.

        Fused AdamW leaves its step out on the device, as it does for a gradient scaler; others wait for the answer.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            # One that sat the step out has no gradients, and float16's scaler refuses to step without.
            if any(parameter.grad is not None for parameter in parameters):
                by_itself = self._may_skip and getattr(
                    optimizer.optimizer, "_step_supports_amp_scaling", False
                )
                if by_itself:
                    optimizer.optimizer.found_inf = skip.float()
                if by_itself or not skip:
                    optimizer.step()
        if finish_step := getattr(self.module, "finish_step", None):
            finish_step(skip)
        self.trained.zero_grad()

    def update_averages(self, step: int) -> None:
        """Move all weight averages towards the weights after ``step`` (1-based) updates."""
        weights = evaluated_weights(optimizer.optimizer for optimizer in self.optimizers)
        for average in (self.average, *self._tracked.values()):
            average.update(step, weights)


def tensor_for(modules: Sequence[TrainedModule], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor to read a checkpoint's into; of what is sharded it is this process's part."""
    for module in modules:
        parameter = module.parameter_of(name)
        if isinstance(parameter, DTensor) and parameter.shape == shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def with_averages(modules: Sequence[TrainedModule], function: Callable[[], T]) -> T:
    """Call with averaged weights, in evaluation mode, without gradients; the run's random state is kept."""
    modes = [(part, part.training) for module in modules for part in module.module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        with ExitStack() as stack, torch.random.fork_rng(), torch.no_grad():
            for module in modules:
                stack.enter_context(module.averaged())
            return function()
    finally:
        for part, mode in modes:
            part.training = mode


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out in memory as their parameters are, such as channels last.

    A file holds them row by row, and sums over another layout round otherwise: a resumed run would drift away.
    """
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if (
                isinstance(moment, Tensor)
                and moment.shape == parameter.shape
                and moment.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
