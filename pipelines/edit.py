"""Change an image with words: `latentflow edit apple.png "green apple" --from "red apple" -o green.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.checkpoint import open_pipeline
from latentflow.inference.images import enlarged, read_opaque, save, sheet
from latentflow.inference.sample import Condition, check_room, conditions, draw, tell_unknown_words


@dataclass(frozen=True, kw_only=True)
class EditConfig(SamplingConfig):
    """Change an image with words, or draw variations of it.

    latentflow edit apple.png "green apple" --from "red apple" -o green.png
    latentflow edit apple.png --method image-to-image --strength 0.5 -n 8 -o variation.png
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The image: any format, mode and size."""
    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """What it shall show, as a whole: "green apple", not "make it green"; several are drawn one after the other."""
    source: Annotated[str | None, tyro.conf.arg(name="from", metavar="PROMPT")] = None
    """What it shows now, in words or as a class; the better this fits, the less changes besides."""
    method: Literal["flowedit", "inversion", "image-to-image"] = "flowedit"
    """flowedit goes from image to image, inversion through the image's noise (and draws none), image-to-image
    mixes noise into the image and draws it anew."""
    strength: float | None = None
    """From 0, the image as it is, to 1, which is free to change the layout; default: 0.9, image-to-image 0.6."""
    guidance: float | None = None
    """How hard to follow the prompt or class; 1 is off; default: 2, image-to-image 4."""
    solver: str | None = None
    """As of generate, but flowedit and inversion take none with fresh noise; default: euler for flowedit, else heun."""
    grid: bool = False
    """Write image and result side by side, a row for each result."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EditConfig, argv, prog="latentflow edit")
    check(config)
    image = read_opaque(config.image)
    anew = config.method == "image-to-image"
    kind = "LatentFlowImg2ImgPipeline" if anew else "LatentFlowEditPipeline"
    pipe = open_pipeline(kind, config.checkpoint, config.device, config)
    shown = conditions(pipe, config.prompt, config.class_labels, config.negative, optional=anew)
    check_room(len(shown) * config.n, (image.height, image.width), config.scale)
    tell_unknown_words(pipe, *config.prompt, config.negative, None if config.class_labels else config.source)

    # Edit: all of the first prompt, all of the second, ...
    images = draw(
        pipe,
        [row for row in shown for _ in range(config.n)],
        config.seed,
        image=image,
        **({} if config.steps is None else {"num_inference_steps": config.steps}),
        solver=config.solver,
        **({} if anew else {"method": config.method} | source_of(pipe, config)),
        **({} if config.strength is None else {"strength": config.strength}),
        **({} if config.guidance is None else {"guidance_scale": config.guidance}),
    )

    # Write
    if config.grid:
        images = [sheet([part for result in images for part in (image, result)], columns=2)]
    save([enlarged(each, config.scale) for each in images], config.output, config.overwrite)


def check(config: EditConfig) -> None:
    """Refuse what would be ignored."""
    config.check()
    if config.method == "image-to-image" and config.source is not None:
        raise UserError("--method image-to-image does not look at --from", "Leave it out.")
    if config.method == "inversion" and config.n > 1:
        raise UserError(
            f"-n {config.n}: inversion draws no noise, all would be equal", "Take --method flowedit."
        )


def source_of(pipe: Any, config: EditConfig) -> Condition:
    """What the image shows now, as keywords of the pipeline."""
    if config.source is None:
        return {}
    [row] = conditions(pipe, *(((), [config.source]) if config.class_labels else ([config.source], ())))
    return {f"source_{name}": value for name, value in row.items()}


if __name__ == "__main__":
    run(main)
