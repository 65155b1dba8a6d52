"""The settings of a fine-tune, and the defaults in which it differs from a training from scratch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from ...config import LoopConfig
from ...errors import UserError
from ...utils.flags import flag_of
from ..loop.distributed import samples_per_step

FEW = 50  # images: from here down, each is used as often as it takes to learn it
_USES = 250  # of each of so few; of more, by the square root of their number fewer
_SLOWER = 5  # times the learning rate from scratch
_FASTER = 6  # times the rate from scratch: of an adapter (docs/measurements/fine-tuning.md)
_LEAST_HELD_OUT_OF = 20  # images: of fewer none is held out by default


def held_out_share(given: Collection[str], validation: float, images: int) -> float:
    """Return the share of the images to hold out: by default none of very few, of which each is needed."""
    return 0.0 if "validation" not in given and images < _LEAST_HELD_OUT_OF else validation


def fitted(
    loop: LoopConfig,
    given: Collection[str],
    images: int,
    own_share: float,
    adapter: bool = False,
    student: bool = False,
) -> LoopConfig:
    """Return the loop's settings for a fine-tune. What is ``given`` stays; a preset's are for training from scratch.

    The rate is a fifth of that from scratch, but for the tables of classes and words: there it stays, since in some
    hundred steps of AdamW at a fifth a new row could not get as far from where it starts as the known ones are.

    The weight average keeps its ramp: it begins at the checkpoint's weights and then spans the last tenth of the
    steps so far. Without the ramp a decay of 0.999 would still hold 74 % of the old weights after 300 steps.

    The rate decays from the start, with which docs/measurements/fine-tuning.md was measured.

    Args:
        loop: as flags, file, preset and defaults have it.
        given: keys of what flags or a file set.
        images: number of images of the data; ``repeats`` decide which are used more often, not their average use.
        own_share: share of the samples that are images of the data.
        adapter: an adapter is trained: two small factors that start at nothing. At the rate from scratch it has not
            learned 20 images when a full fine-tune has; at six times that rate it has.
        student: it follows a teacher; its adapter learns at the rate from scratch, with which it was measured.

    Raises:
        UserError: a step has one sample, and should have some of two kinds; an adapter should be trained with Muon.
    """
    check_shared(loop, own_share)
    changes: dict[str, Any] = {}
    rate = loop.learning_rate
    if adapter and loop.optimizer == "muon":
        loop = without_muon(loop, given)
        rate /= 2  # a preset's, which is twice AdamW's
        changes["learning_rate"] = rate
    if not adapter:
        changes["learning_rate"] = rate / _SLOWER
    elif not student:
        changes["learning_rate"] = rate * _FASTER
    if not adapter and "learning_rate" not in given:
        changes["lr_embeddings"] = loop.lr_embeddings * _SLOWER
    own = own_share * samples_per_step(loop)
    steps = math.ceil(_USES * math.sqrt(images * min(images, FEW)) / own)
    steps = min(max(steps, 100), loop.max_train_steps)
    changes["max_train_steps"] = steps
    if "max_train_steps" in given:
        steps = loop.max_train_steps
    changes["lr_warmup_steps"] = min(loop.lr_warmup_steps, max(1, steps // 10))
    changes["lr_decay_share"] = 1.0
    for name, parts in (("validation_steps", 10), ("preview_steps", 4), ("checkpointing_steps", 4)):
        changes[name] = min(getattr(loop, name), max(1, steps // parts))
    kept = {name: value for name, value in changes.items() if name not in given}
    return dataclasses.replace(loop, **kept)


def without_muon(loop: LoopConfig, given: Collection[str]) -> LoopConfig:
    """Return the settings for an adapter where a preset's optimiser is Muon, with AdamW.

    Raises:
        UserError: Muon is ``given``.
    """
    if "optimizer" in given:
        raise UserError(
            "--optimizer muon with an adapter: it orthogonalises whole matrices, of which an adapter has factors",
            "Leave it out: adapters are trained with AdamW.",
        )
    return dataclasses.replace(loop, optimizer="adamw")


def check_shared(loop: LoopConfig, own_share: float) -> None:
    """Refuse steps of one sample, where some are the user's and some the checkpoint's.

    Raises:
        UserError: a step has one sample.
    """
    if own_share < 1 and samples_per_step(loop) < 2:
        raise UserError(
            "a step of one sample cannot have --prior-share of it from the checkpoint",
            "Use --gradient-accumulation-steps 4 or so, or --prior-samples 0.",
        )


def usual(loop: LoopConfig, images: int, own_share: float, adapter: bool) -> tuple[int, float]:
    """Return the steps and the learning rate of such a fine-tune where no flag sets them, at the loop's batch size."""
    samples = LoopConfig(
        train_batch_size=loop.train_batch_size, gradient_accumulation_steps=loop.gradient_accumulation_steps
    )
    chosen = fitted(samples, (), images, own_share, adapter)
    return chosen.max_train_steps, chosen.learning_rate


def fine_tuning_lines(
    checkpoint: str,
    loop: LoopConfig,
    given: Collection[str],
    images: int,
    own_share: float,
    folded_guidance: float = 1.0,
    random_flip: bool = False,
) -> list[str]:
    """Return the plan's lines about what differs from a training from scratch.

    Args:
        folded_guidance: guidance that is part of the checkpoint's weights, and will not be of the result's.
        random_flip: mirror images are trained on as well.
    """
    own = own_share * loop.max_train_steps * samples_per_step(loop)
    chosen = [
        f"{flag_of(name)} {getattr(loop, name):g}"
        for name in ("learning_rate", "lr_embeddings", "max_train_steps", "lr_warmup_steps", "lr_decay_share")
        if name not in given and ("learning_rate" not in given or name != "lr_embeddings")
    ]
    lines = [
        f"fine-tuning {checkpoint}: each image is used about {own / images:.0f} times"
        + (f"; the settings for that, unless you give others: {' '.join(chosen)}" if chosen else "")
    ]
    if folded_guidance != 1.0:
        lines.append(
            f"WARNING: guidance {folded_guidance:g} is already in the weights of {checkpoint}, but this objective does "
            "not distil it: the result is guided while it generates, and needs a lower --guidance than others"
        )
    if images <= FEW:
        lines.append(
            f"few images ({images}): at the end it is measured how close generated images come to copies of them"
            + ("" if random_flip else "; --random-flip doubles them, where left and right do not matter")
        )
    return lines
