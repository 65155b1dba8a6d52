"""Fit samplers of a few evaluations to a checkpoint: `latentflow tune-sampler runs/cats --steps 8`.

    latentflow tune-sampler checkpoints/emoji-64
    latentflow tune-sampler runs/cats --steps 6 8 16 --prompts captions.txt

Finds the times and the weights of a solver with one evaluation a step (two of the network with guidance), so that it
ends where a fine trajectory does. They are kept in the checkpoint's folder, in tuned_solvers.json, and are used from
then on by every image that is drawn with as many steps, at this guidance scale and size. The network does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import MemoryConfig
from latentflow.errors import UserError, few, finite, whole

LARGEST_SEED = 2**63


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Fit samplers of a few evaluations to a checkpoint, in minutes."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Pipeline folder or folder of a finished run. The sampler is written into it."""
    steps: tuple[int, ...] = (8,)
    """Steps, and evaluations, of an image: a sampler for each number, such as 6 8 16. The fine trajectories serve
    all of them; the time of the fits grows with the square of the steps, up to 10."""
    guidance: float | None = None
    """Guidance scale that it is for. Default: the checkpoint's own."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text file of prompts, one a line, such as you draw. Default: pairs of words that the checkpoint knows; of a
    pretrained model some prompts of ours."""
    height: int | None = None
    """Pixels; default: as trained."""
    width: int | None = None
    """Pixels; default: as trained."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 128
    """Number of noises that it is fitted to."""
    held_out: int = 64
    """Number of other noises, on which the error is measured."""
    batch_size: int = 32
    """Images at once; each batch is one step of the fit."""
    rounds: int = 1
    """Passes over the noises."""
    seed: int = 0
    """Seed of the noises, and of the prompts."""
    overwrite: bool = False
    """Replace a sampler of as many steps for the same guidance scale and size."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if not self.steps:
            raise UserError("--steps names no number of steps", "Such as --steps 6 8.")
        for flag, value, least, most in (
            *(("--steps", steps, 1, 100) for steps in self.steps),
            ("-n", self.n, 1, None),
            ("--held-out", self.held_out, 1, None),
            ("--batch-size", self.batch_size, 1, None),
            ("--rounds", self.rounds, 1, None),
            ("--seed", self.seed, 0, LARGEST_SEED),
        ):
            whole(flag, value, least, most)
        if self.guidance is not None:
            finite("--guidance", self.guidance)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the sampler, and write it into the checkpoint."""
    config = parse(TuneConfig, argv, prog="latentflow tune-sampler", description=__doc__ or "")

    from latentflow.inference.opening import check_checkpoint, local_folder, open_pipeline

    check_checkpoint(config.checkpoint)
    folder = local_folder(config.checkpoint)
    if folder is None:
        raise UserError(
            f"{config.checkpoint} is no folder on this machine, and the sampler is written into the checkpoint's",
            "Write one first: latentflow export CHECKPOINT -o FOLDER",
        )

    from latentflow.inference.tuning import HEUN_STEPS, tune_samplers
    from latentflow.pipeline import LatentFlowPipeline
    from latentflow.pipeline.tuned import check_free, write_tuned
    from latentflow.utils.files import read_prompts

    prompts = [] if config.prompts is None else read_prompts(config.prompts, "--prompts")
    pipe = open_pipeline(LatentFlowPipeline, config.checkpoint, config.device, memory=config.memory)
    model = pipe.model
    guidance = model.guidance(config.guidance)
    height, width = pipe.image_size(config.height, config.width)
    if not config.overwrite:
        for steps in config.steps:
            check_free(Path(folder), steps, guidance, height, width)
    found = tune_samplers(
        model,
        config.steps,
        guidance,
        prompts=prompts,
        count=config.n,
        held_out=config.held_out,
        batch_size=config.batch_size,
        rounds=config.rounds,
        height=height,
        width=width,
        seed=config.seed,
    )
    print(f"root mean square error of the latents, {config.held_out} other noises:       mean   median")
    rows = [(f"heun, {2 * HEUN_STEPS} evaluations", found[0], "heun")]
    for tuned in found:
        rows += [
            (f"{tuned.steps} evaluations, tuned", tuned, "tuned"),
            (f"{tuned.steps} evaluations, before", tuned, "usual"),
        ]
    for what, tuned, name in rows:
        print(f"  {what:<58} {tuned.held_out[f'{name}_mean']:9.4f} {tuned.held_out[f'{name}_median']:8.4f}")
    for tuned in found:
        written = write_tuned(Path(folder), tuned, config.overwrite)
    named = few([str(tuned.steps) for tuned in found], 10)
    print(f"Wrote {written}: used where {named} steps are asked for.")


if __name__ == "__main__":
    run(main)
