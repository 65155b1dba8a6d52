"""Recipes: what differs between training from scratch, fine-tuning a checkpoint and (see `distill`) distilling one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..config import FlowConfig, LoopConfig, RunConfig
from ..errors import plural
from ..families import FlowModel
from ..families.few_steps import FewSteps
from ..flow import AverageObjective
from .data import DataSplits
from .fine_tune.base import lost_guidance, open_base, with_base_flow
from .fine_tune.defaults import fine_tuning_lines, fitted
from .fine_tune.prior import MixedData, prior_prompts
from .fine_tune.teacher_samples import SampleSettings, TeacherSamples, teacher_data
from .loop.distributed import process_state, resolve, samples_per_step
from .losses.conditioned import ConditionedLoss
from .losses.latent_data import LatentData

_FEW = 1000  # images: with fewer, a model from scratch memorises many of them


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, loss, data and sampling of a run, as they follow from data and checkpoint.

    Attributes:
        flow, loop: the settings, with the defaults that follow from the data and the checkpoint.
        plan: lines that say what is going to be done.
        sampling: how the trained network is sampled.
        loss_options: further arguments of `flow_loss`, such as a teacher.
        student: a teacher is learned from, so that its path and prediction do not bind the student.
        extra_modules: given the loss, the modules that learn beside it, by name.
        training_data: given the latents of the user's images, the model and the loss, what is trained on.
        teacher_samples: what a checkpoint draws for the training.
        validates: held-out images measure what is trained.
        identity: plain values that a resumed run must have as well.
        summary: given the exported pipeline, the loss and the latents of the user's images, lines about the result.
    """

    flow: FlowConfig
    loop: LoopConfig
    plan: list[str]
    sampling: FewSteps
    loss_options: dict[str, Any] = field(default_factory=dict)
    student: bool = False
    extra_modules: Callable[[Any], dict[str, nn.Module]] = lambda loss: {}
    training_data: Callable[[LatentData, FlowModel, ConditionedLoss], LatentData | MixedData] = (
        lambda own, model, loss: own
    )
    teacher_samples: TeacherSamples | None = None
    validates: bool = True
    identity: dict[str, Any] = field(default_factory=dict)
    summary: Callable[[Path, ConditionedLoss, LatentData], list[str]] = lambda result, loss, own: []


def data_recipe(config: RunConfig, splits: DataSplits, given: Collection[str]) -> Recipe:
    """Return the recipe of `latentflow train`: a fine-tune where a checkpoint is named, else new networks.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
    """
    if config.init_from:
        return fine_tune_recipe(config, config.init_from, splits, given)
    return scratch_recipe(config.flow, config.loop, splits)


def scratch_recipe(flow: FlowConfig, loop: LoopConfig, splits: DataSplits) -> Recipe:
    """Return the recipe for new networks, which learn from the data alone."""
    return Recipe(
        flow=flow,
        loop=loop,
        plan=plan_lines(splits, loop),
        sampling=average_sampling(flow),
    )


def fine_tune_recipe(
    config: RunConfig, checkpoint: str, splits: DataSplits, given: Collection[str]
) -> Recipe:
    """Return the recipe for a checkpoint's networks, which see samples of their own beside the data.

    Args:
        given: keys of the settings that no default may change.

    Raises:
        UserError: the settings contradict each other or the checkpoint. The run folder holds samples of another
            checkpoint, or drawn otherwise (by ``training_data``).
    """
    images, share = len(splits.training), config.fine_tuning.prior_share
    prompts, prior_line = prior_prompts(checkpoint, config.fine_tuning, images, config.loop.seed, config.vae)
    own_share = 1 - share if prompts else 1.0
    loop = fitted(config.loop, given, images, own_share, adapter=bool(config.adapter.lora_rank))
    lost = lost_guidance(config.flow, checkpoint, given)
    flow = with_base_flow(config.flow, checkpoint, given)

    samples = SampleSettings(seed=loop.seed)

    def mixed(own: LatentData, model: FlowModel, loss: ConditionedLoss) -> MixedData:
        folder = Path(config.output) / "prior"
        kept = replace(samples, pixels=loss.needs_pixels)
        prior = teacher_data(checkpoint, prompts, model, folder, kept, trains_text=loss.trains_text)
        return MixedData(own, prior, share)

    recipe = Recipe(
        flow=flow,
        loop=loop,
        plan=[
            *plan_lines(splits, loop, own_share),
            *fine_tuning_lines(checkpoint, loop, given, images, own_share, lost, config.data.random_flip),
            f"resolution: {splits.data.resolution} pixels",
            prior_line,
        ],
        sampling=average_sampling(flow),
    )
    if not prompts:
        return recipe
    identity = {"prior": [len(prompts), share]}
    side = open_base(checkpoint).native_side or splits.data.resolution
    drawn = TeacherSamples(len(prompts), side, samples)
    return replace(recipe, training_data=mixed, teacher_samples=drawn, identity=identity)


def average_sampling(flow: FlowConfig) -> FewSteps:
    """Return how a network that learns by this objective is sampled: in few steps if it learns average velocities."""
    choices = flow.choices()
    if not choices.objective.average:
        return FewSteps()
    settings: AverageObjective = choices.settings
    return FewSteps(
        average=True,
        consistency=settings.sampler == "consistency",
        folded_guidance=settings.guidance,
    )


def plan_lines(splits: DataSplits, loop: LoopConfig, own_share: float | None = None) -> list[str]:
    """Describe the data and the schedule.

    Args:
        own_share: of a fine-tune, the share of the samples that are images of the data.
    """
    source, images, state = splits.source, len(splits.training), process_state()
    batch = samples_per_step(loop)
    epochs = (own_share or 1.0) * loop.max_train_steps * batch / max(1, len(splits.training.uses()))
    precision = resolve(loop.mixed_precision, state.device)
    lines = [f"{source.name}: {note}" for note in source.notes]
    if splits.training.balanced:
        repeats, ids = splits.training.repeats(), np.asarray(splits.training.class_ids())
        uses = np.bincount(ids[ids >= 0], weights=repeats[ids >= 0])
        lines.append(
            f"balanced classes: an epoch uses each {uses.max():,.0f} times, and an image up to {repeats.max():,} times"
        )
    lines += [
        f"data: {images} images to train on, {len(splits.validation)} held out; condition: {source.kind}",
        f"plan: {loop.max_train_steps} steps of {plural(batch, 'sample')} = {epochs:.1f} epochs, {loop.optimizer}, "
        f"learning rate {loop.learning_rate:g}, {'float32' if precision == 'no' else precision} on {state.device}",
    ]
    if images < _FEW and own_share is None:  # a fine-tune has lines of its own for few images
        lines.append(
            f"WARNING: {images} images are few: the model will memorise many of them. `latentflow evaluate` "
            "measures it; more images, fewer steps or fine-tuning (--init-from) lessen it."
        )
    return lines
