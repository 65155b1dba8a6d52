"""Settings of the training loop. Names follow diffusers' training scripts."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError

SNAPSHOTS = 32  # of a run: enough for post-hoc averages to agree with tracked ones to 1e-3 (docs/training.md)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop: optimiser, schedule, precision, checkpoints and reports."""

    max_train_steps: int = 20_000
    """Optimiser steps in all; a resumed run counts on from where it stopped."""
    train_batch_size: int = 64
    """Samples in one forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Forward passes for one optimiser step."""
    auto_micro_batch: bool = False
    """When memory runs out, pass batches in halves, then quarters, ...; the samples of a step stay the same."""
    learning_rate: float = 2e-3
    """Peak learning rate. Right for a network of width 256; the best one falls as the width grows (docs/recipe.md)."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up: none, or down to zero at max_train_steps."""
    lr_decay_share: float = 0.2
    """Share of the run, at its end, over which the learning rate decays; of a fine-tune or student 1 unless given."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up."""
    lr_layer_decay: float = 1.0
    """Each block of the network learns at this factor of the rate of the next one, so that the first ones, and what is
    before them, change least (dit; 0.8 is usual for fine-tuning). Tables of classes and words keep the full rate."""
    lr_embeddings: float = 1.0
    """Factor on the learning rate of the tables of classes and words."""
    optimizer: Literal["adamw", "adamw-8bit", "muon", "schedule-free"] = "adamw"
    """adamw; muon (orthogonalised momentum for the matrices, AdamW for the rest); schedule-free (AdamW that averages
    its weights instead of decaying its rate; extra `schedule-free`); adamw-8bit (moments in 8 bits, a quarter of the
    memory; extra `bitsandbytes`)."""
    adam_beta1: float = 0.9
    """AdamW's first decay; of schedule-free the share of its average in the weights that are trained."""
    adam_beta2: float = 0.95
    """AdamW's second decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    ema_decay: float = 0.999
    """Decay of the weight average, reached gradually: min(ema_decay, (1 + step) / (10 + step)). Not used by
    `--optimizer schedule-free`, whose own average takes its place."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths, such as 0.05 0.1, of power-function averages of the weights that are tracked as well. From
    their snapshots `latentflow average` makes the average of any length near these, after the run."""
    ema_snapshot_steps: int = 0
    """Steps between snapshots of these averages; 0 for a 32nd of the run."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay in float32. auto: bf16 where the device computes in it, else none. fp16 needs
    a GPU."""
    compile: bool = False
    """torch.compile the networks (minutes of warm-up; worth it on long runs)."""
    seed: int = 0
    """Decides weights, data order, noise and times."""
    num_workers: int = 0
    """Processes that load data; cached latents need none."""
    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Checkpoints kept; older ones of this run are removed."""
    validation_steps: int = 500
    """Steps between validations; 0 for none."""
    early_stop: int = 0
    """End after this many validations that were not better than the best one; the result is the best one's weights,
    also where the end is reached. 0: go on to the end, the result is of the end."""
    preview_steps: int = 1000
    """Steps between preview images; 0 for none."""
    log_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also report curves and previews to TensorBoard (files in the run folder; extra `tensorboard`) or to Weights &
    Biases (extra `wandb`; without network under WANDB_MODE=offline)."""
    shard: bool = field(default_factory=lambda: _from_environment("ACCELERATE_USE_FSDP"))
    """Spread weights, gradients, average and optimiser over the processes (FSDP2) instead of holding them in each.
    `accelerate launch --use_fsdp` switches it on."""
    profile: bool = False
    """Write a trace of a few steps and a table of where their time goes to the run's folder `profile`."""
    max_nonfinite_steps: int = 10
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    allow_changes: bool = False
    """Resume although the data or the architecture changed (the difference is printed)."""

    def __post_init__(self) -> None:
        for names, allowed, words in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                if not allowed(value):
                    raise UserError(f"--{name.replace('_', '-')} is {value}", words)
        package, extra = _PACKAGES.get(self.optimizer, ("torch", ""))
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--optimizer {self.optimizer} needs the package {package}",
                f'pip install "latentflow[{extra}]"',
            )
        if self.ema_lengths:
            from ..training.loop.ema import exponent

            for length in self.ema_lengths:
                exponent(length)  # raises where there is none
        if self.optimizer == "schedule-free" and self.lr_scheduler != "constant":
            raise UserError(
                f"--optimizer schedule-free with --lr-scheduler {self.lr_scheduler}: its rate does not decay",
                "Add --lr-scheduler constant.",
            )
        if self.optimizer == "schedule-free" and self.adam_beta1 == 0:
            raise UserError("--optimizer schedule-free with --adam-beta1 0", "Use 0.9, or up to 0.98.")

    @property
    def snapshot_steps(self) -> int:
        """Steps between snapshots of the power-function averages; 0 without them."""
        if not self.ema_lengths:
            return 0
        return self.ema_snapshot_steps or math.ceil(self.max_train_steps / SNAPSHOTS)


def _from_environment(name: str) -> bool:
    """Return whether an environment variable says yes, in the words that accelerate takes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


# Of optimisers that are others' work: the package, and the extra that brings it.
_PACKAGES = {
    "schedule-free": ("schedulefree", "schedule-free"),
    "adamw-8bit": ("bitsandbytes", "bitsandbytes"),
}
# Settings, what they may be, and how to say so.
_BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
         "checkpoints_total_limit", "log_steps", "max_nonfinite_steps"),
        lambda value: value >= 1,
        "It must be at least 1.",
    ),
    (
        ("learning_rate", "weight_decay", "max_grad_norm", "lr_warmup_steps", "num_workers", "validation_steps",
         "preview_steps", "ema_snapshot_steps", "early_stop", "lr_embeddings"),
        lambda value: value >= 0,
        "It cannot be negative.",
    ),
    (("ema_decay", "adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "It must be from 0 to below 1."),
    (("lr_layer_decay",), lambda value: 0 < value <= 1, "It must be above 0, and at most 1."),
    (("lr_decay_share",), lambda value: 0 <= value <= 1, "It must be from 0 to 1."),
)  # fmt: skip
