"""Draw what lies between two prompts or images: `latentflow interpolate "red apple" "green apple" --grid`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.checkpoint import open_pipeline
from latentflow.inference.images import enlarged, read_opaque, save, sheet
from latentflow.inference.sample import Condition, check_room, conditions, generators, tell_unknown_words


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(SamplingConfig):
    """Draw what lies between two prompts, classes or images.

    latentflow interpolate "red apple" "green apple" --grid -o apples.png
    latentflow interpolate --images apple.png pear.png --grid -o fruit.png
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """What the first and the last image show; one is for the whole way, none leaves it open."""
    images: Annotated[tuple[str, str], tyro.conf.arg(metavar="FIRST LAST")] = ("", "")
    """The first and the last image, of one size; prompts or classes then describe them. Without them both are
    drawn."""
    n: Annotated[int, tyro.conf.arg(name="frames", aliases=["-n"])] = 8
    """Images, first and last among them."""
    seed: int = 0
    """The noise of what is drawn; between equal prompts the last image takes seed + 1."""
    guidance: float | None = None  # type: ignore[assignment]
    """How hard to follow the prompts or classes; default: 4, between images 1, which hits them best."""
    solver: str = "heun"
    """One that draws no fresh noise."""
    grid: bool = False
    """Write one row with all of them."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(InterpolateConfig, argv, prog="latentflow interpolate")
    config.check()
    for what in (config.prompt, config.class_labels):
        if len(what) > 2:
            raise UserError(f"{len(what)} prompts or classes", "Give the first and the last.")
    images = [read_opaque(path) for path in config.images] if any(config.images) else None
    pipe = open_pipeline("LatentFlowEditPipeline", config.checkpoint, config.device, config)
    rows: list[Condition] = [{}]
    if config.prompt or config.class_labels:
        rows = conditions(pipe, config.prompt, config.class_labels)
    first, last = rows[0], rows[-1]
    size = (images[0].height, images[0].width) if images else pipe.image_size()
    check_room(config.n, size, config.scale)
    tell_unknown_words(pipe, *config.prompt, config.negative)

    # Draw, from one noise for the whole way, or from that of the first and that of the last
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
        frames = [sheet(frames, columns=len(frames))]
    save([enlarged(each, config.scale) for each in frames], config.output, config.overwrite)


if __name__ == "__main__":
    run(main)
