"""A checkpoint, and the settings with which its images are generated and its network is conditioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..data import pixels_to_images
from ..families import FlowModel, Rows
from ..training.loop.data_order import seeded
from ..utils.memory import memory_phase
from ..utils.progress import progress_bar
from .data import ConditionKind

# Streams of random numbers, none of which training uses; see `seeded`.
TRAINING_CAPTIONS, HELD_OUT_CAPTIONS, VALIDATION, CONTROLS = 8, 9, 10, 12
PROBES, FEATURES, VARIATIONS = 20, 21, 22


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A model and how it is sampled.

    Attributes:
        pipeline: our pipeline over the model.
        condition_kind: how the model takes captions.
        settings: further arguments of the pipeline's call.
        batch_size: images that are generated or encoded at once.
    """

    model: FlowModel
    pipeline: Any
    condition_kind: ConditionKind
    settings: dict[str, Any]
    seed: int
    batch_size: int

    def sample(
        self,
        captions: Sequence[str],
        stream: int,
        description: str,
        controls: Sequence[Any] | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Generate one image for each caption, (N, 3, H, W) in [-1, 1].

        Image i depends on the seed, the stream of random numbers and i only.

        Args:
            description: of the captions, for the progress bar.
            controls: the control image of each.
            like: the images (N, 3, H, W) in [-1, 1] of which they are variations.

        Raises:
            UserError: an image holds values that are not finite.
        """
        batches = []
        for start in progress_bar(
            range(0, len(captions), self.batch_size), desc=f"sampling for {description}"
        ):
            batch = list(captions[start : start + self.batch_size])
            condition: dict[str, Any] = {self.condition_kind: batch}
            if self.condition_kind == "nothing":
                condition = {"num_images_per_prompt": len(batch)} if controls is None else {}
            if controls is not None:
                condition["control_image"] = [*controls[start : start + self.batch_size]]
            if like is not None:
                condition["like"] = like[start : start + self.batch_size] / 2 + 0.5
                condition.pop("num_images_per_prompt", None)
            with memory_phase("draw"):
                images = self.pipeline(
                    **condition,
                    **self.settings,
                    generator=[seeded(self.seed, stream, start + i) for i in range(len(batch))],
                    output_type="pt",
                ).images
            metrics.refuse_not_finite(images, f"generated images (those from number {start} on)")
            # In 256 levels, as files and the real images are: else they would be nearer to these than real ones can be.
            batches.append(pixels_to_images((images.float().cpu().clamp(0, 1) * 255).round()))
        return torch.cat(batches)

    def rows(self, captions: list[str]) -> Rows:
        """Return the captions as conditions of the flow model."""
        if self.condition_kind == "nothing":
            return self.model.null(len(captions))
        prompts = self.condition_kind == "prompt"
        return self.model.encode_prompt(captions) if prompts else self.model.encode_class(captions)
