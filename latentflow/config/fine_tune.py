"""Settings of fine-tuning."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass

from ..errors import UserError

_REPLAYED = 1000  # images: up to here the model's own samples are mixed in by default


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """With --init-from: what keeps the checkpoint from forgetting. See docs/fine-tuning.md."""

    prior_samples: int | None = None
    """Images that the checkpoint draws before it is trained, to be trained on again beside yours. 0: none. Empty:
    200, or 10 of each class if that is more (1000 at most), if there are up to 1000 images of yours."""
    prior_share: float = 0.5
    """Share of each step's samples that are such images."""
    prior_prompts: str | None = None
    """A text file, one caption a line: what a checkpoint of captions draws them of. Best are captions that it was
    trained on. Empty: a word or two that it knows for each."""

    def __post_init__(self) -> None:
        if self.prior_samples is not None and self.prior_samples < 0:
            raise UserError(f"--prior-samples is {self.prior_samples}", "Give a number from 0 on.")
        if not 0 < self.prior_share < 1:
            raise UserError(
                f"--prior-share is {self.prior_share}",
                "Give a share such as 0.5; --prior-samples 0 mixes none in.",
            )

    def samples(self, images: int, classes: int) -> int:
        """How many images the checkpoint draws, for that many images of the data and classes of its own."""
        if self.prior_samples is not None:
            return self.prior_samples
        return min(1000, max(200, 10 * classes)) if images <= _REPLAYED else 0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fine-tuning by an adapter: the checkpoint's weights stay, small factors beside its layers learn (extra `lora`).

    Raises:
        UserError: a setting is out of bounds or has no effect, or peft is missing.
    """

    lora_rank: int = 0
    """Train an adapter of this rank (LoRA) beside the weights of the checkpoint that is started from, 8 is usual; 0
    trains all weights."""
    lora_alpha: float | None = None
    """The adapter is scaled by alpha / rank; default: the rank."""
    lora_dora: bool = False
    """Also learn the length of each row of weights (DoRA)."""
    lora_layers: tuple[str, ...] = ("attention", "feed-forward")
    """attention, feed-forward, all (every linear layer), or parts of layers' names such as blocks.0 cross_attn."""
    lora_text_encoder: bool = False
    """Adapt the text encoder as well, if it was trained with the checkpoint. New words are learnt in any case."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise UserError(f"--lora-rank is {self.lora_rank}", "It must be at least 1; 8 is usual.")
        if not self.lora_rank:
            for one in dataclasses.fields(self):
                if getattr(self, one.name) != one.default:
                    flag = f"--{one.name.replace('_', '-')}"
                    raise UserError(f"{flag} without --lora-rank", "Add --lora-rank 8.")
            return
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"--lora-alpha is {self.lora_alpha}", "It must be above 0; default: the rank.")
        if not self.lora_layers:
            raise UserError("--lora-layers names none", "Name some, or leave it out.")
        if importlib.util.find_spec("peft") is None:
            raise UserError("--lora-rank needs peft", 'pip install "latentflow[lora]"')
