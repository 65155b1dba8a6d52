"""The programs `latentflow edit` and `latentflow interpolate`, run in this process on tiny checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow import LatentFlowPipeline
from latentflow.errors import UserError

from .conftest import pixels, tiny_dit, tiny_text, tiny_vae

Program = Callable[..., list[Path]]
WIDTH, HEIGHT = 14, 10  # what neither autoencoder nor network divides


@pytest.fixture(autouse=True)
def files(program: Program) -> None:
    """`a.png` and `b.png` in the program's folder."""
    for seed, name in enumerate(("a.png", "b.png")):
        noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(noise).save(name)


def distance(a: Path, b: Path) -> float:
    return float(np.abs(pixels(a) - pixels(b)).mean())


@pytest.mark.parametrize("method", ["flowedit", "inversion"])
def test_words_and_what_they_replace_decide_the_edit(program: Program, method: str) -> None:
    def edited(new: str, old: str) -> Path:
        options = ("--method", method, "--guidance", 1)
        [path] = program("edit", "a.png", new, "--from", old, "-o", f"{new}-{old}.png", *options)
        return path

    kept = edited("red apple", "red apple")
    assert pixels(kept).shape == (HEIGHT, WIDTH, 3)
    [copy] = program("edit", "a.png", "hat", "--strength", 0, "-o", "copy.png")
    if method == "flowedit":  # both sides of the difference are one
        assert distance(kept, copy) == 0
    assert distance(edited("green tree", "red apple"), kept) > 1
    assert distance(edited("green tree", "blue hat"), edited("green tree", "red apple")) > 1


@pytest.mark.parametrize("way", ["--mask", "--box"])
def test_an_edit_within_a_mask_keeps_every_other_pixel(program: Program, way: str) -> None:
    """Its transparency too."""
    image = np.asarray(Image.open("a.png").convert("RGBA")).copy()
    image[2, 11, 3] = 100
    Image.fromarray(image).save("see-through.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[1:7, 3:9] = 255
    Image.fromarray(mask).save("mask.png")
    given = ("mask.png",) if way == "--mask" else (3, 1, 9, 7)
    words = ("green tree", "--from", "red apple", "--guidance", 1)
    for method in ("flowedit", "inversion", "direct"):
        [path] = program("edit", "see-through.png", *words, way, *given, "--method", method, "-o", "out.png")
        edited = np.asarray(Image.open(path))
        assert np.array_equal(edited[mask == 0], image[mask == 0])
        assert not np.array_equal(edited[mask > 0], image[mask > 0])


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--mask", "a.png", "--box", 0, 0, 2, 2), "both given"),
        (("--mask-threshold", 0.5), "without --mask"),
        (("--box", 3, 0, 3, 4), "no rectangle"),
        (("--box", 0, 0, 2, 2, "--method", "image-to-image"), "does not use --box"),
        (("--method", "direct", "-n", 2), "has no seed"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(
    program: Program, flags: tuple[object, ...], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        program("edit", "a.png", "green tree", *flags)


def test_classes_are_edited_too(program: Program, class_folder: Path) -> None:
    common = ("edit", "a.png", "--checkpoint", class_folder, "--guidance", 1)
    [same] = program(*common, "--class", "hat", "--from", "hat", "-o", "same.png")
    [other] = program(*common, "--class", "tree", "--from", "1", "-o", "other.png")
    [copy] = program(*common, "--class", "hat", "--strength", 0, "-o", "copy.png")
    assert distance(same, copy) == 0
    assert distance(other, copy) > 1


def test_variations_have_seeds_of_their_own_and_grow_with_strength(program: Program) -> None:
    common = ("edit", "a.png", "--method", "image-to-image")
    several = program(*common, "-n", 2, "--seed", 5, "-o", "v.png")
    assert several == [Path("v-1.png"), Path("v-2.png")]
    [alone] = program(*common, "--seed", 6, "-o", "alone.png")
    assert np.abs(pixels(alone) - pixels(several[1])).max() <= 1
    assert distance(alone, several[0]) > 1
    [copy] = program(*common, "--strength", 0, "-o", "copy.png")
    [far] = program(*common, "--strength", 1, "--seed", 6, "-o", "far.png")
    assert distance(far, copy) > distance(alone, copy) > 0


def test_grid(program: Program) -> None:
    common = ("edit", "a.png", "hat", "--from", "apple", "-n", 2)
    singles = program(*common, "-o", "one.png")
    [sheet] = program(*common, "-o", "sheet.png", "--grid")
    rows = [np.concatenate([pixels("a.png"), pixels(single)], axis=1) for single in singles]
    assert np.array_equal(pixels(sheet), np.concatenate(rows))


def test_interpolation_begins_and_ends_with_what_generate_draws(program: Program) -> None:
    common = ("--seed", 3, "--solver", "heun")
    frames = program("interpolate", "red apple", "green tree", "--frames", 3, "-o", "f.png", *common)
    assert frames == [Path(f"f-{i}.png") for i in (1, 2, 3)]
    [first] = program("generate", "red apple", "-o", "first.png", *common)
    [last] = program("generate", "green tree", "-o", "last.png", *common)
    assert np.abs(pixels(frames[0]) - pixels(first)).max() <= 1
    assert np.abs(pixels(frames[2]) - pixels(last)).max() <= 1
    assert distance(frames[1], first) > 0 < distance(frames[1], last)


def test_interpolation_between_images_in_one_row(program: Program, class_folder: Path) -> None:
    options = ("-n", 4, "--grid", "--checkpoint", class_folder)
    [row] = program("interpolate", "--images", "a.png", "b.png", *options)
    assert pixels(row).shape == (HEIGHT, 4 * WIDTH, 3)
    [back] = program("interpolate", "--images", "b.png", "a.png", *options, "-o", "back.png")
    assert np.abs(pixels(row)[:, :WIDTH] - pixels(back)[:, -WIDTH:]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "no.png", "hat"], "no file no.png"),
        (["edit", "cut.png", "hat"], "cut.png cannot be read"),
        (["edit", "a.png"], "a prompt is needed"),
        (["edit", "a.png", "hat", "--from", "apple", "--method", "image-to-image"], "does not use --from"),
        (["edit", "a.png", "hat", "-n", "2", "--method", "inversion"], "all images would be equal"),
        (["edit", "a.png", "hat", "--solver", "ddpm"], "ddpm"),
        (["edit", "a.png", "hat", "--checkpoint", "CLASSES"], "--class NAME: apple, hat"),
        (
            ["edit", "a.png", "--class", "hat", "--from", "ht", "--checkpoint", "CLASSES"],
            "did you mean 'hat'",
        ),
        (["interpolate", "a", "b", "c"], "3 prompts"),
        (["interpolate", "--images", "a.png", "small.png"], "several sizes"),
    ],
)
def test_what_it_refuses(program: Program, class_folder: Path, arguments: list[str], message: str) -> None:
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:200])
    Image.new("RGB", (4, 4)).save("small.png")
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match=message):
        program(*[{"CLASSES": str(class_folder)}.get(word, word) for word in arguments])
    assert sorted(Path().iterdir()) == before


def test_the_code_of_the_page_on_editing_runs(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As many tokens as the shipped one has at this size: with a factor of 2 they would take minutes.
    pipe = LatentFlowPipeline(tiny_vae(levels=5), tiny_dit(text_dim=16), **tiny_text())
    pipe.save_pretrained("checkpoints/pictograms-128")
    for name in ("apple.png", "pear.png"):
        Image.new("RGB", (128, 128), "red").save(name)
    names = {}
    page = repository / "docs/guide/inpaint-and-edit.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    assert names["noise"].error.shape == (1,)
    assert names["larger"].size == (128, 192)


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "clear.png", "hat", "--from", "red apple"),
        ("edit", "clear.png", "hat", "--method", "image-to-image"),
        ("interpolate", "--images", "clear.png", "b.png", "--frames", 2),
    ],
)
def test_transparency_is_lost_with_a_word(
    program: Program, arguments: tuple[object, ...], caplog: pytest.LogCaptureFixture
) -> None:
    image = Image.open("a.png").convert("RGBA")
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.save("clear.png")
    for path in program(*arguments):
        assert Image.open(path).mode == "RGB"
    assert "clear.png has transparent parts: they become white" in caplog.text
