"""A captioned checkpoint on `pictograms`: are captions of the training data found again, by style, and are pairs of a
style and a name drawn that no image showed?

    python benchmarks/styles.py CHECKPOINT PICTOGRAMS [-n 100] [--styles 3d flat] [--seed 0] [--fast] [-o runs/styles]

PICTOGRAMS is the folder of `train/recipes/pictograms.py`, with its `train` and `test`, of which --styles chooses the
styles that the checkpoint was trained on. All images are drawn as
`latentflow generate` draws them, one try each, image i with the seed --seed + i, and are compared in the learned
features of `latentflow evaluate` (L2 distance).

"found again": n captions "<style> style: <name>" of each style, drawn by --seed; an image counts if the training image
nearest to it, of all styles, has its caption (top-5: one of the five nearest).

"unseen pairs": all of `test`, or the first --unseen of them in the order of a hash. Right style: most of the five
nearest training images have it. Right name, "by other styles": a name stands for itself by the mean feature of its
training images in the other styles of emoji, each less the mean feature of its style; an image, less the mean of the
style that it was asked in, counts if the nearest of all names that this style has is its own. The held-out images
themselves, judged likewise, are what can be reached. Right name, "by the held-out image": the nearest of all images of
the style, seen and held out, is the one that was asked for.

Writes figures.json and, for each part, a sheet of the first 64 images, in the order of their seeds. Features of
the real images are kept in real.safetensors, which another run with the same output reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from latentflow import LatentFlowPipeline
from latentflow.data import pixels_to_images, to_pil
from latentflow.evaluation.figures import share
from latentflow.inference.images import image_grid
from latentflow.inference.sample import generators
from latentflow.metrics import features, nearest_rows, neighbour_labels, retrieve_rows, usual_space

BATCH, SHEET = 32, 64


def rows_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "metadata.jsonl").open(encoding="utf-8") as lines:
        return [{**json.loads(line), "file": folder / json.loads(line)["file_name"]} for line in lines]


def caption(row: dict[str, Any]) -> str:
    return f"{row['style']} style: {row['name']}"


def features_of(rows: list[dict[str, Any]], side: int, space: str) -> Tensor:
    """Features (N, D) of images on white, as training sees them."""

    def pixels(file: Path) -> Tensor:
        image = Image.open(file).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        sized = white.resize((side, side), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(sized).copy()).permute(2, 0, 1)

    parts = [rows[i : i + 256] for i in range(0, len(rows), 256)]
    return torch.cat(
        [
            features(pixels_to_images(torch.stack([pixels(row["file"]) for row in part])), space)
            for part in tqdm(parts, desc="features of real images")
        ]
    )


@torch.no_grad()
def drawn(pipe: Any, captions: list[str], seed: int) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] of the captions."""
    found = []
    for start in tqdm(range(0, len(captions), BATCH), desc="images"):
        part = captions[start : start + BATCH]
        found.append(pipe(part, generator=generators(seed + start, len(part)), output_type="pt").images)
        pipe.set_progress_bar_config(disable=True)
    return torch.cat(found) * 2.0 - 1.0


def found_again(
    rows: Tensor, asked: list[dict[str, Any]], real: Tensor, train: list[dict[str, Any]]
) -> dict[str, Any]:
    """Style -> shares of captions that are among those of the nearest and of the five nearest training images."""
    texts, result = [caption(row) for row in train], {}
    for style in [*dict.fromkeys(row["style"] for row in asked), "all"]:
        which = [i for i, row in enumerate(asked) if style in (row["style"], "all")]
        hits = retrieve_rows(rows[which], [caption(asked[i]) for i in which], real, texts).hits
        result[style] = {f"top-{k}": share(count, len(which)) for k, count in hits.items()}
    return result


def unseen_pairs(
    rows: Tensor, test: list[dict[str, Any]], real: Tensor, train: list[dict[str, Any]], held_out: Tensor
) -> dict[str, Any]:
    """Shares of the right style and of the right name, of the drawn images ("drawn") and of the real ones ("real")."""
    styles = [row["style"] for row in train]
    of_style: dict[str, list[int]] = defaultdict(list)
    for i, style in enumerate(styles):
        of_style[style].append(i)
    means = {style: real[found].mean(0) for style, found in of_style.items()}
    of_name: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(train):
        if row["style"] != "clip art":
            of_name[row["name"]].append(i)

    def names_by_others(images: Tensor) -> int:
        right = 0
        for style in dict.fromkeys(row["style"] for row in test):
            which = [i for i, row in enumerate(test) if row["style"] == style]
            own = dict.fromkeys(row["name"] for row in [*train, *test] if row["style"] == style)
            others = {
                name: torch.stack([real[i] - means[styles[i]] for i in of_name[name] if styles[i] != style])
                for name in own
                if any(styles[i] != style for i in of_name[name])
            }
            names, centres = [*others], torch.stack([seen.mean(0) for seen in others.values()])
            nearest = nearest_rows(images[which] - means[style], centres, 1)[:, 0]
            right += sum(
                names[int(found)] == test[i]["name"] for found, i in zip(nearest, which, strict=True)
            )
        return right

    def names_by_image(images: Tensor) -> int:
        right = 0
        for i, row in enumerate(test):
            there = [k for k, other in enumerate(test) if other["style"] == row["style"]]
            among = torch.cat([held_out[there], real[of_style[row["style"]]]])
            found = int(nearest_rows(images[i : i + 1], among, 1))
            right += found < len(there) and there[found] == i
        return right

    def right_styles(images: Tensor) -> int:
        return sum(
            a == row["style"] for a, row in zip(neighbour_labels(images, real, styles), test, strict=True)
        )

    n, chosen = len(test), {"drawn": rows, "real": held_out}
    figures: dict[str, Any] = {
        "right style": {name: share(right_styles(images), n) for name, images in chosen.items()},
        "right name by other styles": {
            name: share(names_by_others(images), n) for name, images in chosen.items()
        },
        "right name by the held-out image": {"drawn": share(names_by_image(rows), n)},
    }
    names = figures["right name by other styles"]
    names["drawn of real"] = names["drawn"]["count"] / max(names["real"]["count"], 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("--styles", nargs="+", help="that the checkpoint knows; default: all")
    parser.add_argument("-n", type=int, default=100, help="captions of each style")
    parser.add_argument("--unseen", type=int, default=10_000, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="by the few-step adapter")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/styles"))
    args = parser.parse_args()

    splits = {split: rows_of(args.data / split) for split in ("train", "test")}
    chosen = {
        split: [i for i, row in enumerate(rows) if not args.styles or row["style"] in args.styles]
        for split, rows in splits.items()
    }
    train, test = ([splits[split][i] for i in chosen[split]] for split in ("train", "test"))
    asked: list[dict[str, Any]] = []
    for style in dict.fromkeys(row["style"] for row in train):
        of_style = [row for row in train if row["style"] == style]
        asked += random.Random(f"{args.seed}{style}").sample(of_style, min(args.n, len(of_style)))
    random.Random(args.seed).shuffle(asked)

    pipe = LatentFlowPipeline.from_pretrained(args.checkpoint)
    if args.fast:
        pipe.load_lora_weights(Path(args.checkpoint) / "fast")
    space, side = usual_space(), pipe.model.native_size[0]
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "real.safetensors"
    if not kept.exists():
        save_file(
            {split: features_of(rows, side, space) for split, rows in splits.items()},
            kept,
            {"features": f"{space} at {side} px"},
        )
    seen_by = load_file(kept)
    if any(len(seen_by[split]) != len(rows) for split, rows in splits.items()):
        parser.error(f"{kept} holds features of other images: remove it, or give another output")
    real, held_out = seen_by["train"][chosen["train"]], seen_by["test"][chosen["test"]]
    hashes = [hashlib.sha256(caption(row).encode()).hexdigest() for row in test]
    first = sorted(range(len(test)), key=hashes.__getitem__)[: args.unseen]
    test, held_out = [test[i] for i in first], held_out[first]
    figures: dict[str, Any] = {"checkpoint": args.checkpoint, "features": space, "seed": args.seed}
    for part, rows in {"found again": asked, "unseen pairs": test}.items():
        images = drawn(pipe, [caption(row) for row in rows], args.seed)
        sheet = image_grid([to_pil(image) for image in images[:SHEET]], 8)
        sheet.save(args.output / f"{part.replace(' ', '-')}.png")
        seen = features(images, space)
        figures[part] = (
            found_again(seen, rows, real, train)
            if part == "found again"
            else unseen_pairs(seen, rows, real, train, held_out)
        )
        figures[part]["first captions"] = [caption(row) for row in rows[:SHEET]]
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1))
    for part in ("found again", "unseen pairs"):
        for name, entries in figures[part].items():
            for each, entry in entries.items() if isinstance(entries, dict) else ():
                figure = (
                    f"{entry['share']:.1%} ({entry['count']} of {entry['n']})"
                    if isinstance(entry, dict)
                    else entry
                )
                print(f"{part}: {name}, {each}: {figure}")


if __name__ == "__main__":
    main()
