"""The common part of the losses of generators: the conditions of a batch, and the random numbers of its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import lookup
from ...models import Condition
from ..loop.random_numbers import RANDOM_NUMBERS, SampleRandom
from ..loop.trained_module import WeightAverage
from .control import ControlImages


class ConditionedLoss(nn.Module):
    """The common part of the losses of generators; a loss has ``forward`` (batch -> ``loss`` and more).

    A batch holds ``latents`` (B, ...); ``sample_ids``, B ints, on which all that is drawn depends; what `prompts`
    needs; with ``masking`` what that needs. It may hold ``weights`` (B,), factors on the losses in their mean.

    Args:
        network: called with noisy data, times and a condition.
        seed: of the run.
        condition_dropout: share of the samples whose condition is replaced by the null.
        text_encoder: encodes ``input_ids``; trained along.
        masking: hides a part of every image, for a network that learns to inpaint: batch -> channels (B, C', h, w).
        control: adds the control images, for a network that takes them.
        random_numbers: the generator of noise and times, a key of `RANDOM_NUMBERS`.

    Attributes:
        masked: whether the network sees masked images.
        needs_pixels: whether a batch must hold ``pixels``.
        learns_from_average: whether the loop must hand over the weight average (`use_average`).
    """

    learns_from_average = False

    def __init__(
        self,
        network: nn.Module,
        seed: int,
        condition_dropout: float,
        text_encoder: PreTrainedModel | None = None,
        masking: Callable[[Mapping[str, Any]], Tensor] | None = None,
        *,
        control: ControlImages | None = None,
        random_numbers: str = "philox",
    ) -> None:
        super().__init__()
        self.network, self.control = network, control
        self.text_encoder = text_encoder
        self.seed, self.condition_dropout, self.masking = seed, condition_dropout, masking
        self._make_random = lookup(RANDOM_NUMBERS, random_numbers, "random_numbers")
        self.masked = self.needs_pixels = masking is not None
        self.average: WeightAverage | None = None

    @property
    def trains_text(self) -> bool:
        """True if the text encoder is trained along."""
        return self.text_encoder is not None

    def random(self, batch: dict[str, Any]) -> SampleRandom:
        """Return the random numbers of a batch."""
        return self._make_random(self.seed, batch["sample_ids"], batch["latents"].device)

    def dropped(self, random: SampleRandom) -> Tensor:
        """Draw the rows (B,) bool whose condition is replaced by the null; none in validation."""
        return random.uniform() < (self.condition_dropout if self.training else 0.0)

    def condition(self, batch: dict[str, Any], drop: Tensor | None = None) -> Condition:
        """Return what the network is given beside the latents: prompts, control images, and what a mask leaves of each
        image."""
        condition = self.prompts(batch, drop)
        if self.control is not None:
            condition = self.control(condition, batch, training=self.training)
        if self.masking is None:
            return condition
        return dataclasses.replace(condition, channels=self.masking(batch))

    def prompts(self, batch: dict[str, Any], drop: Tensor | None = None) -> Condition:
        """Return classes, captions and sizes of a batch; the rows where ``drop`` (B,) holds get the null.

        The batch holds ``class_labels`` (B,); or ``input_ids`` and ``attention_mask`` (B, L); or ``text`` (B, L, D) and
        ``text_mask`` (B, L); or none of these; perhaps ``unlabelled`` (B,) bool, rows that get the null as well;
        perhaps ``sizes`` (B, 6).
        """
        text, mask = batch.get("text"), batch.get("text_mask")
        if self.text_encoder is not None and "input_ids" in batch:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            text = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask.bool()
        if "unlabelled" in batch:
            drop = batch["unlabelled"] if drop is None else drop | batch["unlabelled"]
        return Condition(
            class_labels=batch.get("class_labels"),
            text=text,
            text_mask=mask,
            sizes=batch.get("sizes"),
            drop=drop,
        )

    def use_average(self, average: WeightAverage) -> None:
        """Learn from this average of the module's weights; without one, from the weights as they are."""
        self.average = average


def weighted_mean(error: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the mean of the rows (B,), each times its sample's weight."""
    return (error * batch["weights"] if "weights" in batch else error).mean()
