"""Inpainting methods at equal numbers of network evaluations (NFE), on images that were not trained on.

    python benchmarks/inpainting.py DATA --steered CHECKPOINT [--trained CHECKPOINT] [--coupling CHECKPOINT]
        -o docs/measurements/inpainting-emoji [-n 80] [--evaluations 10 20 50] [--methods ...] [--no-condition] [--grid]
        [--seamless]

DATA is a folder of images as `latentflow train` takes it. The training-free methods run on --steered, which is given
nothing of the mask even if it has learnt to inpaint. --trained is a checkpoint that has, by channels alone, and
--coupling one that has by the data-dependent coupling. Three masks: a box in the centre (a quarter of the area), the
right half, and brush strokes (others on each image). Captions or classes are given (with --no-condition: empty
captions); guidance is off, so that one evaluation is one pass of the network.

Of every method: the PSNR within the hole (mean over images), the Frechet distance between the finished and the real
images ("pixels-16" of latentflow/metrics/features.py), the step across the border of the hole (in levels of 255, beside
that of the real images), and the largest change of a kept pixel. Results go to
FILE.json as they come, and what is there is not computed again; the table to FILE.md, images to FILE.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from latentflow import LatentFlowInpaintPipeline
from latentflow.data import Source, cached_pixels, find_source, to_pil
from latentflow.data.masks import random_masks
from latentflow.flow import SOLVERS
from latentflow.metrics.features import features, frechet_distance

BATCH = 20
SPACE = "pixels-16"
# Row of the table: the checkpoint, the pipeline's method, and the solver that does best here with it; None where the
# method steps by itself.
ROWS: dict[str, tuple[str, str, str | None]] = {
    "replacement": ("steered", "replacement", "euler"),
    "repaint": ("steered", "repaint", "euler"),
    "pnp-flow": ("steered", "pnp-flow", None),
    "twisted": ("steered", "twisted", None),
    "trained": ("trained", "trained", "ddpm"),
    "trained, pnp-flow": ("trained", "pnp-flow", None),
    "trained coupling": ("coupling", "trained", "ddpm"),
    "trained coupling, pnp-flow": ("coupling", "pnp-flow", None),
    "trained coupling, ODE": ("coupling", "trained", "adams-bashforth-2"),
}


class Untold(LatentFlowInpaintPipeline):
    """Takes any checkpoint for one that has not learnt to inpaint."""

    takes_masks = False


@dataclass(frozen=True)
class Task:
    """Images (N, 3, H, W) in [0, 1], the pipeline's condition of each, and masks (N, 1, H, W), by name."""

    images: Tensor
    conditions: list[dict[str, Any]]
    masks: dict[str, Tensor]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    source = find_source(options.data)
    rows = np.linspace(0, len(source) - 1, min(options.n, len(source))).astype(int).tolist()
    pipes = {"steered": load(options.steered, Untold)}
    for kind in ("trained", "coupling"):
        if folder := getattr(options, kind):
            pipes[kind] = load(folder)
    side = pipes["steered"].vae_scale_factor * pipes["steered"].transformer.config.sample_size
    task = read(source.subset(rows), side, options.condition)
    methods = {"mean fill": mean_fill} | {
        name: drawn_by(pipes[kind], name, options.seed, options.seamless)
        for name, (kind, _, _) in ROWS.items()
        if kind in pipes and (options.methods is None or name in options.methods)
    }
    results = Results(Path(f"{options.output}.json"))
    originals: dict[tuple[str, str], Tensor] = {}
    for mask in task.masks:
        for name, method in methods.items():
            for evaluations in options.evaluations if name != "mean fill" else [0]:
                shown = evaluations == options.shown or name == "mean fill"
                if results.has(mask, name, evaluations) and not (shown and options.grid):
                    continue
                images, seconds = method(task, mask, evaluations)
                results.add(mask, name, evaluations, measured(task, mask, images) | {"seconds": seconds})
                if shown:
                    originals[mask, name] = images
    Path(f"{options.output}.md").write_text(table(results.values, list(task.masks), list(methods), task))
    if options.grid:
        grid(task, originals, list(methods)).save(f"{options.output}.png")


def load(checkpoint: str, pipeline: type[LatentFlowInpaintPipeline] = LatentFlowInpaintPipeline) -> Any:
    pipe = pipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read(source: Source, side: int, condition: bool) -> Task:
    images = cached_pixels(source, side)[:].float() / 255.0
    conditions: list[dict[str, Any]] = [{} for _ in source.examples]
    if source.kind == "text":
        conditions = [{"prompt": text if condition else ""} for text in source.captions()]
    elif source.kind == "class":
        conditions = [{"class_labels": example.label} for example in source.examples]
    box, half = torch.zeros(2, len(images), 1, side, side)
    box[..., side // 4 : -side // 4, side // 4 : -side // 4] = 1.0
    half[..., side // 2 :] = 1.0
    brushes = [np.random.default_rng([7, i]) for i in range(len(images))]
    strokes = random_masks({"strokes": 1.0}, (side, side), brushes)
    return Task(images, conditions, {"centre box": box, "right half": half, "strokes": strokes})


Method = Callable[[Task, str, int], tuple[Tensor, float]]


def mean_fill(task: Task, mask: str, evaluations: int) -> tuple[Tensor, float]:
    """The mean colour of what is kept."""
    kept = 1.0 - task.masks[mask]
    colour = (task.images * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return torch.where(kept > 0, task.images, colour), 0.0


def drawn_by(pipe: Any, name: str, seed: int, seamless: bool) -> Method:
    """A method of the pipeline, at as many steps as the evaluations pay for; these are counted.

    The image at row i is drawn from the seed 1000 ``seed`` + i.
    """
    counted = [0]

    def count(module: Any, given: Any, output: Any) -> None:
        counted[0] += 1

    def run(task: Task, mask: str, evaluations: int) -> tuple[Tensor, float]:
        _, method, solver = ROWS[name]
        steps = evaluations // ((SOLVERS[solver].evaluations or 1) if solver else 1)
        drawn, started = [], time.monotonic()
        hook = pipe.transformer.register_forward_hook(count)
        for start in tqdm(range(0, len(task.images), BATCH), desc=f"{mask}, {name}, {evaluations}"):
            part = slice(start, start + BATCH)
            conditions, counted[0] = task.conditions[part], 0
            drawn.append(
                pipe(
                    **{key: [one[key] for one in conditions] for key in conditions[0]},
                    image=task.images[part],
                    mask_image=task.masks[mask][part],
                    num_inference_steps=steps,
                    guidance_scale=1.0,
                    solver=solver,
                    method=method,
                    seamless=seamless,
                    generator=[
                        torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(conditions))
                    ],
                    output_type="pt",
                ).images
            )
            if counted[0] > evaluations:
                raise AssertionError(f"{name} took {counted[0]} evaluations, not {evaluations}")
        hook.remove()
        return torch.cat(drawn), time.monotonic() - started

    return run


def measured(task: Task, mask: str, images: Tensor) -> dict[str, float]:
    hole, error = task.masks[mask], (images - task.images).square()
    mse = (error * hole).sum((1, 2, 3)) / (3 * hole.sum((1, 2, 3)))
    psnr = -10 * mse.clamp_min(1e-6).log10()
    real, found = (features(2 * one - 1, SPACE) for one in (task.images, images))
    return {
        "psnr": float(psnr.mean()),
        "psnr_error": float(psnr.std() / len(psnr) ** 0.5),
        "step": border_step(images, hole),
        "step_real": border_step(task.images, hole),
        "frechet": frechet_distance(found, real),
        "kept": float((error.sqrt() * (1 - hole)).max()),
    }


def border_step(images: Tensor, hole: Tensor) -> float:
    """Return the mean over images of the mean difference between neighbours of which one is in the hole, in levels."""
    total, count = torch.zeros(2, len(images))
    for side in (2, 3):
        across = hole.diff(dim=side).abs()
        total += (images.diff(dim=side).abs().mean(1, keepdim=True) * across).sum((1, 2, 3))
        count += across.sum((1, 2, 3))
    return float(255 * (total / count)[count > 0].mean())


class Results:
    """Figures by "mask / method / evaluations", on disk after each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}

    def has(self, *key: object) -> bool:
        return self._name(key) in self.values

    def add(self, mask: str, name: str, evaluations: int, figures: dict[str, float]) -> None:
        self.values[self._name((mask, name, evaluations))] = figures
        self.file.write_text(json.dumps(self.values, indent=1) + "\n")
        print(mask, name, evaluations, figures, flush=True)

    @staticmethod
    def _name(key: tuple[object, ...]) -> str:
        return " / ".join(map(str, key))


def table(values: dict[str, dict[str, float]], masks: list[str], methods: list[str], task: Task) -> str:
    """Markdown: a row for each method and number of evaluations, PSNR and Frechet distance for each mask."""
    rows = [key.split(" / ")[1:] for key in values if key.startswith(masks[0])]
    rows.sort(key=lambda row: (methods.index(row[0]) if row[0] in methods else -1, int(row[1])))
    lines = [
        "| method | NFE | " + " | ".join(f"{mask}: PSNR | Fréchet" for mask in masks) + " |",
        "|---|---|" + "---|---|" * len(masks),
    ]
    for name, evaluations in rows:
        cells = []
        for mask in masks:
            one = values.get(f"{mask} / {name} / {evaluations}")
            cells += [f"{one['psnr']:.2f}", f"{one['frechet']:.1f}"] if one else ["", ""]
        lines.append(f"| {name} | {evaluations if int(evaluations) else ''} | " + " | ".join(cells) + " |")
    kept = max(one["kept"] for one in values.values())
    return "\n".join(
        [*lines, "", f"{len(task.images)} images; largest change of a kept pixel: {kept:.1g}.", ""]
    )


def grid(task: Task, images: dict[tuple[str, str], Tensor], methods: list[str], each: int = 3) -> Image.Image:
    """For each mask some images: the hole, what each method made of it, the original."""
    columns = ["input", *methods, "original"]
    cell, head = 96, 28
    rows = [
        (mask, row) for mask in task.masks for row in np.linspace(1, len(task.images) - 2, each).astype(int)
    ]
    sheet = Image.new("RGB", (cell * len(columns), head + cell * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, name in enumerate(columns):
        draw.text((x * cell + 2, 2), name.replace(", ", ",\n"), fill="black")
    for y, (mask, row) in enumerate(rows):
        grey = torch.where(task.masks[mask][row] > 0, 0.5, task.images[row])
        shown = [grey, *(images[mask, name][row] for name in methods), task.images[row]]
        for x, image in enumerate(shown):
            original = to_pil(2 * image - 1).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
            sheet.paste(original, (x * cell, head + y * cell))
    return sheet


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--steered", required=True)
    parser.add_argument("--trained")
    parser.add_argument("--coupling")
    parser.add_argument("-o", "--output", required=True, help="FILE without its ending")
    parser.add_argument("-n", type=int, default=80, help="images, spread over DATA")
    parser.add_argument("--seed", type=int, default=0, help="other noise, for the spread of the figures")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument(
        "--no-condition", dest="condition", action="store_false", help="of captions: the empty one"
    )
    parser.add_argument(
        "--seamless", action="store_true", help="match colours at the border, as is the default"
    )
    parser.add_argument("--grid", action="store_true", help="also FILE.png")
    parser.add_argument("--shown", type=int, default=20, help="evaluations of the images in it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
