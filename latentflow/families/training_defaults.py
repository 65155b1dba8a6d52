"""Settings of a fine-tune that nobody gives, by family, from measured or documented practice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .model import FlowModel


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """Settings of a fine-tune that suit a model.

    The rates are constant ones of AdamW, for an adapter whose alpha is its rank.

    Attributes:
        lora_rank: of an adapter. diffusers' training programs have 4, SimpleTuner, ai-toolkit and OneTrainer 16.
        learning_rate: of an adapter.
        full_learning_rate: of all weights; 1e-5 as in the commands of diffusers' examples/text_to_image.
        condition_dropout: share of the samples whose prompt is replaced by the empty one, in [0, 1]; see `usual`.
        posterior: which latents of an image are learned: a sample of the autoencoder's posterior, or its mode. An
            autoencoder without one has the same latents either way.
        source: a short phrase that says where the settings come from.
    """

    lora_rank: int = 16
    learning_rate: float = 1e-4
    full_learning_rate: float = 1e-5
    condition_dropout: float
    posterior: Literal["sample", "mode"] = "sample"
    source: str

    @staticmethod
    def usual(model: FlowModel) -> TrainingDefaults:
        """Return the settings of a model whose family has none of its own.

        A tenth of the prompts is dropped, as SimpleTuner recommends, where guidance also evaluates the network under
        the empty prompt: an adapter changes what the network predicts there, whether it is trained for it or not. None
        is dropped where the network takes its guidance scale as an input or draws without guidance: it never sees the
        empty prompt.
        """
        found = model.distilled
        guided = model.usual_guidance != model.unguided and (found is None or found.guided)
        dropout = 0.1 if guided and not model.embeds_guidance else 0.0
        return TrainingDefaults(condition_dropout=dropout, source="usual in SimpleTuner and ai-toolkit")

    def as_in(self, source: str, **changes: Any) -> TrainingDefaults:
        """Return the settings of a family for which some are documented: its learning rate, and what ``changes`` names.

        Args:
            source: name of the program, preset or page that has them.
            changes: settings that it has; the rank of 4 of diffusers' programs is none of them.
        """
        others = {"lora_rank": "rank", "condition_dropout": "prompt dropout"}
        usual = [words for name, words in others.items() if name not in changes and getattr(self, name)]
        rest = f"; {' and '.join(usual)}: SimpleTuner" if usual else ""
        return replace(self, source=source + rest, **changes)


def documented(source: str, **changes: Any) -> Callable[[TrainingDefaults], TrainingDefaults]:
    """Return what a family has as ``documented_training``: the change to its settings; see `TrainingDefaults.as_in`."""
    return lambda defaults: defaults.as_in(source, **changes)
