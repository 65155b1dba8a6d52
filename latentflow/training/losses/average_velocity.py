"""Losses of networks of average velocities: the objectives of `latentflow.flow.few_step.average_velocity`."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...config import FlowConfig, LoopConfig
from ...errors import UserError
from ...families import FlowModel
from ...flow import AverageObjective, AverageVelocity, Draws, Interval, PathSample, adaptive, folded_velocity
from ...models import Condition
from ..loop.compiling import as_written
from ..loop.distributed import uncached_autocast
from ..loop.random_numbers import SampleRandom, sent
from .alignment import AlignedFlowLoss
from .flow import Density, FlowLoss


class VelocityTeacher:
    """The velocity of a model on the straight path, whatever its own path and prediction, guided at one scale.

    Args:
        model: the teacher. Its network is frozen.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    def __init__(self, model: FlowModel, guidance: float) -> None:
        self._model, self._guidance = model.network_alone(), guidance  # on the network's device
        self._model.network.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return dx/dt (B, C, h, w) at x and t (B,), float32; rows whose condition is dropped are not guided."""
        if self._model.network.device != x.device:
            self._model.network.to(x.device)
        with uncached_autocast(x.device):
            return self._model.velocity(self._model.rows_of(condition, len(x)), self._guidance)(x, t)


class AverageVelocityLoss(AlignedFlowLoss):
    """The loss of objectives of average velocities: a step evaluates the network over intervals from r to t.

    The target of an interval is evaluated for the samples whose interval has a length only, derivatives in float32
    whatever the precision of the run, and without a graph. Curves and validation show the error before its adaptive
    weight, which would hide it.

    Args:
        teacher: its velocities, guided as it is, are learned in the place of the samples'.

    Raises:
        UserError: the network takes no end of an interval, a teacher is needed, tokens are routed (it is trained on one
            network and differentiated through another), or guidance is asked for where there is no condition.
    """

    def __init__(
        self,
        network: Any,
        config: FlowConfig,
        seed: int,
        *arguments: Any,
        teacher: VelocityTeacher | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, config, seed, *arguments, **options)
        self.settings: AverageObjective = self.choices.settings
        self.objective = self.choices.objective
        self.teacher = teacher
        self.learns_from_average |= self.settings.averaged
        if self.routing is not None:
            raise _routed(config)
        if self.settings.needs_teacher and teacher is None:
            raise _needs_teacher(config)
        if not network.config.get("interval_conditioning"):
            raise UserError(
                f"--objective {config.objective} needs a network that takes the end of an interval",
                "Use --network dit.",
            )
        conditions = ("num_classes", "text_dim")
        if self.settings.guided and all(network.config.get(name) is None for name in conditions):
            raise _nothing_to_follow(config)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what `FlowLoss` does, and the plain ``error`` where it is not what is minimised."""
        random = self.random(batch)
        r, t = self.interval(batch, random)
        drop = self.dropped(random)
        x0, x1 = self.noise(batch, random), self.latents(batch, random)
        condition = self.condition(batch, drop)
        x0 = self.pair(x0, x1, condition, batch)
        sample, end = self.path.sample(x0, x1, r.to(x1.dtype)), t.to(x1.dtype)
        condition, rate = self.latent_variable.infer(self.network, condition, sample, random)
        target = self.target(sample, condition, end, self.progress(batch["sample_ids"], end))
        output, distance = self.predict(batch, sample, condition, random, end=end)
        error = self.objective(output, sample, target=target)
        trained = adaptive(error, self.settings.power, self.settings.floor)
        result = self.with_distance(trained, distance, rate, batch)
        if trained is not error:
            result["error"] = error.detach().mean()
        return result | {"per_sample": error.detach(), "t": r}

    def interval(self, batch: dict[str, Any], random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Draw the intervals of the samples of a batch: start and end, each (B,) float64."""
        density: Density = self.density(batch)
        first, second, coin = random.uniform(), random.uniform(), random.uniform()
        progress = self.progress(batch["sample_ids"], first)
        return self.settings.interval(Draws(density.quantile, first, second, coin, progress))

    def progress(self, sample_ids: list[int], like: Tensor) -> Tensor | None:
        """Return the share (B,) of the run before each sample's step; None in validation, which is of the run's end."""
        if not self.training or self.samples is None:
            return None
        step = self.samples_per_step
        begun = [
            number // step * step for number in sample_ids
        ]  # alike in all passes and processes of a step
        share = torch.tensor(begun, dtype=torch.float64).div(self.samples).clamp(max=1.0)
        return sent(share.to(like.dtype), like.device)

    def target(
        self, sample: PathSample, condition: Condition, end: Tensor, progress: Tensor | None
    ) -> Tensor:
        """Return what the network should predict, (B, ...): the velocity; over intervals what the objective says."""
        settings, long = self.settings, end > sample.t
        target = self._velocity(
            sample, condition, torch.ones_like(long) if settings.follows_velocity else ~long
        )
        rows = long.nonzero().flatten()
        if not len(rows):
            return target
        x, r, t, under = sample.xt[rows], sample.t[rows], end[rows], condition.rows(rows)
        own = settings.own_velocity and self.teacher is None
        along = self._own_velocity(x, r, under) if own else None
        part = None if progress is None else progress[rows]
        # Validation is of the average as it is.
        average = self.average if settings.averaged and self.training else None
        exact = torch.autocast(x.device.type, enabled=False) if settings.differentiates else nullcontext()
        with nullcontext() if average is None else average.applied(), exact:
            over = Interval(x, r, t, target[rows], part, along)
            target[rows] = settings.target(self._average_velocity(under), over).to(target.dtype)
        return target

    def target_network(self, *given: Any, **end: Any) -> Tensor:
        """Call the network that targets come from, as it is written: compiled it has no forward derivatives."""
        with as_written(self.network):
            value: Tensor = self.network(*given, **end)
        return value

    def _average_velocity(self, condition: Condition) -> AverageVelocity:
        """Return u(x, r, t) of the target network; of a teacher, whose velocity is exact, where r = t."""

        def average(x: Tensor, r: Tensor, t: Tensor, under: Condition = condition) -> Tensor:
            with uncached_autocast(x.device) if torch.is_autocast_enabled(x.device.type) else nullcontext():
                return self.target_network(x, r, under, end=t)

        if self.teacher is None or self.settings.differentiates:
            return average
        teacher = self.teacher

        def exact_where_still(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            u = torch.empty_like(x)
            still, moving = (t == r).nonzero().flatten(), (t > r).nonzero().flatten()
            if len(still):
                u[still] = teacher(x[still], r[still], condition.rows(still)).to(u.dtype)
            if len(moving):
                u[moving] = average(x[moving], r[moving], t[moving], condition.rows(moving)).to(u.dtype)
            return u

        return exact_where_still

    def _velocity(self, sample: PathSample, condition: Condition, wanted: Tensor) -> Tensor:
        """Return the velocities to learn (B, ...), guided or the teacher's; only ``wanted`` (B,) rows count."""
        settings, velocity = self.settings, sample.velocity.clone()
        rows = wanted.nonzero().flatten()
        if not len(rows) or (self.teacher is None and not settings.guided):
            return velocity
        x, r, under = sample.xt[rows], sample.t[rows], condition.rows(rows)
        if self.teacher is not None:
            velocity[rows] = self.teacher(x, r, under).to(velocity.dtype)
            return velocity
        without = self._own_velocity(x, r, under.unconditional())
        with_it = self._own_velocity(x, r, under) if settings.mixing else velocity[rows]
        guided = folded_velocity(velocity[rows], with_it, without, settings.guidance, settings.mixing)
        if under.drop is not None:
            guided = torch.where(under.drop.view(-1, 1, 1, 1), velocity[rows], guided)
        velocity[rows] = guided
        return velocity

    def _own_velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the network's velocity (B, ...), which is its average over no time; without a graph."""
        with torch.no_grad(), uncached_autocast(x.device):
            velocity: Tensor = self.network.forward(x, t, condition)
            return velocity.to(x.dtype)


class ProgressiveLoss(AverageVelocityLoss):
    """The loss of progressive distillation: the run is cut into stages; see `Progressive`.

    Targets come from ``earlier``, the network as it was when the stage began. It is part of the state: a resumed run
    asks the same network.
    """

    earlier_stage: Tensor

    def __init__(self, network: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(network, *arguments, **options)
        self.earlier = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("earlier_stage", torch.zeros((), dtype=torch.long))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        progress = self.progress(batch["sample_ids"], batch["latents"])
        if self.training and progress is not None:
            stage = int(self.choices.settings.stage(progress[0]))
            if stage > int(self.earlier_stage):
                self.earlier.load_state_dict(self.network.state_dict())
                self.earlier_stage.fill_(stage)
        return super().forward(batch)

    def progress(self, sample_ids: list[int], like: Tensor) -> Tensor | None:
        """Return the share (B,) of the run before each sample's step; in validation the middle of the stage."""
        if self.training:
            return super().progress(sample_ids, like)
        middle: Tensor = self.choices.settings.middle(int(self.earlier_stage))
        return middle.to(like).expand(len(sample_ids))

    def target_network(self, *given: Any, **end: Any) -> Tensor:
        value: Tensor = self.earlier.forward(*given, **end)
        return value


class OneStepLoss(FlowLoss):
    """`FlowLoss` at t = 0 only, of samples that are paired with the noise that they came from: one Euler step.

    The distillation of Liu et al. 2022 (arXiv:2209.03003), sec. 2.1, after their reflow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        density = self.density
        self.density = lambda batch: _AtNoise(density(batch))


class _AtNoise:
    """A density whose times are all 0; each still counts as the one that it takes the place of."""

    def __init__(self, density: Density) -> None:
        self.slope = density.slope

    def quantile(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


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
