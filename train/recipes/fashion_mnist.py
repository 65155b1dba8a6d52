"""Write Fashion-MNIST as a folder of images by class, from Debian's package.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python train/recipes/fashion_mnist.py fashion -o data/fashion-mnist
    latentflow train data/fashion-mnist/train --resolution 32 --preset tiny -o runs/fashion

60,000 training and 10,000 test images of 28 x 28 grey pixels in ten classes (Xiao, Rasul & Vollgraf 2017,
arXiv:1708.07747; Zalando, MIT licence), as `train/CLASS/00000.png` and `test/CLASS/00000.png`, numbered as in the
files. Each is centred on black, 32 x 32 by default, so that it divides by the strides of autoencoders. Works with the
files of any other source too, compressed or not.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from latentflow.cli import parse, run
from latentflow.errors import UserError, whole
from latentflow.utils.progress import progress_bar

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PARTS = {"train": "train", "test": "t10k"}
SIDE = 28


@dataclass(frozen=True, kw_only=True)
class FashionConfig:
    """Write Fashion-MNIST as a folder of images by class."""

    packages: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder with the four files, such as train-images-idx3-ubyte.gz, at any depth."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to make; it must not exist yet."""
    resolution: int = 32
    """Side of the images in pixels, 28 or more: black is added around them."""
    count: int | None = None
    """Only the first images of each part. Default: all."""

    def __post_init__(self) -> None:
        whole("--resolution", self.resolution, SIDE, 1024)
        if self.count is not None:
            whole("--count", self.count, 1)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(FashionConfig, argv, prog="fashion_mnist.py", description=__doc__ or "")
    if config.output.exists():
        raise UserError(f"{config.output} exists", "Name a new folder, or remove it.")
    parts = {
        part: (
            read(config.packages, f"{name}-images-idx3-ubyte", 3),
            read(config.packages, f"{name}-labels-idx1-ubyte", 1),
        )
        for part, name in PARTS.items()
    }
    for part, (images, labels) in parts.items():
        if len(images) != len(labels) or images.shape[1:] != (SIDE, SIDE) or labels.max() >= len(CLASSES):
            raise UserError(
                f"{config.packages}: the files of {part} are not those of Fashion-MNIST",
                f"{len(images)} images of {images.shape[1:]}, {len(labels)} labels up to {labels.max()}.",
            )
    before = (config.resolution - SIDE) // 2
    border = (before, config.resolution - SIDE - before)
    for part, (images, labels) in parts.items():
        for name in CLASSES:
            (config.output / part / name).mkdir(parents=True)
        chosen = list(zip(images, labels, strict=True))[: config.count]
        for i, (pixels, label) in enumerate(progress_bar(chosen, desc=part)):
            file = config.output / part / CLASSES[label] / f"{i:05d}.png"
            Image.fromarray(np.pad(pixels, (border, border))).save(file)
        print(f"{config.output / part}: {len(chosen)} images")


def read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Return the bytes of an IDX file, (n, ...) uint8.

    Raises:
        UserError: it is not there, or is no such file.
    """
    found = sorted(file for file in folder.rglob(f"{name}*") if file.name in (name, f"{name}.gz"))
    if not found:
        raise UserError(
            f"{folder} has no {name}.gz", "Take it from Debian's dataset-fashion-mnist; see --help."
        )
    try:
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
        magic, *shape = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
        if magic != 0x800 + dimensions:
            raise ValueError(f"its first bytes are {magic:#010x}")
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{found[0]} is no IDX file of bytes: {error}", "Fetch it again.") from error


if __name__ == "__main__":
    run(main)
