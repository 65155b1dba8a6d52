"""Interpolate between two prompts or images: `latentflow interpolate "red apple" "green apple" --grid`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.images import enlarge, image_grid, read_opaque, save_images
from latentflow.inference.opening import open_pipeline
from latentflow.inference.sample import (
    Condition,
    check_memory,
    check_sampling,
    conditions,
    generators,
    warn_unknown_words,
)


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(SamplingConfig):
    """Interpolate between two prompts, classes or images.

    latentflow interpolate "red apple" "green apple" --grid -o apples.png
    latentflow interpolate --images apple.png pear.png --grid -o fruit.png
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """Prompts of the first and of the last image; a single one is for all."""
    images: Annotated[tuple[str, str], tyro.conf.arg(metavar="FIRST LAST")] = ("", "")
    """The first and the last image, of one size; prompts or classes then describe them. Without --images both are
    generated."""
    n: Annotated[int, tyro.conf.arg(name="frames", aliases=["-n"])] = 8
    """Number of images, including the first and the last."""
    seed: int = 0
    """Seed of the noise; between equal prompts the last image uses seed + 1."""
    guidance: float | None = None  # type: ignore[assignment]
    """Guidance scale: how closely to follow the prompts or classes; default: 4, between images 1, which reproduces
    them best."""
    solver: str = "heun"
    """A solver of `latentflow generate` that adds no fresh noise."""
    grid: bool = False
    """Write one image with all of them in a row."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the images, and write them."""
    config = parse(InterpolateConfig, argv, prog="latentflow interpolate")
    check_sampling(config)
    for given in (config.prompt, config.class_labels):
        if len(given) > 2:
            raise UserError(f"{len(given)} prompts or classes", "Give the first and the last.")
    images = [read_opaque(path) for path in config.images] if any(config.images) else None

    from latentflow import LatentFlowEditPipeline
    from latentflow.utils.memory import memory_phase

    pipe = open_pipeline(LatentFlowEditPipeline, config.checkpoint, config.device, config, config.memory)
    rows: list[Condition] = [{}]
    if config.prompt or config.class_labels:
        rows = conditions(pipe, config.prompt, config.class_labels)
    first, last = rows[0], rows[-1]
    size = (images[0].height, images[0].width) if images else pipe.image_size()
    check_memory(config.n, size, config.scale)
    warn_unknown_words(pipe, *config.prompt, config.negative)

    # Sample from one noise for all, or between the noises of the first and of the last image
    with memory_phase("draw"):
        frames = pipe.interpolate(
            **{name: [first[name], last[name]] for name in first},
            image=images,
            frames=config.n,
            **({} if config.steps is None else {"num_inference_steps": config.steps}),
            guidance_scale=config.guidance,
            negative_prompt=config.negative,
            generator=None if images else generators(config.seed, count=2 if first == last else 1),
            solver=config.solver,
        ).images

    # Write
    if config.grid:
        frames = [image_grid(frames, columns=len(frames))]
    save_images([enlarge(image, config.scale) for image in frames], config.output, config.overwrite)


if __name__ == "__main__":
    run(main)
