"""Few-step students beside their teacher, and beside each other at equal training time.

    python benchmarks/few_steps.py shapes -o runs/few-steps [--seconds 240] [--only mean-flow ...]
    python benchmarks/few_steps.py compare CHECKPOINT [CHECKPOINT ...] --data FOLDER -o runs/few-emoji
    python benchmarks/few_steps.py cost

"shapes": trains a teacher on the procedural set (`latentflow train shapes --preset tiny`), then a student by every
method of `latentflow distill` (METHODS), each in the same number of seconds: the time of a step is measured first, and
what pairs take to draw counts. Quality is the share of 240 captions whose image passes the exact checker.

"compare": checkpoints of captions, the teacher first (an adapter of it is written CHECKPOINT+ADAPTER). Quality is
caption retrieval and the Frechet distance of `latentflow evaluate`, of 100 captions of the folder.

"cost": what a training step of each objective takes, forward, backward and update, over that of flow matching: the same
network of 5 M parameters on 64 tokens, the same batch, in turn, five rounds; with and without a teacher.

All draw the same captions from the same seeds, the teacher in steps of Euler with its usual guidance, which costs two
evaluations of the network a step; the students' steps cost one. FILE.md gets the table, FILE.png the curves and the
images. Runs resume; figures that are there (figures.json) are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentflow import LatentFlowPipeline
from latentflow.config import FlowConfig
from latentflow.data import cached_pixels, find_source, pixels_to_images, to_pil
from latentflow.data.sources.shapes import check, train_captions
from latentflow.flow import OBJECTIVES
from latentflow.metrics import features, frechet_distance, in_proportion, real_split, retrieve
from latentflow.models import DiT
from latentflow.training.losses import flow_loss
from latentflow.training.losses.average_velocity import VelocityTeacher
from latentflow.training.losses.flow import FlowLoss

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "MeanFlow": ["--method", "mean-flow", "--method-options", "share", "0.5"],
    "alpha-Flow": ["--method", "alpha-flow", "--method-options", "share", "0.5"],
    "alpha-Flow, no derivative": [
        "--method",
        "alpha-flow",
        "--method-options",
        "share",
        "0.5",
        "least",
        "0.25",
    ],
    "shortcut": ["--method", "shortcut", "--method-options", "share", "0.5", "finest", "8"],
    "progressive": ["--method", "progressive"],
    "consistency": ["--method", "consistency"],
    "distribution matching": ["--method", "distribution-matching"],
    "reflow": ["--method", "reflow", "--pairs", "400", "--pairs-steps", "8"],
    "one-step distillation": ["--method", "one-step", "--pairs", "400", "--pairs-steps", "8"],
}
STEPS = (1, 2, 4)
TEACHERS_STEPS = (1, 2, 4, 8, 20, 50)
CAPTIONS, SHOWN, BATCH = 240, 8, 60
SAMPLES = 64  # of a training step
Quality = Callable[[Tensor, list[str]], dict[str, float]]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.experiment == "cost":
        print(costs())
        return
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if options.experiment == "shapes":
        measured = of_shapes(options, folder)
    else:
        measured = of_checkpoints(options, folder)
    (folder / "few-steps.md").write_text(table(measured))
    figure(measured, folder / "few-steps.png", folder)
    print(table(measured))


# ---------------------------------------------------------------- shapes


def of_shapes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    teacher = folder / "teacher"
    call("train", "shapes", "-o", teacher, "--preset", "tiny", "--preview-steps", 0, *options.teacher)
    every = train_captions()
    asked = [every[number * len(every) // CAPTIONS] for number in range(CAPTIONS)]

    def quality(images: Tensor, captions: list[str]) -> dict[str, float]:
        return {"right": sum(map(check, images, captions)) / len(captions)}

    figures = Figures(folder, asked, quality)
    figures.add("teacher", teacher / "pipeline", TEACHERS_STEPS)
    for name, flags in METHODS.items():
        if not options.only or name in options.only:
            run = folder / name.replace(" ", "-").replace(",", "")
            seconds = distilled(teacher / "pipeline", run, flags, options.seconds)
            counts = (1,) if "one-step" in flags else STEPS
            figures.add(name, run / "pipeline", counts, seconds)
    return figures.values


def distilled(teacher: Path, run: Path, flags: list[str], seconds: float) -> dict[str, float]:
    """Train a student for so many seconds, pairs included; what it took."""
    file = run / "seconds.json"
    if file.is_file():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    usual = ["--resolution", 32, "--train-batch-size", SAMPLES, "--lr-warmup-steps", 20, "--preview-steps", 0]
    usual += [
        "--validation-steps",
        0,
        "--guidance",
        3,
        "--learning-rate",
        5e-4,
        "--log-steps",
        1,
        "--lr-scheduler",
        "linear",
    ]
    trial = run.with_name(f"{run.name}-trial")
    pairs = 0.0
    if "--pairs" in flags:
        flags = [*flags, "--pairs-folder", str(run / "drawn")]
        started = time.monotonic()
        call("distill", teacher, "shapes", "-o", trial, *usual, *flags, "--max-train-steps", 1)
        pairs = time.monotonic() - started
    call(
        "distill", teacher, "shapes", "-o", trial, *usual, *flags, "--max-train-steps", 16, "--allow-changes"
    )
    step = float(np.median(step_seconds(trial)[3:]))
    steps = max(1, round((seconds - pairs) / step))
    call("distill", teacher, "shapes", "-o", run, *usual, *flags, "--max-train-steps", steps)
    took = {"step": step, "steps": steps, "pairs": pairs}
    file.write_text(json.dumps(took))
    return took


def step_seconds(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [SAMPLES / row["images_per_second"] for row in rows if "images_per_second" in row]


def call(command: str, *arguments: Any) -> None:
    program = ROOT / "train" / {"train": "flow.py"}.get(command, f"{command}.py")
    subprocess.run([sys.executable, str(program), *map(str, arguments)], check=True)


# ---------------------------------------------------------------- checkpoints


def of_checkpoints(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pipes = {one: opened(one) for one in options.checkpoint}
    first = next(iter(pipes.values()))
    side = int(first.vae_scale_factor * first.transformer.config.sample_size)
    source = find_source(options.data, condition="text")
    real, captions = pixels_to_images(cached_pixels(source, side)[:]), source.captions()
    order = in_proportion(captions, 0)  # as `latentflow evaluate` chooses them, but of the whole folder
    asked = [captions[row] for row in order[:100]]
    reference = features(real[real_split(order, 100).reference], "pixels-16")

    def quality(images: Tensor, captions_asked: list[str]) -> dict[str, float]:
        tops = retrieve(images, captions_asked, real, captions).shares
        distance = frechet_distance(features(images, "pixels-16"), reference)
        return {"top-1": tops[1], "top-5": tops[5], "Frechet": distance}

    figures = Figures(folder, asked, quality)
    for number, name in enumerate(pipes):
        shown = "teacher" if not number else Path(name.split("+")[-1]).name
        figures.add(shown, name, STEPS if pipes[name].few_steps else TEACHERS_STEPS)
    return figures.values


# ---------------------------------------------------------------- cost


def costs(rounds: int = 5, steps: int = 1) -> str:
    """A table: milliseconds of a step and, over the rounds, its ratio to that of flow matching."""
    network = DiT(in_channels=16, width=192, depth=7, heads=3, num_classes=10, interval_conditioning=True)
    teacher = VelocityTeacher(LatentFlowPipeline(vae=None, transformer=copy.deepcopy(network)), 4.0)
    stages: dict[str, FlowLoss] = {"flow matching": FlowLoss(network, FlowConfig(), 0)}
    for name, objective in OBJECTIVES.items():
        if objective.average:
            config = FlowConfig(objective=name)
            if not config.choices().settings.needs_teacher:
                stages[name] = flow_loss(network, config, 0)
            stages[f"{name}, guided teacher"] = flow_loss(network, config, 0, teacher=teacher)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-6, fused=True)
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for turn in range(rounds + 1):
        for name, stage in stages.items():
            started = time.perf_counter()
            for step in range(steps):
                numbers = [*range(step * 32, (step + 1) * 32)]
                generator = torch.Generator().manual_seed(step)
                latents = torch.randn(32, 16, 8, 8, generator=generator)
                batch = {"latents": latents, "sample_ids": numbers, "class_labels": torch.arange(32) % 10}
                stage(batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            if turn:  # the first is to warm up
                seconds[name].append((time.perf_counter() - started) / steps)
    lines = ["| objective | ms a step | over flow matching |", "|---|---|---|"]
    base = np.array(seconds["flow matching"])
    for name, taken in seconds.items():
        ratios = np.array(taken) / base
        middle = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        lines.append(f"| {name} | {np.median(taken) * 1000:.0f} | {middle} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- both


def opened(name: str | Path) -> Any:
    checkpoint, _, adapter = str(name).partition("+")
    pipe = LatentFlowPipeline.from_pretrained(checkpoint)
    if adapter:
        pipe.load_lora_weights(adapter)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Figures:
    """Quality by checkpoint and number of steps, on disk after each, and a strip of its first images."""

    def __init__(self, folder: Path, asked: list[str], quality: Quality) -> None:
        self.folder, self.file, self.asked, self.quality = folder, folder / "figures.json", asked, quality
        self.values: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def add(self, name: str, place: str | Path, counts: tuple[int, ...], cost: Any = None) -> None:
        mine = self.values.setdefault(name, {"cost": cost, "steps": {}})
        pipe = None
        for steps in counts:
            if str(steps) in mine["steps"]:
                continue
            pipe = pipe or opened(place)
            images = drawn(pipe, self.asked, steps)
            mine["steps"][str(steps)] = self.quality(images, self.asked)
            strip = torch.cat([*images[: SHOWN * 12 : 12]], dim=2)
            to_pil(strip).save(self.folder / f"{name}-{steps}.png")
            self.file.write_text(json.dumps(self.values, indent=1) + "\n")


def drawn(pipe: Any, asked: list[str], steps: int) -> Tensor:
    """An image for each caption, (N, 3, H, W) in [-1, 1]; the one at place i has the seed i."""
    more = {} if pipe.few_steps else {"solver": "euler"}
    images = []
    for start in tqdm(range(0, len(asked), BATCH), desc=f"drawing in {steps}"):
        part = asked[start : start + BATCH]
        generator = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        settings = {"num_inference_steps": steps, "output_type": "pt", "generator": generator, **more}
        images.append(pipe(prompt=part, **settings).images.float() * 2 - 1)
    return torch.cat(images)


def table(measured: dict[str, Any]) -> str:
    kinds = list(next(iter(measured["teacher"]["steps"].values())))
    rows = [["", "steps", *kinds, "training"], ["---"] * (len(kinds) + 3)]
    for name, one in measured.items():
        cost = one["cost"]
        told = ""
        if cost:
            told = f"{cost['steps']} steps of {cost['step'] * 1000:.0f} ms"
            told += f", pairs {cost['pairs']:.0f} s" if cost["pairs"] else ""
        for steps, figures in one["steps"].items():
            cells = [
                f"{figures[kind]:.1f}" if kind == "Frechet" else f"{figures[kind]:.1%}" for kind in kinds
            ]
            rows.append([name, steps, *cells, told])
            told = ""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def figure(measured: dict[str, Any], file: Path, folder: Path) -> None:
    """Quality against steps, and below it the same captions and seeds in one, two, ... steps."""
    kind = next(iter(next(iter(measured["teacher"]["steps"].values()))))
    strips = [(name, steps) for name, one in measured.items() for steps in one["steps"]]
    shown = [(name, steps) for name, steps in strips if (folder / f"{name}-{steps}.png").is_file()]
    heights = [4.0, *[0.55] * len(shown)]
    canvas, axes = pyplot.subplots(
        1 + len(shown), 1, figsize=(7, sum(heights)), height_ratios=heights, layout="constrained"
    )
    for name, one in measured.items():
        steps = [int(step) for step in one["steps"]]
        style = {"color": "black", "linewidth": 2} if name == "teacher" else {}
        axes[0].plot(steps, [row[kind] for row in one["steps"].values()], marker="o", label=name, **style)
    axes[0].set(xscale="log", xlabel="steps", ylabel=kind, xticks=TEACHERS_STEPS, xticklabels=TEACHERS_STEPS)
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    for axis, (name, steps) in zip(axes[1:], shown, strict=True):
        axis.imshow(pyplot.imread(folder / f"{name}-{steps}.png"))
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_ylabel(f"{name}, {steps}", rotation=0, ha="right", va="center", fontsize=8)
    canvas.savefig(file, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["shapes", "compare", "cost"])
    parser.add_argument("checkpoint", nargs="*", help="compare: the teacher, then its students")
    parser.add_argument("-o", "--output", help="folder of the runs and the figures")
    parser.add_argument("--data", help="compare: images with captions")
    parser.add_argument("--seconds", type=float, default=240, help="shapes: of training a student")
    parser.add_argument(
        "--teacher", nargs="*", default=[], metavar="FLAG", help="shapes: flags of the teacher"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="shapes: of METHODS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.experiment == "compare" and not (options.checkpoint and options.data):
        parser.error("compare needs checkpoints and --data")
    if options.experiment != "cost" and not options.output:
        parser.error("give the folder, -o FOLDER")
    return options


if __name__ == "__main__":
    main()
