"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError, lookup


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student takes from its teacher."""

    guidance: float | None = None
    """Guidance scale at which the teacher is followed, and which the student then has without being asked. Empty: that
    at which the teacher draws (4; 1 without a condition)."""
    step_counts: tuple[int, ...] = (1, 2, 4)
    """The numbers of evaluations that the student is made for; it draws in the last of them unless told otherwise.
    (Method one-step: 1.)"""
    pairs: int = 10_000
    """Of the methods reflow and one-step: how many pairs the teacher draws, of the captions or classes of the data in
    turn."""
    pairs_steps: int = 20
    """Steps in which it draws them."""
    pairs_solver: str | None = None
    """By this solver. Empty: the teacher's own."""
    pairs_folder: str | None = None
    """Where they are kept; what is there is not drawn again. Empty: in the run folder."""

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
                    f"--pairs-solver {self.pairs_solver} draws noise on its way, and forgets that which it began with",
                    "Use heun or dopri5.",
                )
        if not self.step_counts or not rising or self.step_counts[0] < 1:
            raise UserError(
                f"--step-counts {' '.join(map(str, self.step_counts))}", "Give rising numbers, such as 1 2 4."
            )
