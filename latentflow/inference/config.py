"""Flags of every program that samples images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import UserError
from ..utils.arguments import finite, whole
from .checkpoint import AdapterChoice
from .images import check_format, check_writable
from .sample import LARGEST_SEED


@dataclass(frozen=True, kw_only=True)
class DrawingConfig(AdapterChoice):
    """Settings for sampling images and writing them."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "out.png"
    """The image to write; several become FILE-1, FILE-2, ... Files that exist are kept, and the next free number is
    taken, unless --overwrite is given."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder or hub id; default: the shipped checkpoint."""
    class_labels: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """Names or numbers of classes, for checkpoints that were trained on classes."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Images per prompt or class."""
    seed: int = 0
    """Image i is sampled with seed + i."""
    steps: int | None = None
    """Steps from noise to image; default: 20, or those of a few-step checkpoint where neither a solver nor an edit
    needs more."""
    guidance: float | None = None
    """Guidance scale: how closely to follow the prompt or class; 1 is off, and twice as fast. Default: 4, unless
    guidance was distilled into the checkpoint."""
    solver: str | None = None
    """euler, midpoint, heun, ralston, rk4, adams-bashforth-2, adams-bashforth-3, dpm-solver++2m, exponential-adams,
    dopri5, or with fresh noise in every step euler-maruyama, stochastic-heun, ddpm, churn, langevin; default: the
    checkpoint's own scheduler, else heun (exponential-adams for networks that predict the data)."""
    negative: str | None = None
    """Negative prompt: what the images should not show."""
    scale: int = 1
    """Enlarge the finished images by this factor."""
    overwrite: bool = False
    """Replace files that exist."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""

    def check(self) -> None:
        """Refuse at once what would fail after the sampling.

        Raises:
            UserError: a number is below 1, out of range or not finite; the file's name has no image format, or
                nothing can be written there.
        """
        for flag, value in (("-n", self.n), ("--steps", self.steps), ("--scale", self.scale)):
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        whole("--seed", self.seed, 0, LARGEST_SEED)
        if self.guidance is not None:
            finite("--guidance", self.guidance)
        check_format(self.output)
        check_writable(self.output)
