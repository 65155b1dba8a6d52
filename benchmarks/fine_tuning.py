"""What a fine-tune learns, and what it forgets.

    python benchmarks/fine_tuning.py shapes -o runs/fine-tuning-shapes [--base-steps 1600]
    python benchmarks/fine_tuning.py folders -o runs/fine-tuning-emoji --base CHECKPOINT --new FOLDER [--old FOLDER]
        [--held-out FOLDER] [--space efficientnet-lite0] [--seeds 0 1] [--variant "LoRA=--lora-rank 16"] [--variant ...]

"shapes": trains a class-conditional model of 21 of the 24 classes ("red circle", ...) of the procedural set, then
fine-tunes it on 60 images of each of the 3 others. An image is right if the exact checker finds in it one object of
the class's colour and shape, in one of the sizes and places that the set has.

"folders": fine-tunes a checkpoint of captions on the folder --new. Retrieval: the share of images generated for a
caption whose nearest real image (of --old and --new together, in the feature space --space) has that caption; for all
captions of --new, and with --old for 200 of its captions before and after. The others of --old are --prior-prompts;
without --old there are no prior samples. The row "real images" is what the autoencoder makes of --new. Loss: of the
velocity at 8 times and 4 noises for each image, the same for all variants; for the images of --new (what was learnt)
and of --held-out, more of the same kind that were not trained on (what was learnt of the kind).

Each variant is a line of flags of `latentflow train`, and is trained once for each of --seeds. Without --variant: the
defaults, and without prior samples. CPU: the seconds of processor time of the training. Runs resume, and figures that
are there (FOLDER/figures.json) are not measured again; the table goes to FOLDER/figures.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shlex
import subprocess
import sys
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
NOISES = 4
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
    for (name, more), seed in itertools.product(variants.items(), options.seeds):
        run = folder / f"{name.split('(')[0].strip().replace(' ', '-')}-{seed}"
        own = ["--seed", str(seed), *flags, *shlex.split(more)]
        seconds = train(str(data), "-o", str(run), "--init-from", str(base), *own)
        row = name if len(options.seeds) == 1 else f"{name}, seed {seed}"
        figures.add(row, lambda run=run, seconds=seconds: measure(run / "pipeline") | {"CPU": seconds})
    (folder / "figures.md").write_text(table(figures.values))
    print(table(figures.values))


def train(*arguments: str) -> float:
    """Run `latentflow train` in a process of its own; return its seconds of processor time."""
    before = processor_seconds()
    subprocess.run([sys.executable, str(ROOT / "train" / "flow.py"), *arguments], check=True)
    return processor_seconds() - before


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    new = read(options.new, side)
    held_out = read(options.held_out, side) if options.held_out else None
    everything, asked, prior = new, [], ["--prior-samples", "0"]
    if options.old:
        old = read(options.old, side)
        everything = Images(torch.cat([old.images, new.images]), [*old.captions, *new.captions])
        order = torch.randperm(len(old.captions), generator=torch.Generator().manual_seed(0))
        asked = [old.captions[row] for row in order[:OLD_CAPTIONS].tolist()]
        prompts = folder / "captions.txt"
        prompts.write_text("\n".join(captions_in_disorder(old.captions, set(asked))) + "\n", encoding="utf-8")
        prior = ["--prior-prompts", str(prompts)]

    def found(images: Tensor, captions: list[str]) -> float:
        real = (everything.images, everything.captions)
        return retrieve(images, captions, *real, space=options.space, tops=(1,)).shares[1]

    def measure(checkpoint: Path) -> Figures:
        pipe = opened(checkpoint)
        figures = {"new captions": found(drawn(pipe, "prompt", new.captions), new.captions)}
        if asked:
            figures[f"{len(asked)} old captions"] = found(drawn(pipe, "prompt", asked), asked)
        figures["loss, new"] = loss(pipe, new)
        return figures | ({} if held_out is None else {"loss, held out": loss(pipe, held_out)})

    def reconstructed() -> Figures:
        model = opened(base).model
        with torch.no_grad():
            copies = torch.cat([model.decode(model.encode(part)) for part in new.images.split(BATCH)])
        return {"new captions": found(copies, new.captions)}

    Measured(folder / "figures.json").add("real images", reconstructed)
    flags = ["--resolution", str(side), *prior, "--preview-steps", "0", "--validation", "0"]
    return base, Path(options.new), flags, measure


def captions_in_disorder(captions: list[str], measured: set[str]) -> list[str]:
    """The captions without those that are measured: what is kept is not only what is practised."""
    others = sorted(set(captions) - measured)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(1)).tolist()
    return [others[row] for row in order]


def read(data: str, side: int) -> Images:
    source = find_source(data, condition="text")
    return Images(pixels_to_images(cached_pixels(source, side)[:]), source.captions())


@torch.no_grad()
def loss(pipe: Any, images: Images) -> float:
    """Mean squared error of the velocity on the straight path, at the same noises and times whatever the checkpoint."""
    total = []
    for start in range(0, len(images.captions), BATCH):
        x1 = encode(pipe.vae, images.images[start : start + BATCH])
        rows = pipe.model.encode_prompt(images.captions[start : start + BATCH])
        velocity = pipe.model.velocity(rows, 1.0)
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
        if name == "CPU":
            return f"{figures[name]:.0f} s"
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
    parser.add_argument("--space", default="pixels-32", help="folders: feature space of the retrieval")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training runs")
    parser.add_argument("--held-out", help="folders: images like --new that are not trained on")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="a line of flags"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.experiment == "folders" and not (options.base and options.new):
        parser.error("folders needs --base and --new")
    return options


if __name__ == "__main__":
    main()
