"""Draw pictures with a checkpoint: `latentflow generate "red apple" -o apple.png`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from latentflow.cli import parse, run
from latentflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Beside this program: in a clone, and in an installed wheel, which carries both.
SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints" / "emoji-64"
BATCH = 16  # pictures at a time; each has a generator of its own, so this changes no picture


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Draw pictures from captions, classes or nothing, as the checkpoint was trained."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """What to draw, in quotes; several prompts are drawn one after the other."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "out.png"
    """The picture to write; several become FILE-1, FILE-2, ... A file that exists is kept, and the next free
    number taken, unless --overwrite."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder or hub id; default: the shipped checkpoint."""
    class_labels: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """Names or numbers of classes, for checkpoints trained on classes."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures per prompt or class."""
    seed: int = 0
    """Picture i is drawn from seed + i."""
    steps: int = 20
    """Steps from noise to picture."""
    guidance: float = 4.0
    """How hard to follow the prompt or class; 1 is off, and twice as fast."""
    solver: str | None = None
    """euler, midpoint, heun, ralston, rk4, adams-bashforth-2, adams-bashforth-3, dpm-solver++2m, exponential-adams,
    dopri5, or with fresh noise euler-maruyama, stochastic-heun, ddpm, churn, langevin; default: the scheduler that
    the checkpoint brings, else heun (exponential-adams for networks that predict the data)."""
    negative: str | None = None
    """What to keep away from."""
    width: int | None = None
    """Pixels; default: as trained."""
    height: int | None = None
    """Pixels; default: as trained."""
    scale: int = 1
    """Enlarge the finished picture so many times."""
    grid: bool = False
    """Write one picture with all of them in rows."""
    overwrite: bool = False
    """Write over files that exist."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(GenerateConfig, argv, prog="latentflow generate")
    check(config)
    pipe = load(config)
    rows = conditions(pipe, config)

    # Draw: one seed per picture, a batch at a time
    drawn = [picture for batch in batches(rows, config) for picture in draw(pipe, batch, config)]
    pictures = [enlarged(picture, config.scale) for picture in drawn]

    # Write
    if config.grid and len(pictures) > 1:
        several = len(rows) > config.n > 1  # prompts: a row for each
        pictures = [grid_of(pictures, config.n if several else math.ceil(math.sqrt(len(pictures))))]
    for picture, path in zip(
        pictures, paths(Path(config.output), len(pictures), config.overwrite), strict=True
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        print(path)


def check(config: GenerateConfig) -> None:
    """Refuse at once what would fail after the drawing."""
    from PIL import Image

    for flag, value in (("-n", config.n), ("--steps", config.steps), ("--scale", config.scale)):
        if value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    suffix = Path(config.output).suffix.lower()
    if suffix not in Image.registered_extensions():
        raise UserError(f"-o {config.output}: no picture format '{suffix}'", "Use .png, .jpg or .webp.")


def load(config: GenerateConfig) -> Any:
    """The pipeline, on its device."""
    if config.checkpoint is None and not (SHIPPED / "model_index.json").is_file():
        raise UserError(
            f"the shipped checkpoint is not there: {SHIPPED}",
            "Give --checkpoint DIR, or train one: latentflow train FOLDER -o runs/mine, then "
            "--checkpoint runs/mine",
        )
    source = str(SHIPPED) if config.checkpoint is None else config.checkpoint
    if (Path(source) / "pipeline" / "model_index.json").is_file():
        source = str(Path(source) / "pipeline")  # a run folder

    import diffusers.utils.logging
    import transformers.utils.logging

    from latentflow import LatentFlowPipeline

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # of loading; drawing has its own
    device = fastest_device() if config.device == "auto" else config.device
    return LatentFlowPipeline.from_pretrained(source).to(device)


def fastest_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def conditions(pipe: Any, config: GenerateConfig) -> list[dict[str, Any]]:
    """The condition of each picture, in order: all of the first prompt, all of the second, ..."""
    prompts, classes = list(config.prompt), list(config.class_labels)
    if prompts and classes:
        raise UserError("a prompt and --class are both given", "Give one of them.")
    if prompts and not pipe.takes_text:
        raise UserError(f"this checkpoint takes no prompt such as '{prompts[0]}'", instead(pipe))
    if classes and not pipe.takes_classes:
        raise UserError("this checkpoint takes no --class", instead(pipe))
    if not prompts and not classes and (pipe.takes_text or pipe.takes_classes):
        raise UserError("nothing says what to draw", instead(pipe))
    if prompts:
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
        rows = [
            row if config.negative is None else row | {"negative_prompt": config.negative} for row in rows
        ]
    else:
        ids = pipe.class_ids([number_or_name(pipe, name) for name in classes]) if classes else []
        rows = [{"class_labels": number} for number in ids] or [{}]
    return [row for row in rows for _ in range(config.n)]


def instead(pipe: Any) -> str:
    """What this checkpoint takes, in flags."""
    if pipe.takes_text:
        return 'It takes a prompt: latentflow generate "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {', '.join(pipe.labels) or 'a number'}"
    return "It draws without being told what: leave it out."


def number_or_name(pipe: Any, text: str) -> int | str:
    return int(text) if text.isdecimal() and text not in pipe.labels else text


def batches(rows: list[dict[str, Any]], config: GenerateConfig) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Chunks of (seed, condition)."""
    seeded = [(config.seed + i, row) for i, row in enumerate(rows)]
    return (seeded[i : i + BATCH] for i in range(0, len(seeded), BATCH))


def draw(pipe: Any, batch: list[tuple[int, dict[str, Any]]], config: GenerateConfig) -> list[Image]:
    import torch

    # One generator per picture, on the CPU: the same seed is the same picture on every device, in any batch.
    generators = [torch.Generator().manual_seed(seed) for seed, _ in batch]
    condition = {name: [row[name] for _, row in batch] for name in batch[0][1]}
    if not condition:
        condition = {"num_images_per_prompt": len(batch)}
    pictures: list[Image] = pipe(
        **condition,
        height=config.height,
        width=config.width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        solver=config.solver,
        generator=generators,
    ).images
    return pictures


def enlarged(picture: Image, scale: int) -> Image:
    from PIL.Image import Resampling

    return picture.resize((picture.width * scale, picture.height * scale), Resampling.LANCZOS)


def grid_of(pictures: list[Image], columns: int) -> Image:
    """All pictures on one white sheet, row by row."""
    from PIL import Image

    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def paths(output: Path, count: int, overwrite: bool) -> list[Path]:
    """Where ``count`` pictures go: the name itself for a single one, else numbered; free names only."""

    def numbered(i: int) -> Path:
        return output.with_stem(f"{output.stem}-{i}")

    if count == 1 and (overwrite or not output.exists()):
        return [output]
    first = 1
    while not overwrite and any(numbered(first + i).exists() for i in range(count)):
        first += 1
    if count == 1 or first > 1:
        print("Pictures of this name exist and are kept; --overwrite replaces them.", file=sys.stderr)
    return [numbered(first + i) for i in range(count)]


if __name__ == "__main__":
    run(main)
