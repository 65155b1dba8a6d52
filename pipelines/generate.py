"""Draw images with a checkpoint: `latentflow generate "red apple" -o apple.png`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import SamplingConfig
from latentflow.inference.checkpoint import open_pipeline
from latentflow.inference.images import enlarged, save, sheet
from latentflow.inference.sample import check_room, conditions, draw, tell_unknown_words


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Draw images from captions, classes or nothing, as the checkpoint was trained."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """What to draw, in quotes; several prompts are drawn one after the other."""
    width: int | None = None
    """Pixels; default: as trained."""
    height: int | None = None
    """Pixels; default: as trained."""
    grid: bool = False
    """Write one image with all of them in rows."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(GenerateConfig, argv, prog="latentflow generate")
    config.check()
    pipe = open_pipeline("LatentFlowPipeline", config.checkpoint, config.device, config)
    shown = conditions(pipe, config.prompt, config.class_labels, config.negative)
    check_room(len(shown) * config.n, pipe.image_size(config.height, config.width), config.scale)
    tell_unknown_words(pipe, *config.prompt, config.negative)

    # Draw: all of the first prompt, all of the second, ...
    images = draw(
        pipe,
        [row for row in shown for _ in range(config.n)],
        config.seed,
        height=config.height,
        width=config.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        solver=config.solver,
    )

    # Write
    images = [enlarged(image, config.scale) for image in images]
    if config.grid and len(images) > 1:
        several = len(shown) > 1 < config.n  # prompts: a row for each
        images = [sheet(images, config.n if several else math.ceil(math.sqrt(len(images))))]
    save(images, config.output, config.overwrite)


if __name__ == "__main__":
    run(main)
