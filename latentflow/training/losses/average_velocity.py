"""Training a network of average velocities: the objectives of `latentflow.flow.few_step.average_velocity`."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...config import FlowConfig, LoopConfig
from ...errors import UserError
from ...flow import (
    AverageObjective,
    AverageVelocity,
    Draws,
    Interval,
    PathSample,
    Progressive,
    adaptive,
    folded_velocity,
)
from ...models import Condition
from ..loop.data_order import SampleRandom
from ..loop.distributed import uncached_autocast
from .flow import FlowStage, Losses, Times
from .teacher import VelocityTeacher


class AverageVelocityStage(FlowStage):
    """`FlowStage` for objectives of average velocities: a step evaluates the network over intervals.

    What an interval's target takes is evaluated for the samples whose interval has a length only, derivatives in
    float32 whatever the precision of the run, and without a graph. Curves and validation show the error before its
    adaptive weight, which would hide it.

    Args:
        teacher: whose velocities are learned, guided as it is, in the place of the samples'.

    Raises:
        UserError: the network takes no end of an interval, token routing is on (it is trained on one network and
            differentiated through another), or guidance is asked for where there is no condition.
    """

    earlier: nn.Module
    earlier_stage: Tensor

    def __init__(
        self,
        network: Any,
        config: FlowConfig,
        *arguments: Any,
        teacher: VelocityTeacher | None = None,
        **more: Any,
    ) -> None:
        super().__init__(network, config, *arguments, **more)
        self._velocities = teacher
        if self._settings.needs_teacher and teacher is None:
            raise _needs_teacher(config)
        if isinstance(self._settings, Progressive):
            # Part of the state: a resumed run asks the same network.
            self.earlier = copy.deepcopy(network).requires_grad_(False)
            self.register_buffer("earlier_stage", torch.zeros((), dtype=torch.long))
        if not network.config.get("interval_conditioning"):
            raise UserError(
                f"--objective {config.objective} needs a network that takes the end of an interval",
                "Use --network dit.",
            )
        if self._routing is not None:
            raise _routed(config)
        conditions = ("num_classes", "text_dim")
        if self._settings.guided and all(network.config.get(name) is None for name in conditions):
            raise _nothing_to_follow(config)

    @property
    def learns_from_average(self) -> bool:
        return self._settings.averaged or super().learns_from_average

    @property
    def _settings(self) -> AverageObjective:
        settings: AverageObjective = self._choices.settings
        return settings

    def _times(self, random: SampleRandom, numbers: list[int]) -> Times:
        one = super()._times(random, numbers)
        quantile = partial(self._quantile, late=one.late)
        draws = Draws(quantile, one.u, random.uniform(), random.uniform(), self._progress(numbers, one.u))
        r, t = self._settings.interval(draws)
        return one._replace(t=r, end=t)

    def _losses(
        self,
        batch: dict[str, Any],
        sample: PathSample,
        condition: Condition,
        random: SampleRandom,
        times: Times,
    ) -> Losses:
        assert times.end is not None
        settings, end = self._settings, times.end.to(sample.t)
        progress = self._progress(batch["numbers"], end)
        if isinstance(settings, Progressive) and progress is not None and self.training:
            self._begin_stage(int(settings.stage(progress[0])))
        target = self._target(sample, condition, end, progress)
        output, distance = self._predict(batch, sample, condition, random, end=end)
        plain = self._choices.objective(output, sample, target=target)
        return Losses(plain, adaptive(plain, settings.power, settings.floor), distance)

    def _progress(self, numbers: list[int], like: Tensor) -> Tensor | None:
        """(B,) how much of the run lies behind each sample's step; None in validation, which is of the run's end."""
        if isinstance(self._settings, Progressive) and not self.training:
            return self._settings.middle(int(self.earlier_stage)).to(like).expand(like.shape)
        if not self.training or self._samples is None:
            return None
        each = self._samples_per_step
        begun = [number // each * each for number in numbers]  # alike in all passes and processes of a step
        return torch.tensor(begun, dtype=torch.float64).div(self._samples).clamp(max=1.0).to(like)

    def _target(
        self, sample: PathSample, condition: Condition, end: Tensor, progress: Tensor | None
    ) -> Tensor:
        """(B, ...) what the network shall predict: the velocity, over intervals what the objective says."""
        settings, long = self._settings, end > sample.t
        wanted = torch.ones_like(long) if settings.follows_velocity else ~long
        target = self._velocity(sample, condition, wanted)
        rows = long.nonzero().flatten()
        if not len(rows):
            return target
        x, r, t, under = sample.xt[rows], sample.t[rows], end[rows], condition.rows(rows)
        own = settings.own_velocity and self._velocities is None
        along = self._own_velocity(x, r, under) if own else None
        part = None if progress is None else progress[rows]
        with (
            self._asked(),
            torch.autocast(x.device.type, enabled=False) if settings.differentiates else nullcontext(),
        ):
            asked = settings.target(
                self._average_velocity(under), Interval(x, r, t, target[rows], part, along)
            )
        target[rows] = asked.to(target.dtype)
        return target

    def _begin_stage(self, stage: int) -> None:
        """With a new stage its targets come from what the network is now."""
        if stage > int(self.earlier_stage):
            self.earlier.load_state_dict(self.network.state_dict())
            self.earlier_stage.fill_(stage)

    def _asked(self) -> Any:
        """Within the context the network is the one that targets come from. Validation is of the average as it is."""
        average = self._average if self._settings.averaged and self.training else None
        return nullcontext() if average is None else average.applied()

    def _average_velocity(self, condition: Condition) -> AverageVelocity:
        """The network, or what it was when the stage began; where an interval has no length the teacher, if there is
        one: its velocity is exact."""
        network = self.earlier.forward if isinstance(self._settings, Progressive) else self._network

        def average(x: Tensor, r: Tensor, t: Tensor, under: Condition = condition) -> Tensor:
            with uncached_autocast(x.device) if torch.is_autocast_enabled(x.device.type) else nullcontext():
                u: Tensor = network(x, r, under, end=t)
            return u

        def exact_where_still(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            assert self._velocities is not None
            u = torch.empty_like(x)
            for rows, still in (((t == r).nonzero().flatten(), True), ((t > r).nonzero().flatten(), False)):
                if len(rows):
                    under = condition.rows(rows)
                    part = (
                        self._velocities(x[rows], r[rows], under)
                        if still
                        else average(x[rows], r[rows], t[rows], under)
                    )
                    u[rows] = part.to(u.dtype)
            return u

        return average if self._velocities is None or self._settings.differentiates else exact_where_still

    def _velocity(self, sample: PathSample, condition: Condition, wanted: Tensor) -> Tensor:
        """(B, ...) the velocities to learn, where they are ``wanted`` (B,): the sample's, guided, or the teacher's."""
        settings, velocity = self._settings, sample.velocity.clone()
        rows = wanted.nonzero().flatten()
        if not len(rows) or (self._velocities is None and not settings.guided):
            return velocity
        x, r, under = sample.xt[rows], sample.t[rows], condition.rows(rows)
        if self._velocities is not None:
            velocity[rows] = self._velocities(x, r, under).to(velocity.dtype)
            return velocity
        without = self._own_velocity(x, r, under.unconditional())
        with_it = self._own_velocity(x, r, under) if settings.mixing else velocity[rows]
        guided = folded_velocity(velocity[rows], with_it, without, settings.guidance, settings.mixing)
        if under.drop is not None:
            guided = torch.where(under.drop.view(-1, 1, 1, 1), velocity[rows], guided)
        velocity[rows] = guided
        return velocity

    def _own_velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, ...) the network's velocity, which is its average over no time; without a graph."""
        with torch.no_grad(), uncached_autocast(x.device):
            return self._network(x, t, condition).to(x.dtype)

    def _network(self, *given: Any, **more: Any) -> Tensor:
        """The network as it is written: what `--compile` makes of it is not differentiated forwards."""
        value: Tensor = self.network.forward(*given, **more)
        return value


class OneStepStage(FlowStage):
    """`FlowStage` at t = 0 only, of samples that are coupled with the noise that they came from: one Euler step.

    The distillation of Liu et al. 2022 (arXiv:2209.03003), sec. 2.1, after their reflow.
    """

    def _times(self, random: SampleRandom, numbers: list[int]) -> Times:
        one = super()._times(random, numbers)
        return one._replace(t=torch.zeros_like(one.t))


def stage_class(config: FlowConfig) -> type[FlowStage]:
    """The stage that trains by the config's objective."""
    return AverageVelocityStage if config.choices().objective.average else FlowStage


def refuse_unfit(
    config: FlowConfig,
    loop: LoopConfig,
    *,
    routed: bool = False,
    bare: bool = False,
    taught: bool = False,
) -> None:
    """Refuse what an objective of average velocities cannot be trained with, before anything is computed.

    Args:
        routed: tokens skip blocks.
        bare: the network will have no condition.
        taught: there is a teacher.

    Raises:
        UserError: a sharded or routed run, guidance without a condition, or no teacher where one is needed.
    """
    choices = config.choices()
    if not choices.objective.average:
        return
    if routed:
        raise _routed(config)
    if choices.settings.needs_teacher and not taught:
        raise _needs_teacher(config)
    if bare and choices.settings.guided:
        raise _nothing_to_follow(config)
    if loop.shard:
        raise UserError(
            f"--shard with {config.objective}: sharded weights are not evaluated for its targets",
            "Leave it out; targets keep no graph, so that memory is nearly that of flow matching.",
        )


def _routed(config: FlowConfig) -> UserError:
    return UserError(f"--route-share with --objective {config.objective}", "Leave out one of the two.")


def _needs_teacher(config: FlowConfig) -> UserError:
    return UserError(
        f"--objective {config.objective} needs a teacher",
        f"latentflow distill CHECKPOINT DATA --method {config.objective}",
    )


def _nothing_to_follow(config: FlowConfig) -> UserError:
    return UserError(
        f"guidance {config.choices().settings.guidance:g} of --objective {config.objective} without a condition",
        "Leave it out of --objective-options: there are no classes or captions to follow.",
    )
