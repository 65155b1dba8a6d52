"""The program `latentflow inpaint`, run in this process on tiny checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import UserError
from latentflow.flow.inpainting import DEFAULT_INPAINTING, INPAINTING

from ..data.images import turned_by_exif
from ..data.profiles import in_srgb, rgb_profile
from .conftest import pixels

Inpaint = Callable[..., list[Path]]
WIDTH, HEIGHT = 14, 10  # what neither autoencoder nor network divides
HOLE = (slice(2, 7), slice(4, 11))


@pytest.fixture
def inpaint(program: Inpaint) -> Inpaint:
    """Run it in a folder with `in.png` and `mask.png`."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save("in.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[HOLE] = 255
    Image.fromarray(mask).save("mask.png")
    return partial(program, "inpaint")


def test_only_the_hole_changes(inpaint: Inpaint) -> None:
    [path] = inpaint("in.png", "mask.png", "red apple", "-o", "a.png")
    changed = (pixels(path) != pixels("in.png")).any(-1)
    hole = pixels("mask.png").any(-1)
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.5


def test_a_box_is_the_mask_of_that_rectangle(inpaint: Inpaint) -> None:
    [masked] = inpaint("in.png", "mask.png", "red apple", "-o", "a.png")
    [boxed] = inpaint("in.png", "red apple", "--box", 4, 2, 11, 7, "-o", "b.png")
    assert np.array_equal(pixels(masked), pixels(boxed))


def test_without_a_prompt_the_surroundings_decide(inpaint: Inpaint) -> None:
    [without] = inpaint("in.png", "mask.png", "-o", "a.png")
    [empty] = inpaint("in.png", "mask.png", "", "-o", "b.png")
    [words] = inpaint("in.png", "mask.png", "red apple", "-o", "c.png")
    assert np.array_equal(pixels(without), pixels(empty))
    assert not np.array_equal(pixels(without), pixels(words))


def test_each_image_has_its_own_seed_and_files_are_kept(inpaint: Inpaint, class_folder: Path) -> None:
    common = ("in.png", "mask.png", "--class", "hat", "--checkpoint", class_folder)
    several = inpaint(*common, "-n", 2, "--seed", 5)
    assert several == [Path("out-1.png"), Path("out-2.png")]
    [alone] = inpaint(*common, "--seed", 6)
    [again] = inpaint(*common, "--seed", 6)
    assert (alone, again) == (Path("out.png"), Path("out-3.png"))
    assert np.abs(pixels(alone) - pixels(several[1])).max() <= 1
    assert np.abs(pixels(alone) - pixels(several[0])).max() > 1


def test_expanding_needs_no_mask_and_keeps_alpha(inpaint: Inpaint, clear: Any) -> None:
    margins = ("--expand", 3, 1, 2, 0)
    [path] = inpaint("in.png", "hat", *margins)
    assert pixels(path).shape == (HEIGHT + 1, WIDTH + 5, 3)
    assert np.array_equal(pixels(path)[1:, 3:-2], pixels("in.png"))
    [other] = inpaint("in.png", *margins, "hat")
    assert np.array_equal(pixels(path), pixels(other))
    [path] = inpaint("clear.png", "hat", *margins)
    result = np.asarray(Image.open(path))
    assert np.array_equal(result[1:, 3:-2], clear) and (result[0, :, 3] == 255).all()


def test_grid(inpaint: Inpaint) -> None:
    common = ("in.png", "mask.png", "hat", "-n", 2)
    singles = inpaint(*common, "-o", "a.png")
    [sheet] = inpaint(*common, "-o", "sheet.png", "--grid")
    rows = [np.concatenate([pixels(p) for p in ("in.png", "mask.png", single)], axis=1) for single in singles]
    assert np.array_equal(pixels(sheet), np.concatenate(rows))


def test_an_image_that_is_stored_turned_is_painted_upright(inpaint: Inpaint) -> None:
    image, exif = turned_by_exif(np.asarray(Image.open("in.png")), 6)
    image.save("turned.png", exif=exif)
    [path] = inpaint("turned.png", "mask.png", "hat")
    kept = ~pixels("mask.png").any(-1)
    assert np.array_equal(pixels(path)[kept], pixels("in.png")[kept])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.png"], "there is no mask\n.*--expand"),
        (["in.png", "no.png"], "no file no.png"),
        (["in.png", "in.png", "hat"], "in colour\n(.|\n)*--mask-threshold"),
        (["text.png", "mask.png", "hat"], "text.png is not an image"),
        (["cut.png", "mask.png", "hat"], "cut.png cannot be read"),
        (["in.png", "cut.png", "hat"], "cut.png cannot be read"),
        (["in.png", "mask.png", "hat", "--method", "repait"], "did you mean 'repaint'"),
        (["in.png", "mask.png", "hat", "--mask-threshold", "7"], "threshold is 7"),
        (["in.png", "mask.png", "hat", "--checkpoint", "CLASSES"], "--class NAME: apple, hat"),
        (["in.png", "hat", "--expand", "0", "-1", "0", "0"], "cannot add 0, -1, 0, 0 pixels"),
        (["in.png", "mask.png", "hat", "--expand", "0", "1", "0", "0"], "a mask and --expand are both given"),
        (["in.png", "mask.png", "--box", "0", "0", "1", "1"], "a mask and --box are both given"),
        (
            ["in.png", "hat", "--box", "4", "2", "15", "7"],
            "--box 4 2 15 7 is no rectangle in an image of 14 x 10",
        ),
        (["in.png", "hat", "--box", "4", "2", "4", "7"], "--box 4 2 4 7 is no rectangle"),
        (["in.png", "hat", "--expand", "0", "1", "0", "0", "--mask-threshold", "0.5"], "a mask and --expand"),
    ],
)
def test_what_it_refuses(inpaint: Inpaint, class_folder: Path, arguments: list[str], message: str) -> None:
    Path("text.png").write_text("not an image")
    Path("cut.png").write_bytes(Path("in.png").read_bytes()[:200])
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match=message):
        inpaint(*[{"CLASSES": str(class_folder)}.get(argument, argument) for argument in arguments])
    assert sorted(Path().iterdir()) == before


def test_a_photograph_is_a_mask_on_request(inpaint: Inpaint) -> None:
    [path] = inpaint("in.png", "in.png", "hat", "--mask-threshold", 0.5)
    bright = np.asarray(Image.open("in.png").convert("L")) >= 127.5
    changed = (pixels(path) != pixels("in.png")).any(-1)
    assert not changed[~bright].any() and changed[bright].any()


def test_the_help_names_every_method(inpaint: Inpaint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inpaint("--help")
    text = re.sub(r"[\s│]", "", capsys.readouterr().out)  # a name may be broken over two lines
    assert [name for name in INPAINTING if name not in text] == []
    assert f"Default:{DEFAULT_INPAINTING}," in text


@pytest.fixture
def clear(inpaint: Inpaint) -> Any:
    """Bytes of `clear.png`, an RGBA image whose alpha takes every value, with colours under alpha 0."""
    levels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    levels[:2, :, 3], levels[8:, :, 3] = 0, 255
    Image.fromarray(levels).save("clear.png")
    on_white("clear.png").save("white.png")
    return levels


def on_white(path: Path | str) -> Image.Image:
    image = Image.open(path)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def test_what_is_kept_keeps_its_alpha_to_the_byte(inpaint: Inpaint, clear: Any) -> None:
    [path] = inpaint("clear.png", "mask.png", "hat")
    with Image.open(path) as result:
        assert result.mode == "RGBA"
        seen = np.asarray(result)
    hole = pixels("mask.png").any(-1)
    assert np.array_equal(seen[~hole], clear[~hole])  # colours under alpha 0 too
    assert (seen[hole][:, 3] == 255).all() and (seen[hole] != clear[hole]).any(-1).mean() > 0.5
    # On white it is what an opaque image on white becomes.
    [opaque] = inpaint("white.png", "mask.png", "hat", "-o", "opaque.png")
    assert np.array_equal(seen[hole][:, :3], pixels(opaque)[hole])


def test_soft_edges_blend_alpha_and_colours(inpaint: Inpaint, clear: Any) -> None:
    arguments = ("mask.png", "hat", "--feather", 2)
    [path] = inpaint("clear.png", *arguments)
    seen = np.asarray(Image.open(path)).astype(int)
    assert np.array_equal(seen[0, 0], clear[0, 0])  # more than two pixels from the hole
    edge, expected = seen[1, 5, 3], 255 * 2 / 3  # one pixel from it, over what was transparent
    assert abs(edge - expected) <= 1
    [opaque] = inpaint("white.png", *arguments, "-o", "opaque.png")
    assert np.abs(np.asarray(on_white(path)).astype(int) - pixels(opaque)).max() <= 1


def test_a_format_without_alpha_says_so(
    inpaint: Inpaint, clear: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("sys.stderr.write", lines.append)
    assert inpaint("clear.png", "mask.png", "hat", "-o", "a.jpg") == [Path("a.jpg")]
    assert ".jpg has no transparency: transparent parts become white" in "".join(lines)
    assert Image.open("a.jpg").mode == "RGB"


def test_kept_pixels_are_those_in_srgb(inpaint: Inpaint, caplog: pytest.LogCaptureFixture) -> None:
    levels = np.asarray(Image.open("in.png"))
    Image.open("in.png").save("p3.png", icc_profile=rgb_profile("Display P3"))
    [path] = inpaint("p3.png", "mask.png", "hat")
    kept = ~pixels("mask.png").any(-1)
    wanted = in_srgb(levels, "Display P3")
    assert np.abs(pixels(path) - wanted)[kept].max() <= 1 < 10 < np.abs(levels - wanted)[kept].max()
    assert "icc_profile" not in Image.open(path).info
    assert "p3.png is converted to sRGB from its colour profile, Display P3" in caplog.text
