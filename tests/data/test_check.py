"""`latentflow check`: what cannot be read is skipped and named; report, contact sheet, page, suggested command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentflow.config import PRESETS, RunConfig
from latentflow.data import Report, check_source, find_source, readable
from latentflow.data.checking.page import choose_evenly, contact_sheet, report_page
from latentflow.data.checking.report import (
    aspect_histogram,
    caption_facts,
    check_data,
    kept_by_square_crop,
    reach,
)
from latentflow.data.checking.suggest import suggest
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
        UserError, match=r"3 of 45 images cannot be read \(7%, at most 5 % may\): another.jpg"
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
    assert "2 images occur more than once: 00.png = x40.png, 01.png = x41.png" in text
    assert "43 images are few" in text and "._00.jpg" in text and text.endswith("ready to train")
    assert json.loads(json.dumps(report.as_dict()))["sizes"] == {"8x8": 42, "7x9": 1}


def test_one_image_in_two_classes_is_told(tmp_path: Path) -> None:
    save_all(tmp_path, ["a/1.png", "a/2.png"])
    save_all(tmp_path, ["b/1.png"])  # the same as a/1.png
    report = check_source(str(tmp_path))
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


# --- the page and the suggestion ---


def test_what_is_worth_knowing_is_said_in_text_and_page(tmp_path: Path) -> None:
    for seed in range(20):
        (tmp_path / "hat").mkdir(exist_ok=True)
        make_image(seed).save(tmp_path / "hat" / f"{seed:02}.png")
    (tmp_path / "bag").mkdir()
    make_image(0).resize((48, 48)).save(tmp_path / "bag/copy.png")
    report, source = check_data(str(tmp_path))
    html = report_page(report, source, None).html()
    for warning in (
        "1 groups of near duplicates have different classes: bag/copy.png = hat/00.png",
        "classes are unbalanced: hat has 20 images, bag has 1",
    ):
        assert any(warning in line for line in report.warnings) and warning in html
    assert "1 groups of duplicates" in html and "<h2>2 classes</h2>" in html
    for seed in range(20):
        (tmp_path / "hat" / f"{seed:02}.txt").write_text("a hat")
    report, source = check_data(str(tmp_path))
    html = report_page(report, source, None).html()
    for line in (
        "bag/copy.png. Add them, or choose --missing-caption",
        "captions that more than 5 % of the images share: a hat (20)",
        "1 images have no caption: bag/copy.png",
        "words in a caption: 2 to 2, median 2; 2 different words, 0 of them only once",
    ):
        assert any(line in said for said in report.lines()) and line in html


def report(side: int, images: int = 5000) -> Report:
    sizes = [(side, 2 * side)] * images
    counts = {f"{side}x{2 * side}": images}
    return Report("my cats", "class", images, sizes=counts, reach=reach(sizes), kept_by_square_crop=0.5)


@pytest.mark.parametrize(
    ("side", "gpu", "resolution", "preset"),
    [(20, False, 32, "tiny"), (63, True, 32, "tiny"), (64, False, 64, "small"), (500, False, 64, "small"),
     (130, True, 128, "small"), (500, True, 256, "base")],
)  # fmt: skip
def test_a_suggestion_is_a_line_that_train_takes(
    side: int, gpu: bool, resolution: int, preset: str, repository: Path
) -> None:
    suggestion = suggest(report(side), gpu=gpu, flags=("--masks", "alpha"))
    assert suggestion is not None
    words = shlex.split(suggestion.command)
    assert words[:3] == ["latentflow", "train", "my cats"]
    config = load_program(repository / "train" / "flow.py").parse(
        RunConfig,
        words[2:],
        prog="latentflow train",
        presets=PRESETS,
    )
    assert config.data.resolution == resolution and config.data.masks == "alpha"
    assert words[words.index("--preset") + 1] == preset and (config.vae is not None) == (resolution == 256)
    assert all(choice in suggestion.command or choice == "no --vae" for choice in suggestion.reasons)
    assert f"batches of {config.loop.train_batch_size} " in "".join(suggestion.reasons.values())
    assert config.loop.max_train_steps <= PRESETS[preset]["max_train_steps"]


@pytest.mark.parametrize(("kept", "buckets"), [(0.5, True), (0.89, True), (0.91, False), (1.0, False)])
def test_several_aspect_ratios_are_suggested_where_a_square_cuts_off_much(kept: float, buckets: bool) -> None:
    suggestion = suggest(dataclasses.replace(report(64), kept_by_square_crop=kept), gpu=False)
    assert suggestion is not None
    assert ("--buckets" in shlex.split(suggestion.command)) == buckets == ("--buckets" in suggestion.reasons)
    if buckets:
        assert f"{1 - kept:.0%} of an image" in suggestion.reasons["--buckets"]


def test_masks_are_a_reason_of_their_own() -> None:
    suggestion = suggest(dataclasses.replace(report(64), masks=3), gpu=False)
    assert suggestion is not None and "3 images have a mask" in suggestion.reasons["masks"]


def test_nothing_is_suggested_for_what_cannot_be_trained_on() -> None:
    assert suggest(Report("x", "unknown", problems=("no",)), gpu=False) is None


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
    chosen = choose_evenly(source, 8)
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
    assert "to start a training:" in capsys.readouterr().out
