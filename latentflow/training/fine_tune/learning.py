"""Measure what a fine-tune has learnt: the loss on its training images before and after, with captions and without.

The loss of the steps does not say it: it falls as soon as the network has adopted the style of the images. Only when it
is far lower with an image's caption than without does the caption draw that image.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ...data import Source
from ..loop.data_order import SampleUse
from ..loop.loader import by_group, groups_of, load_batch, to_device
from ..losses.conditioned import ConditionedLoss
from ..losses.flow import FlowLoss
from ..losses.latent_data import LatentData
from ..report.verdict import LEARNING

_IMAGES, _NOISES = 64, 4


def is_plain(loss: ConditionedLoss) -> TypeGuard[FlowLoss]:
    """Return whether this is the loss of velocities, which measures a network by itself."""
    return isinstance(loss, FlowLoss) and not loss.choices.objective.average


class LearningMeter:
    """The losses on some training images, each at four noises and times that are always the same.

    So before and after are compared in pairs, and differ only by what the network has learnt. Nothing is masked, also
    where the network learns to inpaint: this is about generating; unless it does nothing else.

    Args:
        loss: of the networks as the run begins, on whose device it is measured.
        data: the training images.
        source: the same, with captions.
        usual: the steps and the learning rate of such a fine-tune by default, for the verdict.
        images: that are measured, at most.
        batch_size: rows of one forward pass.
        fills: the network draws nothing without a mask.
    """

    def __init__(
        self,
        loss: FlowLoss,
        data: LatentData,
        source: Source,
        device: torch.device,
        usual: tuple[int, float],
        images: int = _IMAGES,
        batch_size: int = _IMAGES,
        fills: bool = False,
    ) -> None:
        self._usual, self._batch_size = usual, batch_size
        self._loss, self._data, self._device = copy.copy(loss.to(device)), data, device
        self._loss.training = False  # the copy's own: it shares the networks only
        self._loss.masking = loss.masking if fills else None
        count = min(images, len(data))
        self._images = [place * len(data) // count for place in range(count)]
        self._total = len(source)
        captions = [source.examples[row].captions for row in range(0, len(source), -(-len(source) // count))]
        self._distinct = len({*captions}) / len(captions) if source.kind == "text" else 0.0
        with torch.random.fork_rng(), torch.no_grad(), _evaluating(loss):
            self._before = self._losses()

    def write(self, run: Path) -> None:
        """Measure the trained networks, in evaluation mode and with averaged weights, and write ``learning.json``."""
        after = self._losses()
        fall = self._before - after
        found = {
            "images": self._total,
            "measured": len(self._images),
            "before": float(self._before.mean()),
            "after": float(after.mean()),
            "error": float(fall.std() / len(fall) ** 0.5) if len(fall) > 1 else 0.0,
            "without_captions": float(self._losses(drop=True).mean()),
            "distinct_captions": self._distinct,
            "usual_steps": self._usual[0],
            "usual_learning_rate": self._usual[1],
        }
        (run / LEARNING).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def _losses(self, drop: bool = False) -> Tensor:
        """Return the mean losses (N,) of the images; with ``drop`` without their captions or classes."""
        loss = copy.copy(self._loss)
        if drop:
            loss.dropped = lambda random: random.uniform() < 1.0  # type: ignore[method-assign]
        uses = [SampleUse(index, index * _NOISES + k) for index in self._images for k in range(_NOISES)]
        losses: dict[int, list[Tensor]] = {index: [] for index in self._images}
        for start in range(0, len(uses), self._batch_size):
            for part in by_group(uses[start : start + self._batch_size], groups_of(self._data)):
                batch = to_device(load_batch(self._data, part), self._device)
                for use, value in zip(part, loss(batch)["per_sample"].double().cpu(), strict=True):
                    losses[use.index].append(value)
        return torch.stack([torch.stack(values).mean() for values in losses.values()])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context all parts are in evaluation mode; afterwards each is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
