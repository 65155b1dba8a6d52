"""Files that cannot be read are skipped and named; the report says what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from latentflow.data import check_source, find_source, readable
from latentflow.errors import UserError

from .images import load_program, noise, save_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """42 images, two files that are none, and a macOS resource file."""
    save_all(tmp_path, [f"{i:02}.png" for i in range(40)])
    (tmp_path / "text.png").write_text("this is no image")
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "._00.jpg").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    save_all(tmp_path, ["x40.png", "x41.png"])  # the same images as 00 and 01
    return tmp_path


def test_unreadable_files_are_skipped_listed_and_kept(folder: Path) -> None:
    before = sorted(folder.iterdir())
    source = readable(find_source(str(folder)), progress=False)
    assert len(source) == 42 and not {"text.png", "torn.png"} & {e.name for e in source.examples}
    (note,) = [note for note in source.notes if "cannot be read" in note]
    assert note.startswith("2 images") and "text.png (not an image)" in note and "torn.png (" in note
    assert sorted(folder.iterdir()) == before


def test_a_good_source_is_returned_as_it_is(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    source = find_source(str(tmp_path))
    assert readable(source, progress=False) is source


def test_more_than_5_percent_unreadable_refuses(folder: Path) -> None:
    (folder / "another.jpg").touch()
    with pytest.raises(
        UserError, match=r"3 of 45 images cannot be read \(7%, at most 5 % may\): another.jpg"
    ):
        readable(find_source(str(folder)), progress=False)
    report = check_source(str(folder), progress=False)
    assert len(report.problems) == 1 and "3 of 45" in report.problems[0]


def test_report(folder: Path) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    noise(5, width=9, height=7).convert("L").save(folder / "grey.jpg", exif=rotated)
    report = check_source(str(folder), progress=False)
    assert report.images == 43 and report.condition == "unconditional" and not report.problems
    assert report.sizes == {"8x8": 42, "7x9": 1} and report.modes == {"RGB": 42, "L": 1}
    assert report.rotated == 1
    assert set(report.unreadable) == {"text.png", "torn.png"}
    assert report.duplicates == (("00.png", "x40.png"), ("01.png", "x41.png"))
    text = "\n".join(report.lines())
    assert "2 images are there more than once: 00.png = x40.png, 01.png = x41.png" in text
    assert "43 images are few" in text and "._00.jpg" in text and text.endswith("ready to train")
    assert json.loads(json.dumps(report.as_dict()))["sizes"] == {"8x8": 42, "7x9": 1}


def test_one_image_in_two_classes_is_told(tmp_path: Path) -> None:
    save_all(tmp_path, ["a/1.png", "a/2.png"])
    save_all(tmp_path, ["b/1.png"])  # the same as a/1.png
    report = check_source(str(tmp_path), progress=False)
    assert report.classes == {"a": 2, "b": 1}
    assert any(
        "1 of them have different captions or classes: a/1.png = b/1.png" in w for w in report.warnings
    )
    assert any("classes of fewer than 10 images: a (2), b (1)" in w for w in report.warnings)


def test_the_program(folder: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_program(repository / "train" / "check.py").main
    main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["pictures"] == 42
    with pytest.raises(SystemExit) as stop:
        main([str(folder / "nowhere")])
    assert stop.value.code == 1 and "PROBLEM: there is no folder" in capsys.readouterr().out


def test_a_problem_and_its_remedy_are_one_readable_line(tmp_path: Path) -> None:
    save_all(tmp_path, ["a.png", "b.png"])
    (tmp_path / "a.txt").write_text("a cat")
    (problem,) = check_source(str(tmp_path)).problems
    assert "\\n" not in problem and "b.png. Add them, or choose --missing-caption" in problem
