"""Make a few-step student of a checkpoint: `latentflow distill CHECKPOINT DATA -o runs/fast`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latentflow.cli import given, parse, run, write_config
from latentflow.config import (
    AdapterConfig,
    DataConfig,
    DistillationConfig,
    FlowConfig,
    FramingConfig,
    LoopConfig,
    NetworkConfig,
    RunConfig,
)
from latentflow.errors import UserError, lookup
from latentflow.utils.flags import Essential


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a student of a checkpoint that generates in one to four evaluations; run again, the same line resumes.

    DATA are images like those that the checkpoint was trained on.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The teacher: a pipeline folder, such as runs/cats/pipeline."""
    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Run folder. The student is its subfolder `pipeline`; with --lora-rank also `adapter`."""
    method: Annotated[str, Essential()] = "shortcut"
    """shortcut, progressive, mean-flow, alpha-flow, consistency, distribution-matching, reflow or one-step
    (docs/guide/few-steps.md)."""
    method_options: dict[str, float] = field(default_factory=dict)
    """Options of the method, such as `share 0.5`."""
    condition_dropout: float = 0.1
    """Share of the samples that are learned without their condition (not used by reflow and one-step)."""
    mask_shapes: dict[str, float] = field(default_factory=dict)
    """For a checkpoint that inpaints: shares of the mask shapes, as in `latentflow train --help flow` (not used by
    reflow and one-step, whose pairs are whole images)."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `pipeline`; the run's checkpoints keep float32."""
    license: str | None = None
    """Licence of the result for its model card: the hub's identifier, such as apache-2.0 or cc-by-4.0, or NAME=LINK for
    any other."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of storing them: less memory, about a third more
    time."""
    dry_run: Annotated[bool, Essential()] = False
    """Print the plan, sizes and an estimate of memory and time, then stop."""
    distillation: DistillationConfig = DistillationConfig()
    framing: FramingConfig = FramingConfig()
    adapter: AdapterConfig = AdapterConfig()
    loop: LoopConfig = LoopConfig()

    def run(self) -> RunConfig:
        """Return the settings as those of a training: a fine-tune of the teacher with another objective.

        Raises:
            UserError: there is no such method, or it does not take these options.
        """
        from latentflow.training.distill import METHODS

        shared = ("data", "output", "export_dtype", "license", "dry_run", "framing", "adapter", "loop")
        if "guidance" in self.method_options:
            raise UserError("guidance among --method-options", "It is the teacher's: use --guidance.")
        method = lookup(METHODS, self.method, "method")
        if self.method_options and not method.has_options:
            raise UserError(
                f"--method-options with --method {self.method}, which has none", "Leave them out."
            )
        return RunConfig(
            init_from=self.checkpoint,
            flow=FlowConfig(
                objective=method.objective,
                objective_options={**method.usual, **self.method_options},
                condition_dropout=0.0 if method.pairs else self.condition_dropout,
                mask_shapes={"full": 1.0} if method.pairs else self.mask_shapes,  # pairs are of whole images
            ),
            network=NetworkConfig(gradient_checkpointing=self.gradient_checkpointing),
            **{name: getattr(self, name) for name in shared},
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Train a student of a checkpoint."""
    config = parse(Config, argv, prog="latentflow distill")

    from latentflow.training import resumable, resume_line
    from latentflow.training.distill import distillation_recipe, open_teacher
    from latentflow.training.loop.run_folder import run_lock
    from latentflow.training.train import train
    from latentflow.training.unfinished import starting_checkpoint

    settings = config.run()
    start = starting_checkpoint(config.checkpoint, None if config.dry_run else Path(config.output))

    def keep(run: RunConfig, file: Path) -> None:
        write_config(dataclasses.replace(config, data=run.data, loop=run.loop), file)

    recipe = partial(
        distillation_recipe,
        teacher=open_teacher(start, config.distillation.guidance),
        settings=config.distillation,
        name=config.method,
    )
    line = resume_line("distill", argv)
    with nullcontext() if config.dry_run else run_lock(config.output), resumable(line):
        train(settings, line, given(Config, argv), keep, recipe)


if __name__ == "__main__":
    run(main)
