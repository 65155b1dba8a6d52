"""Settings of every program that samples images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..errors import UserError
from ..utils.arguments import finite, whole


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """Which adapters, and how much of each."""

    fast: bool = False
    """Draw in a few evaluations, by the adapter that the checkpoint brings for that (its folder `fast`)."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER[:WEIGHT]")] = ()
    """An adapter (LoRA): folder, file, run folder or hub id, and how much of it, such as runs/hats:0.8. Several: once
    more for each."""
    lora_any_base: bool = False
    """Take adapters also if they were made for another base of the same architecture."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(AdapterChoice):
    """How images are drawn, and where they go."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "out.png"
    """The image to write; several become FILE-1, FILE-2, ... A file that exists is kept, and the next free
    number taken, unless --overwrite."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder or hub id; default: the shipped checkpoint."""
    class_labels: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """Names or numbers of classes, for checkpoints trained on classes."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Images per prompt or class."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    steps: int | None = None
    """Steps from noise to image; default: 20, or what a few-step checkpoint was made for, if no solver or edit
    follows it."""
    guidance: float | None = None
    """How hard to follow the prompt or class; 1 is off, and twice as fast. Default: 4, unless the checkpoint has
    learned its guidance along."""
    solver: str | None = None
    """euler, midpoint, heun, ralston, rk4, adams-bashforth-2, adams-bashforth-3, dpm-solver++2m, exponential-adams,
    dopri5, or with fresh noise euler-maruyama, stochastic-heun, ddpm, churn, langevin; default: the scheduler that
    the checkpoint brings, else heun (exponential-adams for networks that predict the data)."""
    negative: str | None = None
    """What to keep away from."""
    scale: int = 1
    """Enlarge the finished image so many times."""
    overwrite: bool = False
    """Write over files that exist."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""

    def check(self) -> None:
        """Refuse at once what would fail after the drawing.

        Raises:
            UserError: a number below 1, out of range or not finite; a file name without an image format, or where
                nothing can be written.
        """
        from ..inference.images import check_format, check_writable
        from ..inference.sample import LARGEST_SEED

        for flag, value in (("-n", self.n), ("--steps", self.steps), ("--scale", self.scale)):
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, not {value}")
        whole("--seed", self.seed, 0, LARGEST_SEED)
        if self.guidance is not None:
            finite("--guidance", self.guidance)
        check_format(self.output)
        check_writable(self.output)
