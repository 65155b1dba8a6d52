"""Paint part of an image anew: `latentflow inpaint image.png mask.png "a red hat" -o out.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.checkpoint import open_pipeline
from latentflow.inference.images import enlarged, read_image, read_mask_of, save, sheet
from latentflow.inference.sample import check_room, conditions, draw, tell_unknown_words

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(SamplingConfig):
    """Paint part of an image anew. Every pixel outside of the mask stays as it is, transparent or not, in sRGB.

    latentflow inpaint face.png mask.png "a red hat" -o hat.png
    latentflow inpaint face.png "a red hat" --expand 0 32 0 0 -o taller.png
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The image: any format, mode and size."""
    mask_and_prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MASK PROMPT")
    ] = ()
    """The mask, white where to paint, black where to keep, grey between; with --expand there is none. Then what the
    image shall show, in quotes; several prompts are painted one after the other, none continues what is around."""
    mask_threshold: float | None = None
    """Makes a mask of any image: what is at least this bright, from 0 to 1, is painted."""
    expand: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (
        0,
        0,
        0,
        0,
    )
    """Outpainting: paint so many pixels around the image instead of a mask."""
    strength: float = 1.0
    """From 0, the image as it is, to 1, where nothing under the mask is looked at."""
    method: str | None = None
    """pnp-flow, replacement, repaint or twisted, for any checkpoint; trained, for one that has learnt to inpaint
    (docs/editing.md explains them). Default: pnp-flow, or trained where a solver is named."""
    solver: str | None = None
    """As of generate, for trained (default: ddpm), replacement and repaint; pnp-flow and twisted take steps of their
    own."""
    feather: int = 0
    """Pixels around the mask over which old and new melt into one another."""
    padding_mask_crop: int | None = None
    """Look only at the mask and so many pixels around it, at the checkpoint's own size; for large images."""
    grid: bool = False
    """Write image, mask and result side by side, a row for each result."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(InpaintConfig, argv, prog="latentflow inpaint")
    config.check()
    image, mask, prompts = read(config)
    pipe = open_pipeline("LatentFlowInpaintPipeline", config.checkpoint, config.device, config)
    shown = conditions(pipe, prompts, config.class_labels, config.negative, optional=True)
    check_room(len(shown) * config.n, (image.height, image.width), config.scale)
    tell_unknown_words(pipe, *prompts, config.negative)

    # Paint: all of the first prompt, all of the second, ...
    images = draw(
        pipe,
        [row for row in shown for _ in range(config.n)],
        config.seed,
        image=image,
        mask_image=mask,
        padding_mask_crop=config.padding_mask_crop,
        strength=config.strength,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        solver=config.solver,
        method=config.method,
        feather=config.feather,
    )

    # Write
    if config.grid:
        images = [sheet([part for result in images for part in (image, mask, result)], columns=3)]
    save([enlarged(each, config.scale) for each in images], config.output, config.overwrite)


def read(config: InpaintConfig) -> tuple[Image, Image, tuple[str, ...]]:
    """The image, its mask, and the prompts."""
    image, words = read_image(config.image), config.mask_and_prompts
    if any(config.expand):
        from latentflow import expand_canvas

        if config.mask_threshold is not None or (words and Path(words[0]).is_file()):
            raise UserError(
                "a mask and --expand are both given", "Take one; the other is a second run, on the result."
            )
        return *expand_canvas(image, *config.expand), words
    if not words:
        raise UserError("there is no mask", "Give one after the image, or --expand LEFT TOP RIGHT BOTTOM.")
    return image, read_mask_of(words[0], image, config.mask_threshold), words[1:]


if __name__ == "__main__":
    run(main)
