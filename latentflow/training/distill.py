"""Distillation: a student that samples in a few evaluations what its teacher, a checkpoint, samples with guidance."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..config import DistillationConfig, RunConfig
from ..data import Source
from ..errors import UserError, few
from ..families import FlowModel
from ..flow import OBJECTIVES, CondOT, straightness, time_grid
from ..pipeline.adapter_files import weights_hash
from ..utils.names import composed
from .data import DataSplits
from .fine_tune.base import open_base, with_base_flow
from .fine_tune.defaults import fine_tuning_lines, fitted
from .fine_tune.prior import in_turn
from .fine_tune.teacher_samples import SampleSettings, TeacherSamples, teacher_data
from .loop.loader import first_batch, to_device
from .loop.random_numbers import CounterRandom
from .losses.average_velocity import OneStepLoss, VelocityTeacher
from .losses.conditioned import ConditionedLoss
from .losses.distribution_matching import FakeLoss, GeneratorLoss
from .losses.flow import FlowLoss
from .losses.latent_data import LatentData
from .recipe import Recipe, average_sampling, plan_lines


class Method(NamedTuple):
    """The way a student learns.

    Attributes:
        objective: a key of `OBJECTIVES`. Those of average velocities learn from the teacher's velocity.
        pairs: it learns from pairs of noise and the teacher's sample from it instead.
        loss: the loss that is trained; None: the objective's own.
        usual: the objective's settings where they are not those of a training from scratch: a teacher's velocity is
            exact, and need not be learned as often; steps shorter than an eighth are hardly better than eighths.
    """

    objective: str
    pairs: bool = False
    loss: type[FlowLoss] | None = None
    usual: Mapping[str, float] = MappingProxyType({})

    @property
    def has_options(self) -> bool:
        """Tell whether the objective's settings are the method's own."""
        return not self.pairs and self.loss is None


#: the methods of `latentflow distill`
METHODS: dict[str, Method] = {
    **{name: Method(name) for name, objective in OBJECTIVES.items() if objective.average},
    "mean-flow": Method("mean-flow", usual={"share": 0.5}),
    "alpha-flow": Method("alpha-flow", usual={"share": 0.5}),
    "shortcut": Method("shortcut", usual={"share": 0.5, "finest": 8}),
    # Sampled as consistency models are: to the data, and back.
    "distribution-matching": Method("consistency", loss=GeneratorLoss),
    "reflow": Method("flow-matching", pairs=True),
    "one-step": Method("flow-matching", pairs=True, loss=OneStepLoss),
}


_TRAJECTORIES = 32  # to measure straightness on


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that a student learns from.

    Attributes:
        checkpoint, model: the model, and where it came from.
        guidance: the scale at which the student follows it.
        folded_guidance: the scale that the student has learned in the end: the same, or the teacher's own learned one.
    """

    checkpoint: str
    model: FlowModel
    guidance: float
    folded_guidance: float

    def refuse_unfit(self, source: Source, size_conditioning: bool) -> None:
        """Refuse data that ask of the teacher what it does not know, before anything is computed.

        Raises:
            UserError: new classes, data without the teacher's condition, or masks or sizes that it does not take.
        """
        model, name = self.model, self.checkpoint
        known = {*map(composed, model.classes)}
        new = [label for label in source.classes if composed(label) not in known]
        if source.kind == "class" and new:
            raise UserError(
                f"{name} does not know the classes {few(new)}",
                "Teach them first: latentflow train DATA --init-from CHECKPOINT; then distil that.",
            )
        if source.kind == "unconditional" and model.condition_kind != "unconditional":
            kind = "captions" if model.takes_text else "classes"
            raise UserError(f"{name} draws {kind}, and the data have none", f"Give images with {kind}.")
        if source.has_masks and not model.takes_masks:
            raise UserError(f"the data have masks, and {name} does not inpaint", "Add --masks none.")
        if source.control:
            raise UserError(
                f"--control {' '.join(source.control)}: a student learns what its teacher draws without control images",
                "Leave it out.",
            )
        if size_conditioning != model.takes_sizes:
            raise UserError(
                f"--size-conditioning must be as {name} has it",
                "Leave it out." if size_conditioning else "Add --size-conditioning.",
            )


def open_teacher(checkpoint: str, guidance: float | None) -> Teacher:
    """Load a teacher whose samples at this guidance are learned; None: at its usual guidance.

    Raises:
        UserError: the checkpoint cannot be opened, or guidance is asked for where it can have none.
    """
    model = open_base(checkpoint)
    learned, conditional = model.few_steps.folded_guidance, model.condition_kind != "unconditional"
    if guidance is None:
        scale = model.usual_guidance if conditional else 1.0
        return Teacher(checkpoint, model, scale, scale if learned == 1.0 else learned)
    if not conditional and guidance != 1.0:
        raise UserError(
            f"--guidance {guidance:g}: {checkpoint} has no classes or captions to follow", "Leave it out."
        )
    if guidance != 1.0:
        model.require_null()
    if learned not in (1.0, guidance):
        raise UserError(
            f"--guidance {guidance:g}: guidance {learned:g} is already in the weights of {checkpoint}",
            "Leave it out: its student has the same.",
        )
    return Teacher(checkpoint, model, guidance if learned == 1.0 else 1.0, guidance)


def distillation_recipe(
    config: RunConfig,
    splits: DataSplits,
    given: Collection[str],
    *,
    teacher: Teacher,
    settings: DistillationConfig,
    name: str,
) -> Recipe:
    """Return the recipe of a student.

    Args:
        config: a fine-tune of the teacher by the method's objective.
        given: keys of the settings that no default may change.
        name: of the method.

    Raises:
        UserError: the data or settings do not fit the teacher or the method. The pairs' folder holds pairs of another
            teacher, or drawn otherwise (by ``training_data``).
    """
    method, model, checkpoint = METHODS[name], teacher.model, teacher.checkpoint
    # Neither pairs nor matched distributions are measured by held-out images.
    validates = not method.pairs and method.loss is None
    step_counts = (1,) if method.loss is OneStepLoss else settings.step_counts

    # ---- what does not fit ----
    teacher.refuse_unfit(splits.source, config.framing.size_conditioning)
    if config.loop.early_stop and (not validates or name == "progressive"):
        raise UserError(
            f"--early-stop with {name}: no loss on held-out images says when its student is best",
            "Leave it out, and give --max-train-steps.",
        )

    # ---- settings: those of a fine-tune, but that a student learns velocities on the straight path ----
    images = len(splits.training)
    adapter = bool(config.adapter.lora_rank)
    loop = fitted(config.loop, given, images, own_share=1.0, adapter=adapter, student=True)
    straight = {"objective", "path", "path_options", "prediction", "guidance", "time_density"}
    flow = with_base_flow(config.flow, checkpoint, straight.union(given))

    # ---- plan ----
    plan = [
        *plan_lines(splits, loop, own_share=1.0),
        *fine_tuning_lines(
            checkpoint, loop, given, images, own_share=1.0, random_flip=config.data.random_flip
        ),
        f"resolution: {splits.data.resolution} pixels",
        f"student of {checkpoint}: {name}, guidance {teacher.folded_guidance:g} distilled in, made for "
        f"{', '.join(map(str, step_counts))} evaluations",
    ]
    if model.prediction != "velocity" or model.path != CondOT():
        plan.append(
            f"the teacher predicts the {model.prediction} on the path {model.pipeline.config.path}; the student learns "
            "velocities on the straight one, anew from its weights: give it more steps"
        )

    # ---- loss ----
    loss_options: dict[str, Any] = {"kind": method.loss}
    if not method.pairs:
        loss_options["teacher"] = VelocityTeacher(model, teacher.guidance)
    identity: dict[str, Any] = {
        "method": name,
        "guidance": teacher.guidance,
        "teacher": weights_hash(model.network),
    }
    recipe = Recipe(
        flow=flow,
        loop=loop,
        plan=plan,
        sampling=replace(
            average_sampling(flow), folded_guidance=teacher.folded_guidance, step_counts=step_counts
        ),
        loss_options=loss_options,
        student=True,
        validates=validates,
        identity={"distillation": identity},
    )
    if method.loss is GeneratorLoss:
        loss_options["step_counts"] = identity["step_counts"] = [*step_counts]
        return replace(recipe, extra_modules=lambda loss: {"fake": FakeLoss(loss)})
    if not method.pairs:
        return recipe

    # ---- pairs: the teacher's samples under the conditions of the data, with their noise ----
    samples = SampleSettings(
        what="pair",
        phase="draw pairs",
        seed=loop.seed,
        noise=True,
        guidance=teacher.guidance,
        steps=settings.pairs_steps,
        # A student's own steps are few, or add noise on their way: its pairs are those of its velocity.
        solver=settings.pairs_solver or ("heun" if model.few_steps else None),
    )

    def pairs(own: LatentData, student: FlowModel, loss: ConditionedLoss) -> LatentData:
        prompts = in_turn(_prompts(splits.training), settings.pairs)
        folder = Path(settings.pairs_folder or Path(config.output) / "pairs")
        kept = replace(samples, pixels=loss.needs_pixels)
        return teacher_data(checkpoint, prompts, student, folder, kept, trains_text=loss.trains_text)

    identity["pairs"] = settings.pairs
    return replace(
        recipe,
        training_data=pairs,
        teacher_samples=TeacherSamples(settings.pairs, model.native_side or splits.data.resolution, samples),
        summary=partial(_straightness_lines, teacher),
    )


def _prompts(source: Source) -> list[str]:
    """Return all captions, the classes that occur, or "" alone without a condition."""
    if source.kind == "text":
        return [*chain.from_iterable(source.all_captions())]
    if source.kind == "class":
        return [source.classes[number] for number in sorted({*source.class_ids()}) if number >= 0]
    return [""]


def _straightness_lines(teacher: Teacher, result: Path, loss: ConditionedLoss, data: LatentData) -> list[str]:
    """Compare how straight the trajectories of teacher and student are, from equal noise under equal conditions."""
    student = FlowModel.from_pretrained(result)
    batch = first_batch(data, _TRAJECTORIES)
    device = next(loss.network.parameters()).device
    noise = CounterRandom(0, batch["sample_ids"], device).normal(batch["latents"].shape[1:])
    condition = loss.prompts(to_device(batch, device))
    if loss.masked:  # nothing is known
        channels = student.network.config.condition_channels
        condition = replace(condition, channels=noise.new_zeros(len(noise), channels, *noise.shape[2:]))
    figures = []
    for model, guidance in ((teacher.model, teacher.guidance), (student, 1.0)):
        velocity = partial(VelocityTeacher(model, guidance), condition=condition)
        per_sample = straightness(velocity, noise, time_grid(20))
        figures.append(float(per_sample.mean()) / noise[0].numel())
    return [
        f"straightness (mean square of velocity less chord, 0 is straight): teacher {figures[0]:.4f}, "
        f"student {figures[1]:.4f}"
    ]
