"""Edit an image with a prompt: `latentflow edit apple.png "green apple" --from "red apple" -o green.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import TokenSamplingConfig
from latentflow.errors import UserError
from latentflow.inference.images import (
    box_mask,
    enlarge,
    image_grid,
    read_image,
    read_mask_of,
    read_opaque,
    save_images,
)
from latentflow.inference.opening import open_pipeline
from latentflow.inference.sample import (
    Condition,
    check_memory,
    check_sampling,
    conditions,
    note_unquoted,
    sample_images,
    warn_unknown_words,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class EditConfig(TokenSamplingConfig):
    """Edit an image with a prompt, or generate variations of it.

    latentflow edit apple.png "green apple" --from "red apple" -o green.png
    latentflow edit apple.png "make it green" --checkpoint black-forest-labs/FLUX.2-klein-4B -o green.png
    latentflow edit apple.png "green apple" --from "red apple" --box 0 0 32 64 -o half.png
    latentflow edit apple.png --method image-to-image --strength 0.5 -n 8 -o variation.png
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The image: any format, mode and size."""
    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """Description of the whole result: "green apple", not "make it green"; for --method reference an instruction: "make
    the apple green". With several, all images of the first come first."""
    source: Annotated[str | None, tyro.conf.arg(name="from", metavar="PROMPT")] = None
    """Description of the image as it is: a prompt or a class. The better it fits, the less else changes. The methods
    reference and image-to-image take none."""
    mask: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Edit only where this image is white. Every other pixel keeps its sRGB colour and its transparency."""
    mask_threshold: float | None = None
    """Make a mask of any image: pixels that are at least this bright, from 0 to 1, are edited."""
    box: Annotated[tuple[int, int, int, int] | None, tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = None
    """Edit only this rectangle of the image, in pixels from its left and upper edges."""
    reference: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Further images that the prompt may speak of, for models that draw from several (FLUX.2, Qwen-Image-Edit Plus,
    FIBO Edit)."""
    method: Literal["reference", "flowedit", "inversion", "direct", "image-to-image"] | None = None
    """reference, the default for models that draw from images (FLUX.2, Kontext, Qwen-Image-Edit, LongCat-Image-Edit,
    FIBO Edit), follows an instruction; the result has a size that suits the model, with --mask or --box the image's.
    flowedit, the default for all others, moves the image directly. inversion goes through the image's own noise; direct
    does too, and gives its errors back, so that less is lost; both have no seed. image-to-image mixes noise into the
    image and samples from there."""
    strength: float | None = None
    """From 0, which keeps the image, to 1, which may change the layout; default: 0.9 (SD3 0.85, FLUX dev 0.95),
    image-to-image 0.6; reference takes none."""
    guidance: float | None = None
    """Guidance scale: how closely to follow the prompt or class; 1 is off; default: 2 (flowedit with SD3 13.5, with
    FLUX dev 5.5), image-to-image and reference the model's own."""
    solver: str | None = None
    """A solver of `latentflow generate`; only image-to-image and reference take one with fresh noise. Default: euler
    for flowedit and direct, heun for inversion, else the model's own."""
    grid: bool = False
    """Write image and result side by side, a row for each result."""


def main(argv: Sequence[str] | None = None) -> None:
    """Edit the image, and write the results."""
    config = parse(EditConfig, argv, prog="latentflow edit")
    check(config)
    image, mask = read(config)
    references = [read_opaque(file) for file in config.reference]
    img2img = config.method == "image-to-image"
    jumps: Condition = {"temperature": config.temperature, "corrector": config.corrector}

    from latentflow import LatentFlowEditPipeline, LatentFlowImg2ImgPipeline

    kind = LatentFlowImg2ImgPipeline if img2img else LatentFlowEditPipeline
    pipe = open_pipeline(kind, config.checkpoint, config.device, config, config.memory)
    rows = conditions(pipe, config.prompt, config.class_labels, config.negative, optional=img2img)
    check_memory(len(rows) * config.n, (image.height, image.width), config.scale)
    note_unquoted(config.prompt)
    warn_unknown_words(pipe, *config.prompt, config.negative, None if config.class_labels else config.source)

    # Edit: all images of the first prompt, then of the second, ...
    images = sample_images(
        pipe,
        [row for row in rows for _ in range(config.n)],
        config.seed,
        image=image,
        **({} if config.steps is None else {"num_inference_steps": config.steps}),
        solver=config.solver,
        **(jumps if img2img else {"method": config.method} | source_of(pipe, config)),
        **({"reference_images": references} if references else {}),
        **({} if mask is None else {"mask_image": mask}),
        **({} if config.strength is None else {"strength": config.strength}),
        **({} if config.guidance is None else {"guidance_scale": config.guidance}),
    )

    # Write
    if config.grid:
        pairs = [(image.resize(result.size), result) for result in images]
        images = [image_grid([part for pair in pairs for part in pair], columns=2)]
    save_images([enlarge(image, config.scale) for image in images], config.output, config.overwrite)


def read(config: EditConfig) -> tuple[Image, Image | None]:
    """Return the image, and the mask if there is one; without a mask nothing is transparent.

    Raises:
        UserError: they cannot be read; the box is not within the image.
    """
    if config.mask is None and config.box is None:
        return read_opaque(config.image), None
    image = read_image(config.image)
    if config.mask is not None:
        return image, read_mask_of(config.mask, image, config.mask_threshold)
    assert config.box is not None
    return image, box_mask(image, config.box)


def check(config: EditConfig) -> None:
    """Refuse flags that would have no effect."""
    check_sampling(config)
    if config.method == "image-to-image" and config.source is not None:
        raise UserError("--method image-to-image does not use --from", "Leave it out.")
    if config.reference and config.method not in (None, "reference"):
        raise UserError(f"--method {config.method} does not use --reference", "Leave it out.")
    if config.method in ("inversion", "direct") and config.n > 1:
        raise UserError(
            f"-n {config.n}: {config.method} has no seed, all images would be equal",
            "Leave it out, or use a method that has one.",
        )
    if config.method != "image-to-image" and (config.temperature != 1.0 or config.corrector != 0.0):
        raise UserError(
            "--temperature or --corrector without --method image-to-image",
            "They are of checkpoints of tokens, which take that method alone.",
        )
    masked = [name for name in ("mask", "box") if getattr(config, name) is not None]
    if len(masked) == 2:
        raise UserError(
            "--mask and --box are both given", "Give one, and the other in a second run on the result."
        )
    if config.mask_threshold is not None and "mask" not in masked:
        raise UserError("--mask-threshold is given without --mask", "Leave it out, or give --mask FILE.")
    if config.method == "image-to-image" and masked:
        raise UserError(
            f"--method image-to-image does not use --{masked[0]}",
            "Use --method flowedit, or `latentflow inpaint` with --strength.",
        )


def source_of(pipe: Any, config: EditConfig) -> Condition:
    """Return what the image shows now as keywords of the pipeline's call."""
    if config.source is None:
        return {}
    [row] = conditions(pipe, *(((), [config.source]) if config.class_labels else ([config.source], ())))
    return {f"source_{name}": value for name, value in row.items()}


if __name__ == "__main__":
    run(main)
