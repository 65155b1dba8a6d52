"""Which part of each image is trained on."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.config import FramingConfig
from latentflow.data import Source, crop, find_source
from latentflow.data.crops import CroppedExample, bucket_sizes, with_crops
from latentflow.data.dataset import read_image, read_own_mask
from latentflow.errors import UserError

from .images import turned_by_exif

SIZES = {"square": (64, 64), "wide": (100, 60), "tall": (60, 100), "panorama": (300, 50), "turned": (90, 40)}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Ramps from left (red 0) to right (red 255); ``turned`` is told by EXIF to stand upright."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (width, height) in SIZES.items():
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
        _, exif = turned_by_exif(pixels, 6 if name == "turned" else 1)
        Image.fromarray(pixels).save(folder / f"{name}.png", exif=exif)
    return find_source(str(folder), condition="none")


@pytest.mark.parametrize(("resolution", "unit"), [*itertools.product((64, 96, 256, 512, 1024), (8, 16, 32))])
def test_buckets_hold_at_most_the_square_s_pixels_and_mirror_one_another(resolution: int, unit: int) -> None:
    sizes = bucket_sizes(resolution, unit)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % unit == 0 and width % unit == 0
        assert 0.6 * resolution**2 <= height * width <= resolution**2
        assert 0.2 <= height / width <= 5
    ratios = [width / height for height, width in sizes]
    assert sorted(ratios, reverse=True) == ratios


def test_a_resolution_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="Use --resolution 64"):
        bucket_sizes(60, 16)


def test_each_image_gets_the_nearest_aspect_ratio_and_none_is_left_out(source: Source) -> None:
    framing = crop(source, 64, 8, FramingConfig(buckets=True))
    names = [example.name for example in source.examples]
    size = {name: framing.sizes[framing.bucket[row]] for row, name in enumerate(names)}
    assert size["square.png"] == (64, 64)
    assert size["wide.png"] == (48, 80) and size["tall.png"] == (80, 48)
    assert size["panorama.png"] == (32, 128)
    assert size["turned.png"] == (96, 40)  # upright: 40 wide, 90 high
    assert sorted(itertools.chain(*(members.tolist() for members in framing.members))) == list(range(5))
    lines = "\n".join(framing.lines())
    assert "none left out" in lines and "33.3% of panorama.png at most" in lines
    assert "WARNING: 1 images lose more than 25%" in lines
    parts = [framing.part(number) for number in range(len(framing.sizes))]
    assert sum(map(len, parts)) == len(source)
    for number, part in enumerate(parts):
        for example in part.examples:
            height, width = framing.sizes[number]
            assert read_image(example, (height, width)).size == (width, height)


def test_without_buckets_nothing_is_looked_at(source: Source) -> None:
    framing = crop(source, 64, 8, FramingConfig())
    assert framing.sizes == ((64, 64),) and framing.part(0) is source and not framing.lines()


def test_crops_lie_where_they_are_said_to(source: Source) -> None:
    row = [example.name for example in source.examples].index("panorama.png")
    framing = crop(source, 50, 10, FramingConfig(crops=8), size_conditioning=True)
    part = framing.part(0)
    assert len(part) == 8 * len(source)
    crops = part.examples[8 * row : 8 * row + 8]
    rows, numbers = np.full(8, row), np.arange(8)
    plain, mirrored = (framing.size_conditioning(rows, numbers, np.full(8, flip)) for flip in (0, 1))
    for example, said, said_mirrored in zip(crops, plain, mirrored, strict=True):
        assert said[[0, 1, 2, 4, 5]].tolist() == [50, 300, 0, 50, 50]
        assert said[3] + said_mirrored[3] == 250  # what is left of an image is right of its mirror image
        left = np.asarray(read_image(example, 50))[0, 0, 0] / 255 * 299
        assert abs(left - said[3]) < 3
    assert plain[0, 3] == 125  # the first is the middle
    assert len({example.content_key() for example in crops}) == 8
    assert np.ptp(plain[:, 3]) > 60


def test_a_crop_s_mask_is_cut_with_it(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    folder.mkdir()
    image = np.zeros((50, 300, 3), dtype=np.uint8)
    image[:, 140:200] = 255
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image[..., 0]).save(folder / "a-mask.png")
    for example in with_crops(find_source(str(folder), condition="none"), 6).examples:
        mask = read_own_mask(example, 50)
        assert mask is not None
        assert (
            np.asarray(mask) == np.asarray(read_image(example, 50))[..., 0]
        ).mean() > 0.9  # the image is interpolated


def test_what_a_crop_says_of_its_image(source: Source) -> None:
    whole, cut, *_ = with_crops(source, 2).examples
    assert isinstance(cut, CroppedExample) and cut.name == whole.name and cut.centering != whole.centering
    assert crop(source, 64, 8, FramingConfig(crops=2)).part(0).examples[1].content_key() == cut.content_key()


def test_many_crops_take_no_memory_before_they_are_asked_for(source: Source) -> None:
    tracemalloc.start()
    part = with_crops(dataclasses.replace(source, examples=source.examples * 1000), 64)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(part) == 64 * 5000 and held < 2**20
    assert part.examples[-1] == part.examples[len(part) - 1] and len(part.examples[64:192]) == 128
    with pytest.raises(IndexError):
        part.examples[len(part)]


def test_too_many_crops_are_refused() -> None:
    with pytest.raises(UserError, match="--crops is 65"):
        FramingConfig(crops=65)
