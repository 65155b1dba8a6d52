"""Any mode and orientation becomes the same upright RGB image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data import FileExample, read_image, to_pil, to_tensor
from latentflow.data.images import to_rgb
from latentflow.errors import UserError

from .images import noise, turned_by_exif


def example(path: Path) -> FileExample:
    return FileExample(path.name, path=path)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_exactly(tmp_path: Path, orientation: int) -> None:
    upright = np.asarray(noise(0, width=6, height=4))
    stored, exif = turned_by_exif(upright, orientation)
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(read_image(example(tmp_path / "a.png"), (4, 6))), upright)


@pytest.mark.parametrize(("background", "ground"), [("white", 255), ("black", 0), ("#404040", 64)])
def test_transparency_is_composited(tmp_path: Path, background: str, ground: int) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[0, 1] = (200, 100, 50, 0)
    rgba[1, 0] = (200, 100, 50, 51)  # a fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    seen = pixels(read_image(example(tmp_path / "a.png"), 2, background)).astype(int)
    assert tuple(seen[0, 0]) == (200, 100, 50)
    assert tuple(seen[0, 1]) == tuple(seen[1, 1]) == (ground,) * 3
    assert np.abs(seen[1, 0] - (0.8 * ground + 0.2 * np.array([200, 100, 50]))).max() <= 1


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    assert pixels(to_rgb(image, "black")).tolist() == [[[0, 0, 0], [0, 0, 255]]]
    del image.info["transparency"]
    assert pixels(to_rgb(image, "black")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [
        ("L", 7, 7), ("1", 1, 255), ("I", 90, 90), ("LA", (100, 255), 100), ("LA", (100, 0), 255),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
    ],
)  # fmt: skip
def test_other_modes(tmp_path: Path, mode: str, value: object, rgb: object) -> None:
    image = Image.new(mode, (3, 3), value)  # type: ignore[arg-type]
    image.save(tmp_path / "a.tif")
    for seen in (to_rgb(image), read_image(example(tmp_path / "a.tif"), 3)):
        assert (pixels(seen) == rgb).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 257 * 100, 257 * 200, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    seen = pixels(read_image(example(tmp_path / f"a.{suffix}"), (1, 4)))
    assert seen[0, :, 0].tolist() == [0, 100, 200, 255]


@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0])
def test_float_grey(full: float) -> None:
    image = Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32) * np.float32(full))
    assert pixels(to_rgb(image))[0, :, 1].tolist() == [0, 51, 255]


def test_short_side_is_fitted_and_the_centre_kept(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (pixels(read_image(example(tmp_path / "a.png"), 8)) == 255).all()
    assert read_image(example(tmp_path / "a.png"), (4, 12)).size == (12, 4)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    seen = pixels(read_image(example(tmp_path / "a.png"), 8)).astype(int)
    assert np.abs(seen - 127.5).max() <= 2  # without a filter it would be all black or white


def test_tensors_round_trip_exactly() -> None:
    image = noise(1, 16, 16)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 0))).flatten().tolist() == [-1.0, 1.0, -1.0]
    assert np.asarray(to_pil(torch.full((3, 1, 1), 1.5))).tolist() == [[[255] * 3]]


def test_errors() -> None:
    with pytest.raises(UserError, match="'whitish' is not a colour"):
        to_rgb(noise(0), "whitish")
    with pytest.raises(ValueError, match="one row of a batch"):
        to_pil(torch.zeros(2, 3, 4, 4))
