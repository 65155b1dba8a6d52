"""What a run learns from: the data; or, see `Distillation`, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from ..config import FlowConfig, LoopConfig, RunConfig
from ..data import Source
from ..families.latentflow import FewSteps
from ..flow import AverageObjective
from .fine_tune.base import lost_guidance, with_base_flow
from .fine_tune.prior import MixedData, asked_of, prior_data
from .losses.average_velocity import flow_loss
from .losses.flow import FlowLoss
from .losses.latent_data import LatentData
from .trained_model import Built


class Lesson:
    """Learning from the data, beside which a fine-tune sees samples of its checkpoint again.

    Attributes:
        taught: whether there is a teacher.
        validates: whether held-out images measure what is trained.
    """

    taught = False
    validates = True

    def refuse_unfit(self, source: Source, size_conditioning: bool, loop: LoopConfig) -> None:
        """Refuse data and settings from which this cannot be learned, before anything is computed."""

    # ---- of a fine-tune: `config.init_from` is its checkpoint ----

    def reminders(self, config: RunConfig, images: int) -> tuple[list[str], list[str]]:
        """Of what the checkpoint draws the samples that it is trained on again; and lines about that for the plan."""
        assert config.init_from
        prior, line = asked_of(config.init_from, config.fine_tuning, images, config.loop.seed, config.vae)
        return prior, [line]

    def flow(self, flow: FlowConfig, checkpoint: str, given: Collection[str]) -> FlowConfig:
        """``flow`` with what is not ``given`` as the checkpoint has it."""
        return with_base_flow(flow, checkpoint, given)

    def lost_guidance(self, flow: FlowConfig, checkpoint: str, given: Collection[str]) -> float:
        """The guidance that the checkpoint has learned along and the run does not; 1 for none."""
        return lost_guidance(flow, checkpoint, given)

    # ---- training ----

    def stage(self, flow: FlowConfig) -> Callable[..., FlowLoss]:
        """What makes the module that is trained, called as `FlowLoss` is."""
        return flow_loss

    def players(self, stage: FlowLoss) -> dict[str, nn.Module]:
        """What the loop trains: the stage, and what learns beside it."""
        return {"flow": stage}

    def data(
        self,
        own: LatentData,
        source: Source,
        prior: list[str],
        built: Built,
        config: RunConfig,
    ) -> LatentData | MixedData:
        """What it is trained on.

        Args:
            own: the images of ``source``.
            prior: see `reminders`.
            built: what is trained.
            config: of the run.

        Raises:
            UserError: the run folder holds samples of another checkpoint, or drawn otherwise.
        """
        if not prior:
            return own
        folder = Path(config.output) / "prior"
        pixels = built.stage.needs_pixels
        samples = prior_data(
            str(config.init_from), prior, built.networks, folder, config.loop.seed, pixels, built.told
        )
        return MixedData(own, samples, config.fine_tuning.prior_share)

    def describe(self) -> dict[str, Any]:
        """Plain values that a resumed run must have as well."""
        return {}

    # ---- the result ----

    def few_steps(self, flow: FlowConfig) -> FewSteps:
        """How the network that is trained is followed."""
        choices = flow.choices()
        if not choices.objective.average:
            return FewSteps()
        settings: AverageObjective = choices.settings
        return FewSteps(
            average=True,
            consistency=settings.sampler == "consistency",
            folded_guidance=settings.guidance,
        )

    def lines_after(self, result: Path, stage: FlowLoss, data: LatentData) -> list[str]:
        """What to tell of the pipeline ``result`` when it is trained."""
        return []
