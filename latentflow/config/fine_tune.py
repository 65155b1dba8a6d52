"""Settings of fine-tuning, and of distillation."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Annotated

from ..errors import UserError, lookup
from ..utils.flags import Essential

_REPLAYED = 1000  # images: up to here the model's own samples are mixed in by default


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Protection of the checkpoint of --init-from against forgetting (docs/fine-tuning.md)."""

    prior_samples: int | None = None
    """Number of images that the checkpoint generates before training, which are then trained on beside yours. 0:
    none. Default: 200, or 10 per class if that is more (at most 1000), if you have at most 1000 images; else
    none."""
    prior_share: float = 0.5
    """Share of every step's samples that is such images."""
    prior_prompts: str | None = None
    """Text file with one caption per line, for these images; best are captions that the checkpoint was trained on.
    Default: one or two words of its vocabulary for each."""

    def __post_init__(self) -> None:
        if self.prior_samples is not None and self.prior_samples < 0:
            raise UserError(f"--prior-samples is {self.prior_samples}", "Give a number from 0 on.")
        if not 0 < self.prior_share < 1:
            raise UserError(
                f"--prior-share is {self.prior_share}",
                "Give a share such as 0.5; --prior-samples 0 mixes none in.",
            )

    def samples(self, images: int, classes: int) -> int:
        """Return how many images the checkpoint generates, given the numbers of training images and of its classes."""
        if self.prior_samples is not None:
            return self.prior_samples
        return min(1000, max(200, 10 * classes)) if images <= _REPLAYED else 0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fine-tuning by an adapter: the weights stay frozen, small factors beside them are trained (extra `lora`).

    Raises:
        UserError: a setting is out of bounds or has no effect, or peft is missing.
    """

    lora_rank: Annotated[int, Essential("model")] = 0
    """Train an adapter (LoRA) of this rank, usually 8, beside the frozen weights. 0: train all weights."""
    lora_alpha: float | None = None
    """The adapter is multiplied by alpha / rank. Default: the rank."""
    lora_dora: bool = False
    """Also learn the length of each row of the weights (DoRA)."""
    lora_layers: tuple[str, ...] = ("attention", "feed-forward")
    """Layers with an adapter: attention, feed-forward, all (every linear layer), or parts of layer names, such as
    blocks.0 cross_attn."""
    lora_text_encoder: bool = False
    """Adapt the text encoder too, if it was trained with the checkpoint. New words are learned in any case."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise UserError(f"--lora-rank is {self.lora_rank}", "It must be at least 1; 8 is usual.")
        if not self.lora_rank:
            for setting in dataclasses.fields(self):
                if getattr(self, setting.name) != setting.default:
                    flag = f"--{setting.name.replace('_', '-')}"
                    raise UserError(f"{flag} without --lora-rank", "Add --lora-rank 8.")
            return
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"--lora-alpha is {self.lora_alpha}", "It must be above 0; default: the rank.")
        if not self.lora_layers:
            raise UserError("--lora-layers names none", "Name some, or leave it out.")
        if importlib.util.find_spec("peft") is None:
            raise UserError("--lora-rank needs peft", 'pip install "latentflow[lora]"')


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
