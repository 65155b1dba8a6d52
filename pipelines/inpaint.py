"""Repaint part of an image: `latentflow inpaint image.png mask.png "a red hat" -o out.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import TokenSamplingConfig
from latentflow.errors import UserError
from latentflow.inference.images import (
    box_mask,
    control_files,
    control_scales,
    enlarge,
    image_grid,
    read_controls,
    read_image,
    read_mask_of,
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

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(TokenSamplingConfig):
    """Repaint part of an image. Every pixel outside the mask keeps its sRGB colour and its transparency.

    latentflow inpaint face.png mask.png "a red hat" -o hat.png
    latentflow inpaint face.png "a red hat" --box 0 0 64 20 -o hat.png
    latentflow inpaint face.png "a red hat" --expand 0 32 0 0 -o taller.png
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The image: any format, mode and size."""
    mask_and_prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MASK PROMPT")
    ] = ()
    """The mask, white where to paint, black where to keep, grey for a blend; leave it out with --box or --expand.
    Then the prompt for the masked area, in quotes; without one, the surroundings are continued. With several prompts,
    all images of the first come first."""
    mask_threshold: float | None = None
    """Make a mask of any image: pixels that are at least this bright, from 0 to 1, are painted."""
    box: Annotated[tuple[int, int, int, int] | None, tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = None
    """Paint this rectangle of the image, in pixels from its left and upper edges; there is no mask."""
    expand: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (
        0,
        0,
        0,
        0,
    )
    """Outpainting: enlarge the image by these numbers of pixels and paint them; there is no mask."""
    strength: float = 1.0
    """From 0, which keeps the image, to 1, which ignores what is under the mask."""
    method: str | None = None
    """pnp-flow, replacement, repaint or twisted, for any checkpoint; trained, for one that was trained to inpaint
    (docs/guide/inpaint-and-edit.md explains them). Default: pnp-flow, or trained if --solver is given."""
    solver: str | None = None
    """A solver of `latentflow generate`, for trained (default: ddpm), replacement and repaint; pnp-flow and twisted
    have their own steps."""
    feather: int = 0
    """Width in pixels of a soft edge around the mask, in which kept pixels change too. --seamless hides the edge
    without changing them."""
    seamless: bool = True
    """Match the colours inside the mask to the kept pixels around it, so that no edge shows."""
    control: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Control image, as of `latentflow generate`, which lies on the image: a file for all prompts, or one for each."""
    control_scale: Annotated[str, tyro.conf.arg(metavar="SCALE")] = "1"
    """Guidance over the control image; see `latentflow generate --help`."""
    padding_mask_crop: int | None = None
    """Crop to the mask and this many pixels around it, and work at the checkpoint's own size; for large images."""
    grid: bool = False
    """Write image, mask and result side by side, a row for each result."""


def main(argv: Sequence[str] | None = None) -> None:
    """Paint the masked part, and write the results."""
    config = parse(InpaintConfig, argv, prog="latentflow inpaint")
    check_sampling(config)
    image, mask, prompts = read(config)
    files, scale = control_files(config.control), control_scales(config.control_scale)

    from latentflow import LatentFlowInpaintPipeline

    pipe = open_pipeline(LatentFlowInpaintPipeline, config.checkpoint, config.device, config, config.memory)
    rows = conditions(pipe, prompts, config.class_labels, config.negative, optional=True)
    controls = read_controls(files, pipe.model)
    pipe.model.check_image_input(controls or None, fills=True)
    rows = with_control(rows, controls)
    check_memory(len(rows) * config.n, (image.height, image.width), config.scale)
    note_unquoted(prompts)
    warn_unknown_words(pipe, *prompts, config.negative)

    # Paint: all images of the first prompt, then of the second, ...
    images = sample_images(
        pipe,
        [row for row in rows for _ in range(config.n)],
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
        seamless=config.seamless,
        control_scale=scale,
        temperature=config.temperature,
        corrector=config.corrector,
    )

    # Write
    if config.grid:
        images = [image_grid([part for result in images for part in (image, mask, result)], columns=3)]
    save_images([enlarge(image, config.scale) for image in images], config.output, config.overwrite)


def read(config: InpaintConfig) -> tuple[Image, Image, tuple[str, ...]]:
    """Return the image, its mask, and the prompts.

    Raises:
        UserError: there is no mask, or more than one; the box is not within the image.
    """
    image, words = read_image(config.image), config.mask_and_prompts
    is_file = config.mask_threshold is not None or bool(words and Path(words[0]).is_file())
    kinds = {"a mask": is_file, "--box": config.box is not None, "--expand": any(config.expand)}
    given = [name for name, there in kinds.items() if there]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} are both given", "Give one, and the other in a second run on the result."
        )
    if config.box is not None:
        return image, box_mask(image, config.box), words
    if any(config.expand):
        from latentflow import expand_canvas

        return *expand_canvas(image, *config.expand), words
    if not words:
        raise UserError(
            "there is no mask",
            "Give one after the image, or --box LEFT TOP RIGHT BOTTOM, or --expand LEFT TOP RIGHT BOTTOM.",
        )
    return image, read_mask_of(words[0], image, config.mask_threshold), words[1:]


if __name__ == "__main__":
    run(main)
