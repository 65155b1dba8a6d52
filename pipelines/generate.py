"""Generate images with a checkpoint: `latentflow generate "red apple" -o apple.png`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import TokenSamplingConfig
from latentflow.inference.images import (
    control_files,
    control_scales,
    enlarge,
    image_grid,
    read_controls,
    read_opaque,
    save_images,
)
from latentflow.inference.opening import open_pipeline
from latentflow.inference.sample import (
    check_memory,
    check_sampling,
    conditions,
    note_unquoted,
    sample_images,
    warn_unknown_words,
    with_control,
)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(TokenSamplingConfig):
    """Generate images from prompts or classes, or unconditionally, as the checkpoint was trained."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """The prompt, in quotes. With several, all images of the first come first."""
    width: int | None = None
    """Pixels; default: as trained (InstructPix2Pix: as the control image)."""
    height: int | None = None
    """Pixels; default: as trained (InstructPix2Pix: as the control image)."""
    control: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Control image (edges, depth, a label map, the image to edit), for checkpoints that draw under one: a file for all
    prompts, or one for each. Of checkpoints that take two kinds: image=FILE labels=FILE."""
    control_scale: Annotated[str, tyro.conf.arg(metavar="SCALE")] = "1"
    """Guidance over the control image, for checkpoints that draw without as well. 0: without it; 1: as trained; more
    follows it harder. Of two kinds: image=2,labels=0.5."""
    like: Annotated[str | None, tyro.conf.arg(metavar="IMAGE")] = None
    """Draw variations of this image, for checkpoints with a latent variable (`latentflow train --latent-variable`)."""
    grid: bool = False
    """Write one image with all of them in a grid."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the images, and write them."""
    config = parse(GenerateConfig, argv, prog="latentflow generate")
    check_sampling(config)
    files, scale = control_files(config.control), control_scales(config.control_scale)
    like = None if config.like is None else read_opaque(config.like)

    from latentflow.pipeline import LatentFlowPipeline

    pipe = open_pipeline(LatentFlowPipeline, config.checkpoint, config.device, config, config.memory)
    controls = read_controls(files, pipe.model)
    rows = with_control(conditions(pipe, config.prompt, config.class_labels, config.negative), controls)
    if like is not None:
        rows = [{**row, "like": like} for row in rows]
    pipe.model.check_image_input(controls or None)
    size = pipe.image_size(config.height, config.width, control_image=controls or None)
    check_memory(len(rows) * config.n, size, config.scale)
    note_unquoted(config.prompt)
    warn_unknown_words(pipe, *config.prompt, config.negative)

    # Sample: all images of the first prompt, then of the second, ...
    images = sample_images(
        pipe,
        [row for row in rows for _ in range(config.n)],
        config.seed,
        height=config.height,
        width=config.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        solver=config.solver,
        control_scale=scale,
        temperature=config.temperature,
        corrector=config.corrector,
    )

    # Write
    images = [enlarge(image, config.scale) for image in images]
    if config.grid and len(images) > 1:
        several = len(rows) > 1 < config.n  # a row for each prompt
        images = [image_grid(images, config.n if several else math.ceil(math.sqrt(len(images))))]
    save_images(images, config.output, config.overwrite)


if __name__ == "__main__":
    run(main)
