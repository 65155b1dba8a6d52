"""Images are opened in one place, as the formats that are promised: PostScript of any name starts no Ghostscript."""

from __future__ import annotations

import ast
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from latentflow.data import FileExample, check_source, decode_image, find_source, read_image, readable
from latentflow.data.checking.inspect_images import inspect_image
from latentflow.data.images import FORMATS, open_image, open_no_others
from latentflow.data.sources.files import IMAGE_SUFFIXES
from latentflow.errors import UserError

from .images import load_program, noise, parquet, saved, tar, turned_by_exif, zipped
from .profiles import rgb_profile

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A stand-in `gs`, first on the path; tells whether it was started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho >> {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers whether there is one
    return started.exists


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "hostile.png"
    path.write_bytes(POSTSCRIPT)
    return path


def test_pillow_would_start_it(ghostscript: Callable[[], bool], hostile: Path) -> None:
    with pytest.raises(OSError), Image.open(hostile) as image:
        image.load()
    assert ghostscript()


def folder(hostile: Path) -> Path:
    data = hostile.parent / "data"
    data.mkdir()
    for seed in range(30):
        noise(seed).save(data / f"{seed}.png")
    hostile.rename(data / "hostile.png")
    return data


def of_folder(hostile: Path) -> Iterator[object]:
    data = folder(hostile)
    report = check_source(str(data))
    assert report.unreadable == {"hostile.png": "not an image"} and report.images == 30
    assert len(readable(find_source(str(data)))) == 30
    yield lambda: read_image(FileExample("hostile", path=data / "hostile.png"), 8)


def of_archives(hostile: Path) -> Iterator[object]:
    content, root = hostile.read_bytes(), hostile.parent
    held = [{"bytes": content, "path": None}]
    for data in (
        zipped(root / "data.zip", {"hostile.png": content}),
        tar(root / "data.tar", {"hostile.png": content}),
        parquet(root / "data.parquet", image=[content], mask=[content]),
        saved(root / "saved", image=held),
    ):
        (example,) = find_source(str(data)).examples
        assert check_source(str(data)).unreadable
        yield lambda example=example: read_image(example, 8)
        if example.mask is not None:
            yield example.open_mask


def of_masks(hostile: Path) -> Iterator[object]:
    data = folder(hostile)
    (data / "hostile.png").rename(data / "3-mask.png")
    assert "3.png" in check_source(str(data)).unreadable_masks
    masked = next(one for one in find_source(str(data)).examples if one.mask is not None)
    yield masked.open_mask
    alpha = next(iter(find_source(str(data), masks="alpha").examples))
    (data / "0.png").write_bytes(POSTSCRIPT)
    yield alpha.open_mask
    yield alpha.open


def of_programs(hostile: Path) -> Iterator[object]:
    good = hostile.parent / "good.png"
    noise(0).save(good)
    programs = Path(__file__).parents[2] / "pipelines"
    for name, arguments in {
        "inpaint": [[hostile, good], [good, hostile], [hostile, "--expand", 1, 1, 1, 1]],
        "edit": [[hostile, "a hat", "--from", "a cat"]],
        "interpolate": [["--images", hostile, good]],
    }.items():
        program = load_program(programs / f"{name}.py")
        for argv in arguments:
            full = [*map(str, argv), "-o", str(hostile.parent / "out.png")]
            yield lambda program=program, full=full: program.main(full)


def of_image(hostile: Path) -> Iterator[object]:
    yield lambda: decode_image(hostile)
    yield lambda: open_image(io.BytesIO(hostile.read_bytes()))


WAYS = [of_folder, of_archives, of_masks, of_programs, of_image]


@pytest.mark.parametrize("way", WAYS)
def test_postscript_is_refused_on_every_way_in(
    way: Callable[[Path], Iterator[Callable[[], object]]], ghostscript: Callable[[], bool], hostile: Path
) -> None:
    ways = list(way(hostile))
    assert ways
    for attempt in ways:
        with pytest.raises(UserError, match="not an image"):
            attempt()
    assert not ghostscript()


def test_a_server_opens_no_other_format_whoever_asks(
    ghostscript: Callable[[], bool], hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    open_no_others()
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(hostile)
    assert not ghostscript()
    noise(0).save(hostile)
    with Image.open(hostile) as image:
        assert image.tobytes() == noise(0).tobytes()


def test_the_error_says_which_formats_are_read(hostile: Path) -> None:
    with pytest.raises(UserError, match="not an image") as error:
        decode_image(hostile)
    assert all(name in error.value.fix for name in FORMATS)


def test_every_promised_suffix_is_read(tmp_path: Path) -> None:
    assert {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES} == set(FORMATS)
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        image = noise(0, 16, 16).convert("L" if suffix == ".pgm" else "RGB")
        image.save(path)
        with Image.open(path) as stored:
            assert np.array_equal(np.asarray(decode_image(path)), np.asarray(stored))
    noise(0, 16, 16).save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[noise(1, 16, 16)])
    assert decode_image(tmp_path / "two.jpg").format == "MPO"


def test_images_are_opened_in_one_place() -> None:
    root = Path(__file__).parents[2]
    files = [file for name in ("latentflow", "train", "pipelines") for file in (root / name).rglob("*.py")]
    places = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = (
                isinstance(node, ast.Attribute)
                and node.attr == "open"
                and ast.unparse(node.value).endswith("Image")
            )
            imported = isinstance(node, ast.ImportFrom) and node.module == "PIL.Image"
            if called or (imported and any(name.name == "open" for name in node.names)):
                places.append(str(file.relative_to(root)))
    assert places == ["latentflow/data/images.py"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", sorted(set(IMAGE_SUFFIXES) - {".jpeg", ".jfif", ".tiff"}))
def test_a_damaged_image_is_a_sentence_that_names_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes changed, cut out, put in and cut off: a `UserError`, or an image; from every function that decodes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a header may come to promise many millions
    path = tmp_path / f"a{suffix}"
    image, exif = turned_by_exif(np.asarray(noise(0, 24, 20).convert("L" if suffix == ".pgm" else "RGB")), 6)
    image.save(path, icc_profile=rgb_profile("Display P3"), exif=exif)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    example = FileExample("a", path=path, mask=path)
    reported = 0
    for _ in range(40):
        data = bytearray(whole)
        for at in generator.integers(0, len(data), generator.choice([1, 4, 16])).tolist():
            data[at] = generator.integers(0, 256)
        start, end = sorted(generator.integers(4, len(data), 2).tolist())
        data = [
            data,
            data[:end],
            data[:start] + data[end:],
            data[:start] + b"\xff\xff\xff\xff" + data[start:],
        ][generator.integers(4)]
        path.write_bytes(data)
        assert inspect_image(example).error != "" and example.pixel_key()
        for read in (decode_image, lambda path: read_image(FileExample("a", path=path), 8)):
            try:
                read(path)
            except UserError as error:
                assert str(path) in error.what and error.fix
                reported += 1
    assert reported >= 10
