"""Distillation: a student of a checkpoint that draws what it draws, guided, in a few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from ..config import DistillationConfig, FlowConfig, LoopConfig, RunConfig
from ..data import Source
from ..errors import UserError, few, lookup
from ..families.latentflow import FewSteps
from ..flow import OBJECTIVES, straightness, time_grid
from ..pipeline.adapter_files import weights_hash
from ..pipeline.generate import LatentFlowPipeline
from .fine_tune.base import class_names, open_base
from .fine_tune.prior import MixedData, in_turn
from .fine_tune.teacher_samples import Drawing, drawn_data
from .loop.data_order import SampleRandom, SampleUse
from .loop.loader import by_group, groups_of, load_batch, to_device
from .losses.average_velocity import OneStepLoss, flow_loss
from .losses.distribution_matching import FakeLoss, GeneratorLoss
from .losses.flow import FlowLoss
from .losses.latent_data import LatentData
from .losses.teacher import VelocityTeacher
from .recipe import Lesson
from .trained_model import Built


class Method(NamedTuple):
    """How a student learns.

    Attributes:
        objective: a key of `OBJECTIVES`. Those of average velocities learn from the teacher's velocity.
        pairs: it learns from pairs of noise and what the teacher draws from it instead.
        stage: what is trained by that; None: the objective's own.
        usual: the objective's settings where they are not those of a training from scratch: a teacher's velocity is
            exact, and need not be learned as often; steps shorter than an eighth are hardly better than eighths.
    """

    objective: str
    pairs: bool = False
    stage: type[FlowLoss] | None = None
    usual: Mapping[str, float] = MappingProxyType({})

    @property
    def has_options(self) -> bool:
        """Whether the objective's settings are its own."""
        return not self.pairs and self.stage is None


#: the methods of `latentflow distill`
METHODS: dict[str, Method] = {
    **{name: Method(name) for name, one in OBJECTIVES.items() if one.average},
    "mean-flow": Method("mean-flow", usual={"share": 0.5}),
    "alpha-flow": Method("alpha-flow", usual={"share": 0.5}),
    "shortcut": Method("shortcut", usual={"share": 0.5, "finest": 8}),
    # Sampled as consistency models are: to the data, and back.
    "distribution-matching": Method("consistency", stage=GeneratorLoss),
    "reflow": Method("flow-matching", pairs=True),
    "one-step": Method("flow-matching", pairs=True, stage=OneStepLoss),
}


_TRAJECTORIES = 32  # to measure straightness on


class Distillation(Lesson):
    """Learning from a teacher.

    Attributes:
        method: an entry of `METHODS`, called ``name``.
        guidance: at which the teacher is followed.
        folded_guidance: which the student has when it has learned it: that, or what the teacher had learned itself.
        step_counts: the student is made for.

    Raises:
        UserError: the checkpoint cannot be opened, or guidance is asked for where it can have none.
    """

    taught = True

    def __init__(self, checkpoint: str, config: DistillationConfig, method: str) -> None:
        self.method = lookup(METHODS, method, "method")
        self._pipe = open_base(checkpoint)
        learned = float(self._pipe.config.get("folded_guidance", 1.0))
        conditional = self._pipe.takes_text or self._pipe.takes_classes
        self.guidance = self._pipe.usual_guidance if conditional else 1.0
        if config.guidance is not None:
            if not conditional and config.guidance != 1.0:
                raise UserError(
                    f"--guidance {config.guidance:g}: {checkpoint} has no classes or captions to follow",
                    "Leave it out.",
                )
            if learned not in (1.0, config.guidance):
                raise UserError(
                    f"--guidance {config.guidance:g}: {checkpoint} has learned guidance {learned:g} along",
                    "Leave it out: its student has the same.",
                )
            self.guidance = config.guidance if learned == 1.0 else 1.0
        self.folded_guidance = self.guidance if learned == 1.0 else learned
        self.checkpoint, self.name, self._config = checkpoint, method, config
        self.step_counts = (1,) if self.method.stage is OneStepLoss else config.step_counts
        # Neither pairs nor matched distributions are measured by held-out images.
        self.validates = not self.method.pairs and self.method.stage is None

    def refuse_unfit(self, source: Source, size_conditioning: bool, loop: LoopConfig) -> None:
        """Refuse data that ask of the teacher what it does not know, before anything is computed.

        Raises:
            UserError: new classes, data without what the teacher is conditioned on, masks or sizes that it does not
                take, or an early stop by a loss that does not tell when the student is best.
        """
        pipe, shown = self._pipe, self.checkpoint
        new = [name for name in source.classes if name not in class_names(pipe)]
        if source.kind == "class" and new:
            raise UserError(
                f"{shown} does not know the classes {few(new)}",
                "Teach them first: latentflow train DATA --init-from CHECKPOINT; then distil that.",
            )
        if source.kind == "unconditional" and (pipe.takes_text or pipe.takes_classes):
            kind = "captions" if pipe.takes_text else "classes"
            raise UserError(f"{shown} draws {kind}, and the data have none", f"Give images with {kind}.")
        if source.has_masks and not pipe.takes_masks:
            raise UserError(f"the data have masks, and {shown} does not inpaint", "Add --masks none.")
        if size_conditioning != bool(pipe.transformer.config.get("size_conditioning")):
            raise UserError(
                f"--size-conditioning must be as {shown} has it",
                "Leave it out." if size_conditioning else "Add --size-conditioning.",
            )
        if loop.early_stop and (not self.validates or self.name == "progressive"):
            raise UserError(
                f"--early-stop with {self.name}: no loss on held-out images says when its student is best",
                "Leave it out, and give --max-train-steps.",
            )

    def stage(self, flow: FlowConfig) -> Callable[..., FlowLoss]:
        if self.method.pairs:
            return partial(flow_loss, kind=self.method.stage)
        teacher = VelocityTeacher(self._pipe, self.guidance)
        if self.method.stage is GeneratorLoss:
            return partial(flow_loss, kind=GeneratorLoss, teacher=teacher, step_counts=self.step_counts)
        return partial(flow_loss, teacher=teacher)

    def players(self, stage: FlowLoss) -> dict[str, nn.Module]:
        more = {"fake": FakeLoss(stage)} if isinstance(stage, GeneratorLoss) else {}
        return {"flow": stage, **more}

    def data(
        self,
        own: LatentData,
        source: Source,
        prior: list[str],
        built: Built,
        config: RunConfig,
    ) -> LatentData | MixedData:
        """The images; or the teacher's pairs of what they are conditioned on, drawn where they are missing.

        Raises:
            UserError: the folder holds pairs of another teacher, or drawn otherwise.
        """
        if not self.method.pairs:
            return own
        drawing = Drawing(
            what="pair",
            phase="draw pairs",
            seed=config.loop.seed,
            noise=True,
            pixels=built.stage.needs_pixels,
            guidance=self.guidance,
            steps=self._config.pairs_steps,
            # A student's own steps are few, or add noise on their way: its pairs are those of its velocity.
            solver=self._config.pairs_solver or ("heun" if self._pipe.few_steps else None),
        )
        names = [""]
        if source.kind == "text":
            names = [caption for captions in source.all_captions() for caption in captions]
        elif source.kind == "class":
            names = [source.classes[number] for number in sorted({*source.class_ids()})]
        folder = Path(self._config.pairs_folder or Path(config.output) / "pairs")
        asked = in_turn(names, self._config.pairs)
        return drawn_data(self.checkpoint, asked, built.networks, folder, drawing, built.told)

    def lines_after(self, result: Path, stage: FlowLoss, data: LatentData) -> list[str]:
        """How straight the trajectories of the teacher and of the student are, from the same noise under the same
        conditions: of students of pairs."""
        if not self.method.pairs:
            return []
        student = LatentFlowPipeline.from_pretrained(result)
        draws = by_group(
            [SampleUse(row, row) for row in range(min(len(data), _TRAJECTORIES))], groups_of(data)
        )[0]
        batch = load_batch(data, draws)
        device = next(stage.network.parameters()).device
        noise = SampleRandom(0, batch["sample_ids"], device).normal(batch["latents"].shape[1:])
        condition = stage.prompts(to_device(batch, device))
        if stage.masked:  # nothing is known
            channels = student.transformer.config.condition_channels
            condition = replace(condition, channels=noise.new_zeros(len(noise), channels, *noise.shape[2:]))
        found = []
        for pipe, guidance in ((self._pipe, self.guidance), (student, 1.0)):
            velocity = partial(VelocityTeacher(pipe, guidance), condition=condition)
            of_rows = straightness(velocity, noise, time_grid(20))
            found.append(float(of_rows.mean()) / noise[0].numel())
        return [
            f"straightness (mean square of velocity less chord, 0 is straight): teacher {found[0]:.4f}, "
            f"student {found[1]:.4f}"
        ]

    def reminders(self, config: RunConfig, images: int) -> tuple[list[str], list[str]]:
        """Nothing; and what the student learns."""
        pipe = self._pipe
        lines = [
            f"student of {self.checkpoint}: {self.name}, guidance {self.folded_guidance:g} learned along, made for "
            f"{', '.join(map(str, self.step_counts))} evaluations"
        ]
        if pipe.config.prediction != "velocity" or pipe.config.path != "condot":
            lines.append(
                f"the teacher predicts the {pipe.config.prediction} on the path {pipe.config.path}; the student learns "
                "velocities on the straight one, anew from its weights: give it more steps"
            )
        return [], lines

    def flow(self, flow: FlowConfig, checkpoint: str, given: Collection[str]) -> FlowConfig:
        """As `Lesson.flow`, but that a student learns velocities on the straight path."""
        own = {"objective", "path", "path_options", "prediction", "guidance"}
        return super().flow(flow, checkpoint, own.union(given))

    def lost_guidance(self, flow: FlowConfig, checkpoint: str, given: Collection[str]) -> float:
        return 1.0

    def few_steps(self, flow: FlowConfig) -> FewSteps:
        return replace(
            super().few_steps(flow), folded_guidance=self.folded_guidance, step_counts=self.step_counts
        )

    def describe(self) -> dict[str, Any]:
        described = {
            "method": self.name,
            "guidance": self.guidance,
            "teacher": weights_hash(self._pipe.transformer),
            **({"pairs": self._config.pairs} if self.method.pairs else {}),
            **({"step_counts": [*self.step_counts]} if self.method.stage is GeneratorLoss else {}),
        }
        return {"distillation": described}
