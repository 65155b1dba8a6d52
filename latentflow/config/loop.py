"""Settings of the training loop. Names follow diffusers' training scripts."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from ..errors import UserError
from ..utils.flags import Essential, flag_of
from ..utils.libraries import missing

SNAPSHOTS = (
    32  # of a run: enough for post-hoc averages to agree with tracked ones to 1e-3 (docs/reference/flags.md)
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Training: steps, optimiser, learning rate, precision, checkpoints and reports."""

    max_train_steps: Annotated[int, Essential("training")] = 20_000
    """Optimiser steps, counted over all resumptions of the run."""
    train_batch_size: Annotated[int, Essential("training")] = 64
    """Samples per forward pass and process."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    auto_micro_batch: Annotated[bool, Essential("training")] = False
    """If memory runs out, split batches into halves, quarters, ...; what a step learns stays the same."""
    learning_rate: Annotated[float, Essential("training")] = 2e-3
    """Peak learning rate; this default suits a network of width 256, wider ones need less."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or a linear or cosine decay to zero at the end."""
    lr_decay_share: float = 0.2
    """Share of the run, at its end, in which the learning rate decays. For fine-tuning and distillation the default
    is 1."""
    lr_warmup_steps: int = 100
    """Steps in which the learning rate rises from zero."""
    lr_layer_decay: float = 1.0
    """Learning rate of each block divided by that of the next one, so that the first blocks, and the layers before
    them, change least (dit; 0.8 is usual for fine-tuning). The tables of classes and words keep the full rate."""
    lr_embeddings: float = 1.0
    """Factor on the learning rate of the tables of classes and words."""
    optimizer: Literal["adamw", "adamw-8bit", "muon", "schedule-free"] = "adamw"
    """adamw; muon (orthogonalised momentum for matrices, AdamW for the rest); schedule-free (AdamW that averages
    its weights instead of decaying its rate; extra `schedule-free`); adamw-8bit (a quarter of AdamW's memory; extra
    `bitsandbytes`)."""
    adam_beta1: float = 0.9
    """AdamW's first decay. With schedule-free: the share of the average in the weights that are trained."""
    adam_beta2: float = 0.95
    """AdamW's second decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay, for matrices only."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down. 0: no limit."""
    ema_decay: float = 0.999
    """Decay of the weight average, which rises with the steps: min(ema_decay, (1 + step) / (10 + step)).
    `--optimizer schedule-free` uses its own average instead."""
    ema_lengths: tuple[float, ...] = ()
    """Relative lengths, such as 0.05 0.1, of additional, power-function averages of the weights. After the run,
    `latentflow average` makes averages of any length near these."""
    ema_snapshot_steps: int = 0
    """Steps between snapshots of these averages. 0: a 32nd of the run."""
    mixed_precision: Annotated[Literal["auto", "no", "bf16", "fp16"], Essential("training")] = "auto"
    """Precision of the computation; auto: bf16 where the device supports it. fp16 needs a GPU. Weights stay in
    float32."""
    compile: bool = False
    """Compile the networks with torch.compile, block by block, also on a CPU: minutes at the start, faster steps."""
    compile_on_gpu: bool = True
    """Compile the networks on a GPU: half a minute at the start. Without a compiler the run goes on without it."""
    seed: Annotated[int, Essential("training")] = 0
    """Seed of the weights, the data order, the noise and the times."""
    random_numbers: Literal["philox", "mersenne-twister"] = "philox"
    """Generator of noise and times: philox draws on the device. Runs that earlier versions began without this setting
    go on with mersenne-twister."""
    num_workers: int = 0
    """Processes that load data; cached latents need none."""
    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Number of checkpoints that are kept; older ones of this run are removed."""
    validation_steps: int = 500
    """Steps between validations. 0: none."""
    validation_time: float | None = None
    """Largest share of the time that validations and previews may take together: those beyond it are skipped, except
    at the last step of the run. Default: 0.1, or 1 (none is skipped) with --validation-steps, --preview-steps or
    --early-stop."""
    early_stop: Annotated[int, Essential("training")] = 0
    """End after this many validations in a row without a better loss; the result has the weights of the best one. 0:
    never."""
    preview_steps: int = 1000
    """Steps between preview images. 0: none."""
    log_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also report curves and previews to TensorBoard (files in the run folder; extra `tensorboard`) or to Weights &
    Biases (extra `wandb`; WANDB_MODE=offline without network)."""
    shard: bool = field(default_factory=lambda: _from_environment("ACCELERATE_USE_FSDP"))
    """Spread weights, gradients, average and optimiser state over the processes (FSDP2) instead of keeping all of
    them in each. `accelerate launch --use_fsdp` switches it on."""
    profile: bool = False
    """Write a trace of a few steps, and a table of where their time goes, to the folder `profile` of the run."""
    max_nonfinite_steps: int = 10
    """Steps in a row that may be skipped because the loss or a gradient is not finite; after more, the run stops."""
    allow_changes: bool = False
    """Resume although the data or the settings of the network changed; the differences are printed."""

    def __post_init__(self) -> None:
        for names, allowed, words in _BOUNDS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise UserError(f"{flag_of(name)} is {value}", words)
        library = _LIBRARIES.get(self.optimizer, "torch")
        if importlib.util.find_spec(library) is None:
            raise missing(f"--optimizer {self.optimizer} needs", library)
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise missing(f"--report-to {self.report_to} needs", self.report_to)
        if self.ema_lengths:
            from ..training.loop.trained_module import exponent

            for length in self.ema_lengths:
                exponent(length)  # raises where there is none
        if self.optimizer == "schedule-free" and self.lr_scheduler != "constant":
            raise UserError(
                f"--optimizer schedule-free with --lr-scheduler {self.lr_scheduler}: its rate does not decay",
                "Add --lr-scheduler constant.",
            )
        if self.optimizer == "schedule-free" and self.adam_beta1 == 0:
            raise UserError("--optimizer schedule-free with --adam-beta1 0", "Use 0.9, or up to 0.98.")

    def with_validation_time(self, given: Collection[str]) -> LoopConfig:
        """Return the settings with the default of ``validation_time`` in its place.

        Args:
            given: keys of the settings that flags or a file set: such a schedule is kept to.
        """
        if self.validation_time is not None:
            return self
        scheduled = any(key in given and getattr(self, key) for key in ("validation_steps", "preview_steps"))
        return replace(self, validation_time=1.0 if scheduled or self.early_stop else 0.1)

    @property
    def limited(self) -> list[str]:
        """Return what ``validation_time`` limits. Early stopping must not depend on how fast the machine is."""
        validation = ["validation"] * bool(self.validation_steps and not self.early_stop)
        return validation + ["preview"] * bool(self.preview_steps)

    @property
    def snapshot_steps(self) -> int:
        """Return the steps between snapshots of the power-function averages; 0 without them."""
        if not self.ema_lengths:
            return 0
        return self.ema_snapshot_steps or math.ceil(self.max_train_steps / SNAPSHOTS)

    def check_validated(self, validated: bool) -> None:
        """Refuse ``--early-stop`` for a run that nothing is held out of, or that does not validate.

        Raises:
            UserError: it is asked for.
        """
        if self.early_stop and not (validated and self.validation_steps):
            raise UserError(
                "--early-stop without validations",
                "Hold images out (--validation 0.1), and validate (--validation-steps).",
            )


def _from_environment(name: str) -> bool:
    """Return whether an environment variable says yes, in the words that accelerate takes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


# Optimisers from optional libraries.
_LIBRARIES = {"schedule-free": "schedulefree", "adamw-8bit": "bitsandbytes"}
# Names of settings, the test of their value, and the error if it fails.
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
    (("lr_layer_decay", "validation_time"), lambda value: 0 < value <= 1, "It must be above 0, and at most 1."),
    (("lr_decay_share",), lambda value: 0 <= value <= 1, "It must be from 0 to 1."),
)  # fmt: skip
