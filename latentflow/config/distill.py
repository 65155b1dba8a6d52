"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import UserError, lookup
from ..utils.flags import Essential


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The teacher, and how the student learns from it."""

    guidance: Annotated[float | None, Essential("training")] = None
    """Guidance scale of the teacher, which the student learns and then has without being asked for. Default: the
    teacher's usual one (4; 1 without a condition)."""
    step_counts: Annotated[tuple[int, ...], Essential("training")] = (1, 2, 4)
    """Numbers of evaluations that the student is made for; it uses the last one unless asked otherwise. (Method
    one-step: 1.)"""
    pairs: int = 10_000
    """Methods reflow and one-step: number of pairs of noise and image that the teacher generates, for the captions
    or classes of the data in turn."""
    pairs_steps: int = 20
    """Number of steps in which it generates them."""
    pairs_solver: str | None = None
    """Solver with which it generates them. Default: the teacher's own."""
    pairs_folder: str | None = None
    """Folder in which the pairs are kept; pairs that are in it are not generated again. Default: `pairs` in the run
    folder."""

    def __post_init__(self) -> None:
        if self.guidance is not None and not 0.0 < self.guidance < float("inf"):
            raise UserError(f"--guidance is {self.guidance}", "Use 1 for none; 2 to 5 are usual.")
        rising = [*self.step_counts] == sorted({*self.step_counts})
        for name in ("pairs", "pairs_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "Give at least 1.")
        if self.pairs_solver is not None:
            from ..flow import SOLVERS

            solver = lookup(SOLVERS, self.pairs_solver, "solver")
            if solver.stochastic:
                raise UserError(
                    f"--pairs-solver {self.pairs_solver} adds fresh noise on its way, and forgets the first noise",
                    "Use heun or dopri5.",
                )
        if not self.step_counts or not rising or self.step_counts[0] < 1:
            raise UserError(
                f"--step-counts {' '.join(map(str, self.step_counts))}", "Give rising numbers, such as 1 2 4."
            )
