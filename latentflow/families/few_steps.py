"""Settings of few-step sampling, of a checkpoint or an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import UserError
from ..utils.files import check_types

if TYPE_CHECKING:
    from .model import FlowModel

LARGEST_STEPS = 1000  # of `FewSteps.step_counts`


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """Settings of few-step sampling, of a checkpoint or an adapter; the defaults are an ordinary velocity's.

    Attributes:
        average: the network predicts average velocities (arXiv:2505.13447).
        consistency: those lead to the data only: between steps noise is added again.
        folded_guidance: scale of the guidance that is distilled into the weights; where it is not 1, none is added.
        step_counts: the numbers of steps, of one evaluation each, that it was made for, rising.

    Raises:
        UserError: the settings contradict each other.
    """

    average: bool = False
    consistency: bool = False
    folded_guidance: float = 1.0
    step_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.consistency and not self.average:
            raise UserError("consistency without average", "A consistency model predicts average velocities.")
        check_types("few-step settings", asdict(self), get_type_hints(FewSteps))
        if any(not 1 <= count <= LARGEST_STEPS for count in self.step_counts):
            raise UserError(f"step_counts {[*self.step_counts]}", "Give numbers of steps, such as [1, 2, 4].")

    def __bool__(self) -> bool:
        return self.average or bool(self.step_counts)

    @staticmethod
    def of(settings: dict[str, Any]) -> FewSteps:
        """Build from plain values, as `plain` and a pipeline's config have them.

        Raises:
            TypeError, UserError: they are no such settings.
        """
        return FewSteps(**{**settings, "step_counts": tuple(settings.get("step_counts") or ())})

    def plain(self) -> dict[str, Any]:
        """Return plain values without the defaults, so that the config of an ordinary checkpoint stays as it is."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        written = {entry.name for entry in fields(self) if values[entry.name] != entry.default}
        if self.average:
            written.add("folded_guidance")
        values["step_counts"] = [*self.step_counts]
        return {name: value for name, value in values.items() if name in written}


def require_velocity(model: FlowModel) -> None:
    """Refuse what follows the velocity of a model that has none.

    Raises:
        UserError: says what the checkpoint can do.
    """
    if model.draws_tokens:
        raise UserError(
            "this checkpoint draws tokens: it jumps from one to another, and has no velocity that solvers, edits, "
            "inversion or interpolation could follow",
            "Draw with it, vary an image (latentflow edit --method image-to-image, in Python "
            "LatentFlowImg2ImgPipeline) or fill a hole (latentflow inpaint).",
        )
    if not model.has_velocity:
        raise UserError(
            "this checkpoint is a consistency model: it jumps to the image, and has no velocity that solvers, edits, "
            "inversion or interpolation could follow",
            "Without a solver, draw with it, vary an image (latentflow edit --method image-to-image, in Python "
            "LatentFlowImg2ImgPipeline) or inpaint by method pnp-flow; for the rest open the model that it was "
            "distilled from.",
        )
