"""Random masks for training; and masks of users: any mode and orientation becomes the same mask, what is no mask is
refused with the file and the fix."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data import decode_image, read_mask
from latentflow.data.images import to_rgb
from latentflow.data.masks import DEFAULT_SHAPES, MASK_SHAPES, check_shapes, random_masks
from latentflow.errors import UserError

from .images import STORED, encoded, noise, png_header, turned_by_exif

SIZE = (48, 80)
DRAWS = 300
# shape -> bounds of the share of the area, of a single mask and on average
AREAS = {
    "rectangle": ((0.03, 0.75), (0.3, 0.45)),
    "strokes": ((0.0, 0.7), (0.05, 0.3)),
    "ellipse": ((0.0, 0.8), (0.1, 0.35)),
    "half-plane": ((0.15, 0.85), (0.45, 0.55)),
    "frame": ((0.25, 0.97), (0.55, 0.7)),
    "full": ((1.0, 1.0), (1.0, 1.0)),
    "none": ((0.0, 0.0), (0.0, 0.0)),
}


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_each_shape_has_its_area_and_lies_anywhere(shape: str) -> None:
    masks = random_masks({shape: 1.0}, SIZE, generators(DRAWS))
    assert masks.shape == (DRAWS, 1, *SIZE)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    (low, high), (mean_low, mean_high) = AREAS[shape]
    areas = masks.mean((1, 2, 3))
    assert low <= areas.min() and areas.max() <= high
    assert mean_low <= areas.mean() <= mean_high
    if shape not in ("full", "none"):
        assert len({mask.numpy().tobytes() for mask in masks}) > 0.8 * DRAWS
        everywhere = masks.mean((0, 1))
        assert everywhere.min() > 0 and everywhere.max() < 1  # no pixel always or never hidden


def test_shapes_come_in_their_shares() -> None:
    masks = random_masks({"full": 3.0, "none": 1.0}, SIZE, generators(1000))
    share = masks.mean((1, 2, 3)).mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 1000) ** 0.5


def test_a_generator_decides_its_mask_alone() -> None:
    alone = [random_masks(DEFAULT_SHAPES, SIZE, [one]) for one in generators(20)]
    assert torch.equal(torch.cat(alone), random_masks(DEFAULT_SHAPES, SIZE, generators(20)))
    assert not torch.equal(torch.cat(alone), random_masks(DEFAULT_SHAPES, SIZE, generators(20, seed=1)))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 200)])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_small_and_long_images(shape: str, size: tuple[int, int]) -> None:
    assert random_masks({shape: 1.0}, size, generators(20)).shape == (20, 1, *size)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"rectangles": 1.0}, "(?s)unknown mask shape 'rectangles'.*'rectangle'"),
        ({"rectangle": -1.0, "full": 2.0}, "is -1.0"),
        ({"rectangle": float("nan")}, "is nan"),
        ({"rectangle": 0.0}, "no mask shape"),
        ({"data": 1.0}, "unknown mask shape"),
    ],
)
def test_shares_that_cannot_be_drawn_are_refused(shapes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shapes(shapes)


def test_the_default_can_be_drawn() -> None:
    check_shapes(DEFAULT_SHAPES)
    check_shapes({"data": 1.0}, more=["data"])


# --- masks of users ----------------------------------------------------------------------------------


HARD = np.array([[0, 0, 255, 255, 0], [0, 255, 255, 255, 0], [0, 0, 0, 255, 0]], np.uint8)
SOFT = np.array([[0, 51, 102, 153, 204, 255], [255, 204, 153, 102, 51, 0]], np.uint8)


def grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels)


def layer(colour: tuple[int, int, int], under: tuple[int, int, int]) -> Callable[[np.ndarray], Image.Image]:
    """Paint of one colour, as opaque as the level, over transparent pixels of the colour ``under``."""

    def paint(levels: np.ndarray) -> Image.Image:
        rgba = np.empty((*levels.shape, 4), np.uint8)
        rgba[..., :3] = np.where(levels[..., None] > 0, np.uint8(colour), np.uint8(under))
        rgba[..., 3] = levels
        return Image.fromarray(rgba)

    return paint


# Ways in which programs store the same mask.
STORED_AS: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "L": grey,
    "LA": lambda a: grey(a).convert("LA"),
    "RGB": lambda a: grey(a).convert("RGB"),
    "RGBA": lambda a: grey(a).convert("RGBA"),
    "CMYK": lambda a: grey(a).convert("RGB").convert("CMYK"),
    "P": lambda a: grey(a).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
    "16-bit": lambda a: Image.fromarray(a.astype(np.uint16) * 257),
    "32-bit": lambda a: Image.fromarray(a.astype(np.int32)),
    "float to 1": lambda a: Image.fromarray(a.astype(np.float32) / 255),
    "float to 255": lambda a: Image.fromarray(a.astype(np.float32)),
    "white layer": layer((255, 255, 255), (0, 0, 0)),
    "white layer on white": layer((255, 255, 255), (255, 255, 255)),
    "red layer": layer((250, 10, 10), (0, 0, 0)),
    "LA layer": lambda a: Image.merge("LA", (Image.new("L", a.shape[::-1], 255), grey(a))),
}
ONLY_HARD: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "1": lambda a: grey(a).convert("1", dither=Image.Dither.NONE),
    "label map": lambda a: grey(a // 255),
    "16-bit label map": lambda a: Image.fromarray((a // 255).astype(np.uint16)),
}


@pytest.mark.parametrize(("stored_as", "levels"), [
    *((make, SOFT) for make in STORED_AS.values()),
    *((make, HARD) for make in (STORED_AS | ONLY_HARD).values()),
])  # fmt: skip
def test_every_way_to_store_a_mask(
    stored_as: Callable[[np.ndarray], Image.Image], levels: np.ndarray
) -> None:
    mask = read_mask(stored_as(levels))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), levels)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
def test_all_keep_and_all_repaint(mode: str, level: int) -> None:
    assert (np.asarray(read_mask(Image.new("L", (4, 3), level).convert(mode))) == level).all()


def test_a_palette_with_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 255, 255, 255, 255, 255, 255])
    image.putdata([0, 1, 2])
    image.info["transparency"] = 2  # white, but not painted
    assert np.asarray(read_mask(image)).tolist() == [[0, 255, 0]]


def test_greys_of_a_layer_count_as_much_as_they_are_opaque() -> None:
    assert not np.asarray(read_mask(Image.new("RGBA", (4, 4), (255, 255, 255, 0)))).any()
    image = Image.new("LA", (3, 1), (255, 255))
    image.putpixel((1, 0), (100, 255))
    image.putpixel((2, 0), (200, 51))
    assert np.asarray(read_mask(image)).tolist() == [[255, 100, 40]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("make", [grey, STORED_AS["16-bit"], STORED_AS["white layer"]])
def test_exif_orientation_is_undone(
    tmp_path: Path, orientation: int, make: Callable[[np.ndarray], Image.Image]
) -> None:
    stored, exif = turned_by_exif(HARD, orientation)
    make(np.asarray(stored)).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(np.asarray(read_mask(decode_image(tmp_path / "m.png"))), HARD)


def test_another_size_is_resized_to_the_nearest_pixel_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_mask(grey(SOFT), (6, 2)).size == (6, 2)
        assert not caplog.text
        mask = read_mask(grey(SOFT), (12, 6))
    assert np.array_equal(np.asarray(mask), SOFT.repeat(3, 0).repeat(2, 1))
    assert "the mask is 6 x 2, the image 12 x 6" in caplog.text and len(caplog.records) == 1


def test_the_size_is_that_of_the_upright_mask(caplog: pytest.LogCaptureFixture) -> None:
    image = grey(np.ascontiguousarray(STORED[6](HARD)))
    image.getexif()[0x0112] = 6
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(np.asarray(read_mask(image, HARD.shape[::-1])), HARD)
    assert not caplog.text


@pytest.mark.parametrize("quality", [60, 90])
def test_a_jpeg_leaves_no_noise(tmp_path: Path, quality: int) -> None:
    levels = np.zeros((48, 48), np.uint8)
    levels[13:37, 11:29] = 255
    grey(levels).convert("RGB").save(tmp_path / "m.jpg", quality=quality)
    image = decode_image(tmp_path / "m.jpg")
    mask, stored = np.asarray(read_mask(image)), np.asarray(image.convert("L"))
    noisy = (stored > 0) & (stored <= 16) | (stored >= 239) & (stored < 255)
    assert noisy.any() and set(mask[noisy].tolist()) == {0, 255}
    assert ((mask >= 128) == (levels >= 128)).all()
    assert (mask[:8] == 0).all() and (mask[16:32, 16:24] == 255).all()


# --- no masks -----------------------------------------------------------------------------------------


NO_MASKS = {
    **{mode: (lambda mode=mode: noise(3, 9, 7).convert(mode), r"not a mask: it is in colour\n.*threshold")
       for mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr")},
    "black layer": (lambda: layer((0, 0, 0), (0, 0, 0))(HARD), r"black on transparent.*\nPaint in white"),
    "undefined": (lambda: Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "undefined values"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_MASKS)
def test_what_is_no_mask_is_refused(case: str) -> None:
    make, message = NO_MASKS[case]
    with pytest.raises(UserError, match=message):
        read_mask(make())


def test_a_cut_out_photo_is_no_mask() -> None:
    photo = noise(3, 9, 7)
    photo.putalpha(Image.linear_gradient("L").resize((9, 7)))
    with pytest.raises(UserError, match="not a mask"):
        read_mask(photo)
    assert set(np.unique(np.asarray(read_mask(photo, threshold=0.3)))) == {0, 255}


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_a_threshold_on_luminance(threshold: float) -> None:
    photo = noise(3, 9, 7)
    wanted = np.where(np.asarray(photo.convert("L")) >= threshold * 255, 255, 0)
    assert 0 < (wanted == 255).mean() < 1
    assert np.array_equal(np.asarray(read_mask(photo, threshold=threshold)), wanted)
    assert np.array_equal(np.asarray(read_mask(photo.convert("L"), threshold=threshold)), wanted)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, 128, float("nan")])
def test_a_threshold_outside_of_0_to_1(threshold: float) -> None:
    with pytest.raises(UserError, match=r"threshold is .*\nGive a luminance from 0"):
        read_mask(grey(SOFT), threshold=threshold)


def test_nearly_grey_is_grey() -> None:
    tinted = np.repeat(SOFT[..., None], 3, -1)
    tinted[..., 2] = np.maximum(tinted[..., 2], 10) - 5
    assert np.abs(np.asarray(read_mask(Image.fromarray(tinted))).astype(int) - SOFT).max() <= 2


# --- files --------------------------------------------------------------------------------------------


def test_a_truncated_mask_opened_by_the_user_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(encoded(noise(0, 64, 64).convert("L"))[:2000])
    with pytest.raises(UserError, match=rf"the mask {path} cannot be read: .*\n.*copy or save it again"):
        read_mask(Image.open(path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow only warns of the first
def test_oversized_files(tmp_path: Path, side: int) -> None:
    (tmp_path / "m.png").write_bytes(png_header(side, side))
    with pytest.raises(UserError, match=rf"m.png is too large: .*\nShrink it below {Image.MAX_IMAGE_PIXELS}"):
        decode_image(tmp_path / "m.png")


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(UserError, match=r"mask.png is not an image"):
        decode_image(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"no file .*/maks.png\nDid you mean .*/mask.png"):
        decode_image(tmp_path / "maks.png")
    with pytest.raises(UserError, match="is a folder"):
        decode_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_opened_image_needs_its_file_no_more(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(0, 6, 4).save(tmp_path / f"a.{suffix}", exif=exif)
    image = decode_image(str(tmp_path / f"a.{suffix}"))
    (tmp_path / f"a.{suffix}").unlink()
    assert np.array_equal(np.asarray(to_rgb(image)), np.rot90(np.asarray(noise(0, 6, 4)), -1))
