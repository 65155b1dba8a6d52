"""Compare checkpoints of one data set of classes, at equal evaluations of the network.

    python benchmarks/checkpoints.py fashion/test vq=runs/tokens@autoencoder tokens=runs/tokens@1.5 codes=runs/codes@2 \
        -o runs/compared

TEST is a folder of images by class that no checkpoint was trained on; NAME=RUN@SCALE is a run and its guidance scale,
and RUN@autoencoder what its autoencoder alone makes of real images. Of 2n real images in the data's proportions n are
the reference, and n stand beside the n images of each checkpoint. Of each: Frechet distance and kernel distance (times
10^4) to the reference in the space `efficientnet-lite0`, the share of images whose 5 nearest reference images are
mostly of the class that was asked for, and the loss on unseen images as `latentflow evaluate` has it (of an
autoencoder the PSNR). The results are files in the folder -o, and what is there is not computed again; sheet.png has a
row for each, the first image of every class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from latentflow import LatentFlowPipeline, metrics
from latentflow.data import find_source
from latentflow.evaluation.data import ImageSet, load_images
from latentflow.evaluation.figures import reconstruction, validation_loss
from latentflow.evaluation.sampler import TRAINING_CAPTIONS, Sampler

SPACE, BATCH = "efficientnet-lite0", 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("test", metavar="TEST")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=RUN@SCALE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--loss-images", type=int, default=500)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    real: tuple[ImageSet, Tensor, Tensor, list[str]] | None = None
    rows: dict[str, dict[str, Any]] = {}
    sheet: list[Tensor] = []
    for text in asked.checkpoints:
        name, _, given = text.partition("=")
        run, _, scale = given.rpartition("@")
        pipe = LatentFlowPipeline.from_pretrained(Path(run) / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        if real is None:
            real = real_images(pipe.model, asked.test, asked.output, asked.n)
            sheet.append(one_of_each(real[0].images, real[0].captions))
            rows["real images"] = compare(real[1], real[0].captions, *real[2:])
        file = asked.output / f"{name}-{scale}-{asked.n}.json"
        if not file.exists():
            images, figures = drawn(pipe, real[0], scale, asked)
            figures |= compare(metrics.features(images, SPACE), real[0].captions, *real[2:])
            torch.save(one_of_each(images, real[0].captions), file.with_suffix(".pt"))
            file.write_text(json.dumps({"run": run} | figures, indent=1))
        rows[f"{name} {scale}"] = json.loads(file.read_text())
        sheet.append(torch.load(file.with_suffix(".pt"), weights_only=True))
        print(name, scale, rows[f"{name} {scale}"], flush=True)
    save_image(
        make_grid(torch.cat(sheet) / 2 + 0.5, nrow=len(sheet[0]), pad_value=1.0), asked.output / "sheet.png"
    )
    for name, row in rows.items():
        loss = row.get("loss", {}).get("value", row.get("psnr", ""))
        kernel = f"{1e4 * row['kernel']:.1f} +- {1e4 * row['kernel_error']:.1f}"
        print(f"| {name} | {row['frechet']:.3f} | {kernel} | {row['class_accuracy']:.0%} | {loss} |")


def real_images(model: Any, test: str, folder: Path, n: int) -> tuple[ImageSet, Tensor, Tensor, list[str]]:
    """Return n real images, their features, and features and classes of the n of the reference."""
    images = load_images(model, find_source(test), "black")
    order = metrics.in_proportion(images.captions, 0)[: 2 * n]
    images = images.rows(order)
    file = folder / f"real-{n}.pt"
    if not file.exists():
        torch.save(metrics.features(images.images, SPACE), file)
    found = torch.load(file, weights_only=True)
    return images.rows([*range(n)]), found[:n], found[n:], images.captions[n:]


@torch.no_grad()
def drawn(pipe: Any, real: ImageSet, scale: str, asked: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """Return an image for each real one, in 256 levels, and what is known without it."""
    if scale == "autoencoder":
        copies = [pipe.model.decode(pipe.model.encode(part)).cpu() for part in real.images.split(BATCH)]
        levels = ((torch.cat(copies).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        return levels, {"psnr": reconstruction(pipe.model, real.images, BATCH)["psnr"]}
    settings = {"num_inference_steps": asked.steps, "guidance_scale": float(scale)}
    sampler = Sampler(
        model=pipe.model, pipeline=pipe, condition_kind="class_labels", settings=settings, seed=0, batch_size=BATCH
    )  # fmt: skip
    unseen = real.rows([*range(asked.loss_images)])
    loss = validation_loss(sampler, unseen) if asked.loss_images else {}
    return sampler.sample(real.captions, TRAINING_CAPTIONS, "classes"), {"loss": loss}


def compare(rows: Tensor, classes: list[str], reference: Tensor, labels: list[str]) -> dict[str, float]:
    """Return the distances of features (N, D) to the reference, and how often the class is that of the neighbours."""
    kernel = metrics.kernel_distance(rows, reference)
    near = metrics.neighbour_labels(rows, reference, labels, k=5)
    return {
        "frechet": metrics.frechet_distance(rows, reference),
        "kernel": kernel.value,
        "kernel_error": kernel.standard_error,
        "class_accuracy": sum(a == b for a, b in zip(near, classes, strict=True)) / len(classes),
    }


def one_of_each(images: Tensor, classes: list[str]) -> Tensor:
    """Return the first image of each class."""
    return images[[classes.index(name) for name in sorted(set(classes))]]


if __name__ == "__main__":
    main()
