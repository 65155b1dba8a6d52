"""The program that writes Fashion-MNIST as a folder of images by class."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import UserError

from .images import load_program

LABELS = {"train": [9, 0, 9, 5], "t10k": [8, 1]}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Four tiny files as the package has them, of random pixels; those of the test images are not compressed."""
    folder, generator = tmp_path / "packages" / "usr", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, labels in LABELS.items():
        images = generator.integers(0, 256, (len(labels), 28, 28), np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
            header = np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes()
            content, file = header + values.tobytes(), folder / f"{name}-{kind}-ubyte"
            if name == "train":
                content, file = gzip.compress(content), file.with_name(f"{file.name}.gz")
            file.write_bytes(content)
    return tmp_path / "packages"


@pytest.fixture(scope="module")
def program(repository: Path) -> Any:
    return load_program(repository / "train" / "recipes" / "fashion_mnist.py")


def test_each_image_is_in_the_folder_of_its_class(files: Path, program: Any, tmp_path: Path) -> None:
    program.main([str(files), "-o", str(tmp_path / "out"), "--resolution", "31"])
    for part, name in (("train", "train"), ("test", "t10k")):
        for i, label in enumerate(LABELS[name]):
            with Image.open(tmp_path / "out" / part / program.CLASSES[label] / f"{i:05d}.png") as image:
                pixels = np.asarray(image)
            expected = program.read(files, f"{name}-images-idx3-ubyte", 3)[i]
            assert pixels.dtype == np.uint8 and pixels.shape == (31, 31)
            np.testing.assert_array_equal(pixels[1:29, 1:29], expected)
            assert not pixels[0].any() and not pixels[29:].any() and not pixels[:, 29:].any()
    with pytest.raises(UserError, match="exists"):
        program.main([str(files), "-o", str(tmp_path / "out")])


def test_count_takes_the_first(files: Path, program: Any, tmp_path: Path) -> None:
    program.main([str(files), "-o", str(tmp_path / "out"), "--count", "1"])
    found = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.png"))
    assert found == ["test/bag/00000.png", "train/ankle boot/00000.png"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has no train-images-idx3-ubyte.gz"),
        (lambda file: file.write_bytes(b"no gzip"), "is no IDX file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-400]), "is no IDX file"),
        (lambda file: file.write_bytes(gzip.compress(bytes(900))), "is no IDX file"),
    ],
)
def test_files_that_are_damaged_are_named(
    files: Path,
    program: Any,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    damage(files / "usr" / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=message):
        program.main([str(files), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
