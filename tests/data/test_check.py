"""`latentflow check`: what cannot be read is skipped and named; report, contact sheet, page, suggested command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.data import check_source, find_source, readable
from latentflow.data.checking.page import contact_sheet, report_page
from latentflow.data.checking.report import (
    aspect_histogram,
    caption_facts,
    check_data,
    kept_by_square_crop,
    reach,
)
from latentflow.errors import UserError

from .images import folder_of, load_program, noise, save_all, turned_by_exif
from .test_splits import make_image


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
    source = readable(find_source(str(folder)))
    assert len(source) == 42 and not {"text.png", "torn.png"} & {e.name for e in source.examples}
    (note,) = [note for note in source.notes if "cannot be read" in note]
    assert note.startswith("2 images") and "text.png (not an image)" in note and "torn.png (" in note
    assert sorted(folder.iterdir()) == before


def test_a_good_source_is_returned_as_it_is(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    source = find_source(str(tmp_path))
    assert readable(source) is source


def test_more_than_5_percent_unreadable_refuses(folder: Path) -> None:
    (folder / "another.jpg").touch()
    with pytest.raises(
        UserError, match=r"3 of 45 images cannot be read \(7%; the limit is 5%\): another.jpg"
    ):
        readable(find_source(str(folder)))
    report = check_source(str(folder))
    assert len(report.problems) == 1 and "3 of 45" in report.problems[0]


def test_report(folder: Path) -> None:
    grey, exif = turned_by_exif(np.asarray(noise(5, width=7, height=9).convert("L")), 6)
    grey.save(folder / "grey.jpg", exif=exif)
    report = check_source(str(folder))
    assert report.images == 43 and report.condition == "unconditional" and not report.problems
    assert report.sizes == {"8x8": 42, "7x9": 1} and report.modes == {"RGB": 42, "L": 1}
    assert report.rotated == 1
    assert set(report.unreadable) == {"text.png", "torn.png"}
    assert report.duplicates == (("00.png", "x40.png"), ("01.png", "x41.png"))
    text = "\n".join(report.lines())
    assert "2 groups of equal files: 00.png = x40.png, 01.png = x41.png" in text
    assert "few images (43)" in text and "._00.jpg" in text and text.endswith("ready to train")
    assert json.loads(json.dumps(report.as_dict()))["sizes"] == {"8x8": 42, "7x9": 1}


def test_one_image_in_two_classes_is_told(tmp_path: Path) -> None:
    save_all(tmp_path, ["a/1.png", "a/2.png"])
    save_all(tmp_path, ["b/1.png"])  # the same as a/1.png
    report = check_source(str(tmp_path))
    assert report.classes == {"a": 2, "b": 1}
    assert any(
        "equal files with different captions or classes: a/1.png = b/1.png" in w for w in report.warnings
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


def test_an_image_without_a_class_or_caption_contradicts_none(tmp_path: Path) -> None:
    for file, seed in {"near": 0, "hat": 1, "bag": 2, "hat two": 3}.items():
        make_image(seed).save(tmp_path / f"{file}.png")
    make_image(0).resize((48, 48)).save(tmp_path / "near copy.png")
    make_image(1).save(tmp_path / "hat copy.png")
    make_image(2).save(tmp_path / "bag copy.png")
    table = tmp_path / "table.csv"
    table.write_text(
        "image,label\nnear.png,\nnear copy.png,hat\nhat.png,hat\nhat copy.png,\nbag.png,bag\nbag copy.png,hat\n"
        "hat two.png,hat\n"
    )
    report, _ = check_data(str(table), condition="class", missing_caption="empty")
    said = [line for line in report.warnings if "different" in line]
    assert said == ["equal files with different captions or classes: bag copy.png = bag.png"]
    table.write_text(table.read_text().replace("near.png,\n", "near.png,bag\n"))
    report, _ = check_data(str(table), condition="class", missing_caption="empty")
    assert any(
        line == "near duplicates in different classes: near copy.png = near.png" for line in report.warnings
    )


# --- the page and the suggestion ---


def test_what_is_worth_knowing_is_said_in_text_and_page(tmp_path: Path) -> None:
    for seed in range(20):
        (tmp_path / "hat").mkdir(exist_ok=True)
        make_image(seed).save(tmp_path / "hat" / f"{seed:02}.png")
    (tmp_path / "bag").mkdir()
    make_image(0).resize((48, 48)).save(tmp_path / "bag/copy.png")
    report, source = check_data(str(tmp_path))
    html = report_page(report, source).html()
    for warning in (
        "near duplicates in different classes: bag/copy.png = hat/00.png",
        "unbalanced classes: hat has 20 images, bag has 1",
    ):
        assert any(warning in line for line in report.warnings) and warning in html
    assert "Groups of duplicates: 1" in html and "<h2>2 classes</h2>" in html
    for seed in range(20):
        (tmp_path / "hat" / f"{seed:02}.txt").write_text("a hat")
    report, source = check_data(str(tmp_path))
    html = report_page(report, source).html()
    for line in (
        "bag/copy.png. Add them, or choose --missing-caption",
        "captions that more than 5 % of the images share: a hat (20)",
        "1 image without a caption: bag/copy.png",
        "words in a caption: 2 to 2, median 2; 2 different words, 0 of them used only once",
    ):
        assert any(line in said for said in report.lines()) and line in html


def test_counts() -> None:
    sizes = [(30, 40), (40, 30), (100, 100), (10, 1000), (192, 108)]
    assert aspect_histogram(sizes) == {"1:2 or taller": 1, "3:4": 1, "1:1": 1, "4:3": 1, "16:9": 1}
    assert reach(sizes)["32"] == 2 and reach(sizes)["64"] == 2 and reach(sizes)["128"] == 0
    assert kept_by_square_crop([(10, 20), (10, 10)]) == 0.75


def test_words(tmp_path: Path) -> None:
    texts = {"a.txt": "A red cat", "b.txt": "a red cat", "c.txt": "the cat's hat", "d.txt": "a red cat"}
    folder_of(tmp_path, {f"{name}.png": None for name in "abcd"} | texts)
    facts = caption_facts(find_source(str(tmp_path)).examples)
    assert facts.different == 3 and dict(facts.repeated) == {"a red cat": 2}
    assert (facts.shortest, facts.longest, facts.vocabulary, facts.once) == (3, 3, 6, 3)
    assert list(facts.common.items())[:3] == [("a", 3), ("cat", 3), ("red", 3)]


def test_the_sheet_shows_every_class(tmp_path: Path) -> None:
    for index in range(30):
        folder = tmp_path / ("rare" if index < 2 else "common")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), (250, 0, 0) if index < 2 else (0, 0, 250)).save(folder / f"{index:02}.png")
    source = find_source(str(tmp_path))
    chosen = [source.examples[index] for index in source.spread(8)]
    assert len(chosen) == 8 and [e.label for e in chosen].count("rare") == 2
    sheet = contact_sheet(source, most=8, columns=4, cell=40)
    colours = {
        sheet.getpixel((8 + 48 * column + 20, 8 + 61 * row + 20)) for column in range(4) for row in range(2)
    }
    assert colours == {(250, 0, 0), (0, 0, 250)}


def test_files_are_written_and_kept(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    save_all(tmp_path / "data", [f"a<b>/{i}.png" for i in range(3)] + [f"c/{i}.png" for i in range(12)])
    main = load_program(repository / "train" / "check.py").main
    page, sheet = tmp_path / "report.html", tmp_path / "sheet.png"
    main([str(tmp_path / "data"), "--report", str(page), "--sheet", str(sheet), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["suggestion"]["command"].startswith("latentflow train") and told["formats"] == {"PNG": 15}
    html = page.read_text(encoding="utf-8")
    assert "a&lt;b&gt;" in html and "<b>" not in html and "data:image/webp;base64" in html
    assert "http" not in html
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 1000
    before = page.read_bytes(), sheet.read_bytes()
    for flag, file in (("--report", page), ("--sheet", sheet)):
        with pytest.raises(UserError, match="exists"):
            main([str(tmp_path / "data"), flag, str(file)])
    assert (page.read_bytes(), sheet.read_bytes()) == before
    with pytest.raises(UserError, match=r"--sheet .*/x\.png cannot be written: .*\nChoose"):
        main([str(tmp_path / "data"), "--sheet", str(page / "x.png")])
    with pytest.raises(UserError, match=r"does not end in \.html"):
        main([str(tmp_path / "data"), "--report", "report.pdf"])
    main([str(tmp_path / "data"), "--report", str(page), "--overwrite"])
    assert "fine-tune the shipped checkpoint pictograms-128:" in capsys.readouterr().out
