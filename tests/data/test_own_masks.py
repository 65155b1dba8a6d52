"""The user's own masks in a folder: which files they are, whose, and that they stay on their image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.data import Source, cached_masks, cached_pixels, check_source, find_source
from latentflow.errors import UserError

from .images import load_program, noise, save_all, turned_by_exif, write_jsonl


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LATENTFLOW_CACHE", str(folder))
    return folder


def names(source: Source) -> list[str]:
    return [example.name for example in source.examples]


def masks(source: Source) -> dict[str, str | None]:
    """The name of every image's mask."""
    root = source.root
    assert root is not None
    return {e.name: e.mask.relative_to(root).as_posix() if e.mask else None for e in source.examples}


def save_mask(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """A mask of 0 and 255 at random; its values (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 2, size[::-1], dtype=np.uint8) * np.uint8(255)
    Image.fromarray(values).save(path)
    return values


# --- whose mask ---------------------------------------------------------------------------------------


def test_files_beside_their_images(tmp_path: Path) -> None:
    save_all(tmp_path, ["a.png", "b.jpg", "c/a.png", "d.png", "e-mask.png", "f.png"])
    for name in ("a-mask.png", "b-mask.png", "c/a-mask.png", "f-mask.jpg"):
        save_mask(tmp_path / name)
    source = find_source(str(tmp_path), condition="none")
    assert masks(source) == {
        "a.png": "a-mask.png",
        "b.jpg": "b-mask.png",
        "c/a.png": "c/a-mask.png",
        "d.png": None,
        "e-mask.png": None,  # no image that it could be the mask of
        "f.png": "f-mask.jpg",
    }
    (note,) = [note for note in source.notes if "masks" in note]
    assert "4 masks in files beside the images: a-mask.png, b-mask.png" in note
    unused = find_source(str(tmp_path), condition="none", masks="none")
    assert names(unused) == names(source) and set(masks(unused).values()) == {None}
    assert any("4 masks in files" in note and "not used (--masks none)" in note for note in unused.notes)


def test_which_files_are_masks_or_images_whatever_their_names(tmp_path: Path) -> None:
    save_all(tmp_path, ["a.png", "a-mask.png", "a-mask-mask.png"])
    assert masks(find_source(str(tmp_path))) == {"a.png": "a-mask.png", "a-mask-mask.png": None}
    (tmp_path / "a-mask-mask.png").unlink()
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": n, "text": "a"} for n in ("a.png", "a-mask.png")])
    assert masks(find_source(str(tmp_path))) == {"a.png": None, "a-mask.png": None}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text,mask\na.png,one,m/1.png\na-mask.png,two,\n")
    save_mask(tmp_path / "m/1.png")
    assert masks(find_source(str(tmp_path))) == {"a.png": "m/1.png", "a-mask.png": None}


def test_masks_are_neither_classes_nor_in_want_of_captions(tmp_path: Path) -> None:
    save_all(tmp_path, ["hat/1.png", "shoe/2.png"])
    save_mask(tmp_path / "hat/1-mask.png")
    save_mask(tmp_path / "masks/2.png")
    rows = [{"file_name": "shoe/2.png", "mask": "masks/2.png"}, {"file_name": "hat/1.png", "mask": None}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    source = find_source(str(tmp_path))
    assert source.classes == ("hat", "shoe")
    assert masks(source) == {"hat/1.png": "hat/1-mask.png", "shoe/2.png": "masks/2.png"}
    assert any("masks of 1 image in the metadata" in note for note in source.notes)
    for name in ("hat/1", "shoe/2"):
        (tmp_path / f"{name}.txt").write_text("a thing")
    assert find_source(str(tmp_path), condition="text").captions() == ["a thing"] * 2


def test_two_masks_may_be_equal_but_not_differ(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    save_mask(tmp_path / "1-mask.png", seed=1)
    save_mask(tmp_path / "m/1.png", seed=1)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "1.png", "mask": "m/1.png"}])
    assert masks(find_source(str(tmp_path))) == {"1.png": "m/1.png"}
    save_mask(tmp_path / "1-mask.png", seed=2)
    with pytest.raises(
        UserError, match=r"1.png has two masks that differ: .*m/1.png and .*1-mask.png\nKeep one"
    ):
        find_source(str(tmp_path))
    assert masks(find_source(str(tmp_path), masks="none")) == {"1.png": None}
    (tmp_path / "metadata.jsonl").unlink()
    save_mask(tmp_path / "1-mask.bmp", seed=1)
    with pytest.raises(UserError, match="two masks that differ"):
        find_source(str(tmp_path), condition="none")


# --- alpha channels -----------------------------------------------------------------------------------


def test_alpha_channels(tmp_path: Path) -> None:
    rgba = np.concatenate([np.asarray(noise(1)), np.full((8, 8, 1), 255, np.uint8)], -1)
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    rgba[2:5, 1:4, 3] = 0
    rgba[6, 6, 3] = 55  # mostly transparent
    Image.fromarray(rgba).save(tmp_path / "hole.png")
    noise(2).save(tmp_path / "plain.jpg")
    source = find_source(str(tmp_path), masks="alpha")
    table = cached_masks(source, 8)
    assert names(source) == ["hole.png", "opaque.png", "plain.jpg"]
    assert table.has_mask.tolist() == [True, False, False]
    assert np.array_equal(table.masks[0, 0], np.where(rgba[..., 3] < 128, 255, 0))
    pixels = cached_pixels(source, 8)
    assert np.array_equal(pixels[0].permute(1, 2, 0), rgba[..., :3])  # what the hole hides is the image
    composited = cached_pixels(find_source(str(tmp_path)), 8)
    assert (composited[0, :, 3, 2] == 255).all() and not torch.equal(composited[0], pixels[0])
    assert check_source(str(tmp_path), masks="alpha").masks == 1


# --- keys ---------------------------------------------------------------------------------------------


def test_a_changed_mask_is_changed_data_but_the_same_image(tmp_path: Path, cache: Path) -> None:
    save_all(tmp_path, ["1.png", "2.png"])
    bare = find_source(str(tmp_path))
    bare_hash, keys = bare.fingerprint(), bare.content_keys()
    first = save_mask(tmp_path / "1-mask.png", seed=1)
    source = find_source(str(tmp_path))
    with_mask = source.fingerprint()
    assert with_mask != bare_hash and find_source(str(tmp_path), masks="none").fingerprint() == bare_hash
    assert np.array_equal(cached_masks(source, 8).masks[0, 0], first)
    second = save_mask(tmp_path / "1-mask.png", seed=2)
    assert source.fingerprint() not in (bare_hash, with_mask) and source.content_keys() == keys
    assert np.array_equal(cached_masks(source, 8).masks[0, 0], second)
    assert len(list(cache.rglob("*.safetensors"))) == 2


# --- registration -------------------------------------------------------------------------------------

RED = (slice(24, 56), slice(40, 88))  # a rectangle in an image of 96 x 120


def save_red(folder: Path, orientation: int, shrink: tuple[int, int]) -> None:
    """An image with a red rectangle, stored turned, and the upright mask of the rectangle, perhaps smaller."""
    upright = np.zeros((96, 120, 3), np.uint8)
    upright[RED] = (255, 0, 0)
    image, exif = turned_by_exif(upright, orientation)
    image.save(folder / "a.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(upright[:: shrink[0], :: shrink[1], 0])).save(folder / "a-mask.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resolution", [48, 37, (40, 20), (24, 64), 150])
def test_a_mask_stays_on_what_it_was_drawn_on(
    tmp_path: Path, orientation: int, resolution: int | tuple[int, int]
) -> None:
    for shrink in ((1, 1), (4, 4), (4, 1)):  # the last is stretched
        save_red(tmp_path, orientation, shrink)
        source = find_source(str(tmp_path))
        red = cached_pixels(source, resolution)[0, 0]
        mask = cached_masks(source, resolution).masks[0, 0]
        assert mask.shape == red.shape and set(mask.unique().tolist()) <= {0, 255}
        assert 0.02 < (mask == 255).float().mean() < 0.9
        differ = (mask == 255) != (red >= 128)
        unsure = (red > 30) & (red < 225)  # antialiased edge
        assert not (differ & ~unsure).any()


def test_rows_without_a_mask_are_empty(tmp_path: Path) -> None:
    save_all(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    values = [save_mask(tmp_path / f"{name}-mask.png", seed) for seed, name in enumerate("bd")]
    source = find_source(str(tmp_path)).subset([3, 0, 1, 3])
    for _ in range(2):  # made, then loaded
        table = cached_masks(source, 8)
        assert len(table) == 4 and table.masks.dtype == torch.uint8 and table.masks.shape == (4, 1, 8, 8)
        assert table.has_mask.tolist() == [True, False, True, True]
        wanted = [values[1], np.zeros((8, 8)), values[0], values[1]]
        assert np.array_equal(table.masks[:, 0], np.stack(wanted))
    nothing = cached_masks(source.subset([1]), (8, 6))
    assert nothing.masks.shape == (1, 1, 8, 6) and not nothing.masks.any() and not nothing.has_mask.any()


def test_a_soft_mask_is_split_in_the_middle(tmp_path: Path) -> None:
    save_all(tmp_path, ["a.png"])
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "a-mask.png")
    assert (cached_masks(find_source(str(tmp_path)), 8).masks[:] == 255).all()
    Image.fromarray(np.full((8, 8), 127, np.uint8)).save(tmp_path / "a-mask.png")
    assert (cached_masks(find_source(str(tmp_path)), 8).masks[:] == 0).all()


# --- bad masks ----------------------------------------------------------------------------------------


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "colour": (lambda path: noise(1).save(path), "is not a mask: it is in colour"),
    "text": (lambda path: path.write_text("none"), "is not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_a_problem_and_named(
    tmp_path: Path, kind: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[kind]
    save_all(tmp_path, ["a.png", "b.png"])
    make(tmp_path / "a-mask.png")
    save_mask(tmp_path / "b-mask.png")
    with pytest.raises(UserError, match=rf"{tmp_path}/a-mask.png {message}"):
        cached_masks(find_source(str(tmp_path)), 8)
    main = load_program(repository / "train" / "check.py").main
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "PROBLEM: 1 mask cannot be used" in printed
    assert f"a-mask.png {message}" in printed
    assert "images with a mask of their own: 1 of 2" in printed
    main([str(tmp_path), "--masks", "none"])
    assert "not used (--masks none)" in capsys.readouterr().out


def test_masks_of_another_size_are_told(tmp_path: Path) -> None:
    for seed, (name, size) in enumerate({"a": (60, 40), "b": (31, 20), "c": (40, 60), "d": (40, 40)}.items()):
        noise(seed, 60, 40).save(tmp_path / f"{name}.png")
        save_mask(tmp_path / f"{name}-mask.png", size=size)
    noise(9).save(tmp_path / "e.png")
    report = check_source(str(tmp_path))
    assert report.masks == 4 and report.images == 5 and not report.problems
    warnings = [line for line in report.warnings if " than the image, resized" in line]
    assert warnings == [
        "1 mask of another size than the image, resized to it: b.png (60x40, its mask 31x20)",
        "2 masks of another aspect ratio than the image, resized to it: "
        "c.png (60x40, its mask 40x60), d.png (60x40, its mask 40x40)",
    ]
