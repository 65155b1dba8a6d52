"""Training a network of average velocities (`--objective mean-flow`): MeanFlow, arXiv:2505.13447."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import MeanFlow, PathSample, adaptive, folded_velocity, slope
from ..models import Condition
from ..pipeline import LatentFlowPipeline
from .config import LoopConfig
from .flow import FlowConfig, FlowStage, Losses, Times
from .order import SampleRandom
from .precision import uncached_autocast


class MeanFlowStage(FlowStage):
    """`FlowStage` for the objective "mean-flow": a step evaluates the network over intervals.

    The derivative along the flow is taken of the samples whose interval has a length only, in float32 whatever the
    precision of the run, and without a graph. Curves and validation show the error before its adaptive weight, which
    would hide it.

    Raises:
        UserError: the network takes no end of an interval, token routing is on (it is trained on one network and
            differentiated through another), or guidance is asked for where there is no condition.
    """

    def __init__(self, network: Any, config: FlowConfig, *arguments: Any, **more: Any) -> None:
        super().__init__(network, config, *arguments, **more)
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
    def _settings(self) -> MeanFlow:
        settings: MeanFlow = self._choices.settings
        return settings

    def _times(self, random: SampleRandom, numbers: list[int]) -> Times:
        first = super()._times(random, numbers)
        second = self._quantile(random.uniform(), first.late)
        t, end = self._settings.interval(first.t, second, random.uniform())
        return first._replace(t=t, end=end)

    def _losses(
        self,
        batch: dict[str, Any],
        sample: PathSample,
        condition: Condition,
        random: SampleRandom,
        times: Times,
    ) -> Losses:
        assert times.end is not None
        end = times.end.to(sample.t)
        velocity = self._target_velocity(sample, condition)
        along = self._slope(sample, condition, end, velocity)
        output, distance = self._predict(batch, sample, condition, random, end=end)
        plain = self._choices.objective(output, sample, end=end, slope=along, velocity=velocity, power=0.0)
        return Losses(plain, adaptive(plain, self._settings.power), distance)

    def _target_velocity(self, sample: PathSample, condition: Condition) -> Tensor:
        """(B, ...) the sample's velocity, with guidance where it is folded in and the condition is not dropped."""
        settings, velocity = self._settings, sample.velocity
        if not settings.guided:
            return velocity
        without = self._own_velocity(sample.xt, sample.t, condition.unconditional())
        under = self._own_velocity(sample.xt, sample.t, condition) if settings.mixing else velocity
        guided = folded_velocity(velocity, under, without, settings)
        if condition.drop is None:
            return guided
        return torch.where(condition.drop.view(-1, 1, 1, 1), velocity, guided)

    def _slope(self, sample: PathSample, condition: Condition, end: Tensor, velocity: Tensor) -> Tensor:
        """(B, ...) du/dr; zero where the interval has no length, where nothing depends on it."""
        result = torch.zeros_like(sample.xt)
        rows = (end > sample.t).nonzero().flatten()
        if not len(rows):
            return result
        x, r, under = sample.xt[rows], sample.t[rows], condition.rows(rows)
        along = self._own_velocity(x, r, under) if self._settings.improved else velocity[rows]
        with torch.autocast(x.device.type, enabled=False):
            result[rows] = slope(lambda y, s, t: self._network(y, s, under, end=t), x, r, end[rows], along)
        return result

    def _own_velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(B, ...) the network's velocity, which is its average over no time; without a graph."""
        with torch.no_grad(), uncached_autocast(x.device):
            return self._network(x, t, condition).to(x.dtype)

    def _network(self, *given: Any, **more: Any) -> Tensor:
        """The network as it is written: what `--compile` makes of it is not differentiated forwards."""
        value: Tensor = self.network.forward(*given, **more)
        return value


def stage_class(config: FlowConfig) -> type[FlowStage]:
    """The stage that trains by the config's objective."""
    return MeanFlowStage if config.choices().objective.average else FlowStage


def refuse_unfit(
    config: FlowConfig,
    loop: LoopConfig,
    *,
    adapted: str | None = None,
    routed: bool = False,
    bare: bool = False,
) -> None:
    """Refuse what an objective of average velocities cannot be trained with, before anything is computed.

    Args:
        adapted: the checkpoint that a LoRA is trained for, if one is.
        routed: tokens skip blocks.
        bare: the network will have no condition.

    Raises:
        UserError: a sharded or routed run, guidance without a condition, or a LoRA of a checkpoint that has not learned
            average velocities.
    """
    choices = config.choices()
    if not choices.objective.average:
        return
    if routed:
        raise _routed(config)
    if bare and choices.settings.guided:
        raise _nothing_to_follow(config)
    if loop.shard:
        raise UserError(
            f"--shard with --objective {config.objective}: sharded weights are not differentiated forwards",
            "Leave it out; the derivative keeps no graph, so that memory is nearly that of flow matching.",
        )
    if adapted is not None and not LatentFlowPipeline.load_config(adapted).get("average"):
        raise UserError(
            f"--lora-rank with --objective {config.objective} on {adapted}, which predicts velocities",
            "Leave out --lora-rank: the length of the interval is a new input, which a LoRA does not hold.",
        )


def _routed(config: FlowConfig) -> UserError:
    return UserError(f"--route-share with --objective {config.objective}", "Leave out one of the two.")


def _nothing_to_follow(config: FlowConfig) -> UserError:
    return UserError(
        f"guidance {config.choices().settings.guidance:g} of --objective {config.objective} without a condition",
        "Leave it out of --objective-options: there are no classes or captions to follow.",
    )
