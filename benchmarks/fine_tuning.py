"""What a fine-tune learns, and what it forgets.

    python benchmarks/fine_tuning.py shapes -o runs/fine-tuning-shapes [--base-steps 1600]
    python benchmarks/fine_tuning.py folders -o runs/fine-tuning-emoji --base CHECKPOINT --new FOLDER --old FOLDER
        [--held-out FOLDER] [--variant "LoRA=--lora-rank 16"] [--variant ...]

"shapes": trains a class-conditional model of 21 of the 24 classes ("red circle", ...) of the procedural set, then
fine-tunes it on 60 images of each of the 3 others. An image is right if the exact checker finds in it one object of
the class's colour and shape, in one of the sizes and places that the set has.

"folders": fine-tunes a checkpoint of captions on the folder --new. Retrieval: the share of images drawn from a
caption whose nearest real image (of --old and --new together, in "pixels-32" of latentflow/metrics/features.py) has
that caption; for all captions of --new, and for 200 of --old before and after. The others of --old are --prior-prompts.
Loss: of the velocity at 8 times and 16 noises for each image, the same for all variants; for the images of --new
(what was learnt) and of --held-out, more of the same kind that were not trained on (what was learnt of the kind).

Each variant is a line of flags of `latentflow train`. Without --variant: the defaults, and without prior samples. Runs
resume, and figures that are there (FOLDER/figures.json) are not measured again; the table goes to FOLDER/figures.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentflow import LatentFlowPipeline
from latentflow.autoencoder import encode
from latentflow.data import cached_pixels, find_source, pixels_to_images
from latentflow.data.sources.shapes import POSITIONS, SIZES, Single, caption, check, train_source
from latentflow.flow import CondOT, flow_matching_loss
from latentflow.metrics import retrieve

ROOT = Path(__file__).resolve().parents[1]
NEW_CLASSES = ("red cross", "green circle", "yellow triangle")
IMAGES_OF_A_NEW_CLASS = 60
OLD_CAPTIONS = 200
TIMES = tuple((i + 0.5) / 8 for i in range(8))
NOISES = 16
BATCH = 50
VARIANTS = {"with its own samples (the default)": "", "without": "--prior-samples 0"}

Figures = dict[str, float]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    variants = dict(one.split("=", 1) for one in options.variant) or VARIANTS
    base, data, flags, measure = (of_shapes if options.experiment == "shapes" else of_folders)(
        options, folder
    )
    figures = Measured(folder / "figures.json")
    figures.add("base", lambda: measure(base))
    for name, more in variants.items():
        run = folder / name.split("(")[0].strip().replace(" ", "-")
        seconds = train(str(data), "-o", str(run), "--init-from", str(base), *flags, *shlex.split(more))
        figures.add(name, lambda run=run, seconds=seconds: measure(run / "pipeline") | {"seconds": seconds})
    (folder / "figures.md").write_text(table(figures.values))
    print(table(figures.values))


def train(*arguments: str) -> float:
    """`latentflow train` in a process of its own; its seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "train" / "flow.py"), *arguments], check=True)
    return time.monotonic() - started


Measure = Callable[[Path], Figures]

# ---------------------------------------------------------------- shapes


def of_shapes(options: argparse.Namespace, folder: Path) -> tuple[Path, Path, list[str], Measure]:
    """Base, new data, flags and figures of the procedural set; the base is trained here."""
    old, new = folder / "data" / "old", folder / "data" / "new"
    if not new.is_dir():
        write_shapes(old, new)
    steps = ["--max-train-steps", str(options.base_steps), "--preview-steps", "0"]
    train(str(old), "-o", str(folder / "base"), "--preset", "tiny", "--condition", "class", *steps)
    classes = sorted(one.name for one in old.iterdir())

    def measure(checkpoint: Path) -> Figures:
        pipe = opened(checkpoint)
        found = {"old classes": right(pipe, classes * 10)}
        if set(NEW_CLASSES) <= set(pipe.labels):
            found |= {"new classes": right(pipe, [*NEW_CLASSES] * 40)}
        return found

    return folder / "base" / "pipeline", new, ["--preset", "tiny", "--preview-steps", "0"], measure


def write_shapes(old: Path, new: Path) -> None:
    """A folder for each class: all images of the old ones, 60 of each new one, spread over sizes and places."""
    by_class: dict[str, list[Any]] = {}
    for example in train_source("class").examples:
        by_class.setdefault(example.label or "", []).append(example)
    for label, examples in by_class.items():
        kept = examples
        if label in NEW_CLASSES:
            kept = [
                examples[i * len(examples) // IMAGES_OF_A_NEW_CLASS] for i in range(IMAGES_OF_A_NEW_CLASS)
            ]
        place = (new if label in NEW_CLASSES else old) / label
        place.mkdir(parents=True)
        for example in kept:
            example.open().save(place / f"{example.name.replace(' ', '-')}.png")


def right(pipe: Any, classes: list[str]) -> float:
    """Share of images of these classes in which the exact checker finds what they are of."""

    def is_right(image: Tensor, name: str) -> bool:
        colour, shape = name.split()
        return any(
            check(image, caption(Single(colour, shape, size, position)))
            for size in SIZES
            for position in POSITIONS
        )

    images = drawn(pipe, "class_labels", classes)
    return sum(map(is_right, images, classes)) / len(classes)


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class Images:
    """Images (N, 3, H, W) in [-1, 1] and their captions."""

    images: Tensor
    captions: list[str]


def of_folders(options: argparse.Namespace, folder: Path) -> tuple[Path, Path, list[str], Measure]:
    """Base, new data, flags and figures of folders with captions."""
    base = Path(options.base)
    side = side_of(opened(base))
    old, new = read(options.old, side), read(options.new, side)
    held_out = read(options.held_out, side) if options.held_out else None
    order = torch.randperm(len(old.captions), generator=torch.Generator().manual_seed(0))[
        :OLD_CAPTIONS
    ].tolist()
    asked = [old.captions[row] for row in order]
    everything = Images(torch.cat([old.images, new.images]), [*old.captions, *new.captions])
    prompts = folder / "captions.txt"
    prompts.write_text("\n".join(captions_in_disorder(old.captions, set(asked))) + "\n", encoding="utf-8")

    def measure(checkpoint: Path) -> Figures:
        pipe = opened(checkpoint)
        found = {
            "new captions": retrieval(pipe, new.captions, everything),
            "200 old captions": retrieval(pipe, asked, everything),
            "loss, new": loss(pipe, new),
        }
        return found | ({} if held_out is None else {"loss, held out": loss(pipe, held_out)})

    flags = ["--resolution", str(side), "--prior-prompts", str(prompts), "--preview-steps", "0"]
    return base, Path(options.new), [*flags, "--validation", "0"], measure


def captions_in_disorder(captions: list[str], measured: set[str]) -> list[str]:
    """The captions without those that are measured: what is kept is not only what is practised."""
    others = sorted(set(captions) - measured)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(1)).tolist()
    return [others[row] for row in order]


def read(data: str, side: int) -> Images:
    source = find_source(data, condition="text")
    return Images(pixels_to_images(cached_pixels(source, side)[:]), source.captions())


def retrieval(pipe: Any, captions: list[str], real: Images) -> float:
    images = drawn(pipe, "prompt", captions)
    return retrieve(images, captions, real.images, real.captions, tops=(1,)).shares[1]


@torch.no_grad()
def loss(pipe: Any, images: Images) -> float:
    """Mean squared error of the velocity on the straight path, at the same noises and times whatever the checkpoint."""
    total = []
    for start in range(0, len(images.captions), BATCH):
        x1 = encode(pipe.vae, images.images[start : start + BATCH])
        captions = images.captions[start : start + BATCH]
        embeds, _, mask, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        velocity = pipe.velocity(pipe.condition(None, embeds, mask), None)
        for number in range(NOISES):
            x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1000 * number + start))
            for t in TIMES:
                sample = CondOT().sample(x0, x1, torch.full((len(x1),), t))
                total.append(flow_matching_loss(velocity(sample.xt, sample.t), sample))
    return float(torch.cat(total).mean())


# ---------------------------------------------------------------- both


def opened(checkpoint: Path) -> Any:
    pipe = LatentFlowPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def side_of(pipe: Any) -> int:
    return int(pipe.vae_scale_factor * pipe.transformer.config.sample_size)


def drawn(pipe: Any, name: str, asked: list[str]) -> Tensor:
    """An image for each, (N, 3, H, W) in [-1, 1]; the one at place i has the seed i."""
    images = []
    for start in tqdm(range(0, len(asked), BATCH), desc="drawing"):
        part = asked[start : start + BATCH]
        generator = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images.append(pipe(**{name: part}, generator=generator, output_type="pt").images.float() * 2 - 1)
    return torch.cat(images)


class Measured:
    """Figures by variant, on disk after each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Figures] = json.loads(file.read_text()) if file.is_file() else {}

    def add(self, name: str, measure: Callable[[], Figures]) -> None:
        if name not in self.values:
            self.values[name] = measure()
            self.file.write_text(json.dumps(self.values, indent=1) + "\n")


def table(values: dict[str, Figures]) -> str:
    columns = list(dict.fromkeys(name for figures in values.values() for name in figures))

    def cell(figures: Figures, name: str) -> str:
        if name not in figures:
            return ""
        if name == "seconds":
            return f"{figures[name]:.0f}"
        return f"{figures[name]:.4f}" if name.startswith("loss") else f"{figures[name]:.1%}"

    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cell(figures, column) for column in columns)] for name, figures in values.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["shapes", "folders"])
    parser.add_argument("-o", "--output", required=True, help="folder of the runs and the figures")
    parser.add_argument("--base-steps", type=int, default=1600, help="shapes: training steps of the base")
    parser.add_argument("--base", help="folders: the checkpoint")
    parser.add_argument("--new", help="folders: what it is fine-tuned on")
    parser.add_argument("--old", help="folders: what it was trained on")
    parser.add_argument("--held-out", help="folders: images like --new that are not trained on")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="a line of flags"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.experiment == "folders" and not (options.base and options.new and options.old):
        parser.error("folders needs --base, --new and --old")
    return options


if __name__ == "__main__":
    main()
