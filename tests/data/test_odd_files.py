"""Each of some sixty broken or odd files is used rightly, by its pixels, or reported by its name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data import check_source, find_source, read_image, readable, split
from latentflow.errors import UserError

from .images import load_program, noise
from .odd_files import SIDE, grey_quarters, make_extreme, make_reported, make_used, quarters

pytestmark = pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="needs links, pipes and names of a POSIX system"
)
FILLERS = 400  # good images, so that less than 5 % cannot be read


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("used", "reported", "extreme", "all")}


@pytest.fixture(scope="module")
def made(odd: dict[str, Path]) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[int, int, int]]]:
    made = make_used(odd["used"]), make_reported(odd["reported"]), make_extreme(odd["extreme"])
    for folder in ("used", "reported", "extreme"):
        for path in odd[folder].iterdir():
            shutil.move(path, odd["all"] / path.name)
    (odd["all"] / "._x.jpg").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (odd["all"] / "circle").symlink_to(odd["all"])  # a folder that holds itself
    for seed in range(FILLERS):
        noise(seed).save(odd["all"] / f"z{seed:03}.png")
    return made


def test_check_names_what_cannot_be_used(
    odd: dict[str, Path], made: tuple[dict, dict, dict], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used, reported, extreme = made
    assert len(used) + len(reported) + len(extreme) >= 50
    page = odd["used"] / "page.html"
    load_program(repository / "train" / "check.py").main([str(odd["all"]), "--json", "--report", str(page)])
    assert f"Unreadable files, left out: {len(reported)}" in page.read_text()
    text = capsys.readouterr().out
    text.encode()  # can be written to any file
    report = json.loads(text)
    assert set(report["unreadable"]) == set(reported)
    for name, why in reported.items():
        assert why in report["unreadable"][name] and report["unreadable"][name]
    assert report["pictures"] == len(used) + len(extreme) + FILLERS
    assert set(report["animated"]) == {"animated.gif", "animated.png", "animated.webp", "pages.tif"}
    assert report["misnamed"] == {"gif-named.jpg": "GIF", "png-named.webp": "PNG"}
    assert report["rotated"] == 7  # the JPEGs: Pillow turns a TIFF itself
    warnings = "\n".join(report["warnings"])
    assert "1x1.png (1x1)" in warnings and "wide.png (30000x10)" in warnings
    assert any("._x.jpg" in note for note in report["notes"])
    lines = check_source(str(odd["all"])).lines()
    assert not any(ord(c) < 32 for line in lines for c in line)  # a name cannot write to the terminal


def test_training_reads_the_rest_rightly(odd: dict[str, Path], made: tuple[dict, dict, dict]) -> None:
    used, _, extreme = made
    source = readable(find_source(str(odd["all"])))
    assert any("cannot be read, left out" in n and "check DATA --json` names all" in n for n in source.notes)
    examples = {example.name: example for example in source.examples}
    assert set(examples) == set(used) | set(extreme) | {f"z{seed:03}.png" for seed in range(FILLERS)}
    assert sum(map(len, split(source, 0.1))) == len(source) and source.fingerprint()
    wanted = {"colour": quarters(), "grey": grey_quarters().convert("RGB")}
    for name, kind in used.items():
        seen = np.asarray(read_image(examples[name], SIDE)).astype(int)
        target = np.asarray(wanted[kind]).astype(int)
        off = (
            np.abs(seen - target).max()
            if name.endswith(("png", "tif", "PNG"))
            else np.abs(seen - target).mean()
        )
        assert off <= 4, f"{name!r} differs by {off}"
    for name, colour in extreme.items():
        assert np.asarray(read_image(examples[name], SIDE))[SIDE // 2, SIDE // 2].tolist() == list(colour), (
            name
        )


def test_an_empty_sidecar_is_named_and_the_rest_checked(tmp_path: Path) -> None:
    for seed, caption in enumerate(("a cat", "", "a dog")):
        noise(seed).save(tmp_path / f"{seed}.png")
        (tmp_path / f"{seed}.txt").write_text(caption)
    report = check_source(str(tmp_path))
    assert any("no caption for 1 of 3 images: 1.png" in problem for problem in report.problems)
    assert report.images == 3 and report.caption_facts.missing == ("1.png",)
    with pytest.raises(UserError, match=r"no caption for 1 of 3 images: 1\.png"):
        find_source(str(tmp_path))


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of a user who is not root, whom permissions bind."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def test_a_file_without_permission_is_named(unprivileged: Path) -> None:
    for seed in range(30):
        noise(seed).save(unprivileged / f"{seed}.png")
    (unprivileged / "7.png").chmod(0)
    report = check_source(str(unprivileged))
    assert report.unreadable == {"7.png": "permission denied"} and report.images == 29
    assert len(readable(find_source(str(unprivileged)))) == 29
    (unprivileged / "7.png").chmod(0o644)
    assert not check_source(str(unprivileged)).unreadable


def test_a_folder_without_permission_is_named(unprivileged: Path) -> None:
    data = unprivileged / "data"
    for name in ("hat/1.png", "shoe/2.png", "bag/3.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        noise(1).save(data / name)
    (data / "bag").chmod(0)
    source = find_source(str(data))
    assert source.classes == ("hat", "shoe")
    assert any(
        "not read: 1 folder that cannot be opened" in note and "bag (permission denied)" in note
        for note in source.notes
    )
    for name in ("hat", "shoe"):
        (data / name).chmod(0)
    with pytest.raises(UserError, match="3 folders in it cannot be opened"):
        find_source(str(data))
    data.chmod(0)
    with pytest.raises(
        UserError, match=r"data cannot be read: permission denied .*\nGive yourself permission"
    ):
        find_source(str(data))
    for path in (data, data / "hat", data / "shoe", data / "bag"):
        path.chmod(0o755)


def test_small_decoding_of_jpegs_finds_what_whole_decoding_finds(tmp_path: Path) -> None:
    """Looks decode JPEGs at an eighth of their size: cut off or not must come out the same."""
    from latentflow.data import FileExample
    from latentflow.data.checking.inspect_images import inspect_image

    image = noise(1, 48, 40).resize((1200, 1000), Image.Resampling.BICUBIC)
    generator = np.random.default_rng(0)
    for progressive in (False, True):
        image.save(tmp_path / "whole.jpg", progressive=progressive)
        data = (tmp_path / "whole.jpg").read_bytes()
        for cut in [
            *generator.integers(300, len(data), 12).tolist(),
            len(data) - 1,
            len(data) - 3,
            len(data),
        ]:
            path = tmp_path / "cut.jpg"
            path.write_bytes(data[:cut])
            example = FileExample("cut.jpg", path=path)
            try:
                read_image(example, 64)
                whole = True
            except UserError:
                whole = False
            assert (inspect_image(example).error is None) == whole, f"{cut} of {len(data)} bytes"
