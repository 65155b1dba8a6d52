"""What a run is about to do, in words; and, of a fine-tune, the settings that follow from its checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from ..config import RunConfig
from .data import Examples
from .estimate import plan_lines
from .fine_tune.defaults import fine_tuning_lines, fitted
from .recipe import Lesson


@dataclass(frozen=True)
class Plan:
    """What is going to be done.

    Attributes:
        config: the settings, with the defaults that fit.
        prior: see `Lesson.reminders`.
        lines: to tell it in.
    """

    config: RunConfig
    prior: list[str]
    lines: list[str]


def plan(config: RunConfig, examples: Examples, given_keys: Collection[str], lesson: Lesson) -> Plan:
    """What is going to be done; no key of ``given_keys`` is changed.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
    """
    if config.init_from:
        return _fine_tune(config, config.init_from, examples, given_keys, lesson)
    lines = plan_lines(examples.source, examples.training, examples.validation, config.loop)
    return Plan(config, [], [*lines])


def _fine_tune(
    config: RunConfig, base: str, examples: Examples, given_keys: Collection[str], lesson: Lesson
) -> Plan:
    images, data = len(examples.training), examples.data
    prior, told_of = lesson.reminders(config, images)
    own_share = 1 - config.fine_tuning.prior_share if prior else 1.0
    loop = fitted(config.loop, given_keys, images, own_share, adapter=bool(config.adapter.lora_rank))
    lost = lesson.lost_guidance(config.flow, base, given_keys)
    lines = [
        *plan_lines(examples.source, examples.training, examples.validation, loop, own_share),
        *fine_tuning_lines(base, loop, given_keys, images, own_share, lost),
        f"resolution: {data.resolution} pixels",
        *told_of,
    ]
    config = replace(
        config,
        loop=loop,
        data=replace(config.data, validation=data.validation, resolution=data.resolution),
        flow=lesson.flow(config.flow, base, given_keys),
    )
    return Plan(config, prior, lines)
