"""What is inferred from a folder, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentflow.data import Source, find_source
from latentflow.errors import UserError

from .images import save_all, write_jsonl


def names(source: Source) -> list[str]:
    return [example.name for example in source.examples]


# --- precedence ---------------------------------------------------------------------------------------


def test_metadata_jsonl(tmp_path: Path) -> None:
    save_all(tmp_path, ["b.png", "a.png"])
    rows = [{"file_name": "b.png", "text": " bee "}, {"file_name": "a.png", "text": "ay", "label": 3}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    source = find_source(str(tmp_path))
    assert source.kind == "text" and names(source) == ["a.png", "b.png"]
    assert source.captions() == ["ay", "bee"]
    assert any("label found as well" in note for note in source.notes)
    assert find_source(str(tmp_path), condition="none").kind == "unconditional"


def test_metadata_csv_with_labels(tmp_path: Path) -> None:
    save_all(tmp_path, ["x/1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,label\nx/1.png,cat\n2.png,ant\n", encoding="utf-8-sig")
    source = find_source(str(tmp_path))
    assert source.kind == "class" and source.classes == ("ant", "cat")
    assert names(source) == ["2.png", "x/1.png"] and source.class_ids() == [0, 1]


def test_sidecars(tmp_path: Path) -> None:
    save_all(tmp_path, ["cats/1.png", "dogs/2.jpg"])
    (tmp_path / "cats/1.txt").write_text("a\n cat\n")
    (tmp_path / "dogs/2.txt").write_text("a dog")
    source = find_source(str(tmp_path))
    assert source.kind == "text" and source.captions() == ["a cat", "a dog"]
    assert any("subfolders found as well" in note for note in source.notes)
    by_class = find_source(str(tmp_path), condition="class")
    assert by_class.classes == ("cats", "dogs") and by_class.class_ids() == [0, 1]


def test_metadata_before_sidecars(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png", "2.png"])
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "1.png", "text": "one"}])
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "2.txt").write_text("two")
    assert find_source(str(tmp_path)).captions() == ["one", "two"]
    (tmp_path / "1.txt").write_text("other")
    with pytest.raises(UserError, match=r"metadata.jsonl and the .txt files differ on 1 images: 1.png"):
        find_source(str(tmp_path))
    assert find_source(str(tmp_path), condition="none").kind == "unconditional"  # a flag wins


def test_subfolders_and_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, ["hat/1.png", "shoe/a/2.png", "shoe/3.png"])
    source = find_source(str(tmp_path))
    assert source.kind == "class" and source.classes == ("hat", "shoe") and source.class_ids() == [0, 1, 1]
    alone = find_source(str(tmp_path / "hat"))
    assert alone.kind == "unconditional" and alone.classes == ()
    assert find_source(str(tmp_path), condition="none").kind == "unconditional"


def test_metadata_without_anything_said(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png", "2.png"])
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "1.png"}])
    assert names(find_source(str(tmp_path))) == ["1.png", "2.png"]


# --- missing captions ---------------------------------------------------------------------------------


@pytest.fixture
def gaps(tmp_path: Path) -> Path:
    save_all(tmp_path, [f"{i}.png" for i in range(9)])
    (tmp_path / "8.txt").write_text("eight")
    (tmp_path / "7.txt").write_text(" ")
    return tmp_path


def test_missing_captions_are_counted_and_named(gaps: Path) -> None:
    with pytest.raises(
        UserError, match=r"8 of 9 images have no caption: 0.png, 1.png, 2.png, 3.png, 4.png and 3"
    ):
        find_source(str(gaps))


def test_missing_captions_empty_or_skipped(gaps: Path) -> None:
    empty = find_source(str(gaps), missing_caption="empty")
    assert empty.captions() == [""] * 8 + ["eight"]
    skipped = find_source(str(gaps), missing_caption="skip")
    assert names(skipped) == ["8.png"]
    assert any("8 images without a caption, left out" in note for note in skipped.notes)


def test_no_captions_at_all(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    with pytest.raises(UserError, match="there are no captions"):
        find_source(str(tmp_path), condition="text")


def test_missing_classes(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png", "a/2.png", "b/3.png"])
    with pytest.raises(UserError, match=r"1 of 3 images have no class: 1.png"):
        find_source(str(tmp_path), condition="class")
    source = find_source(str(tmp_path), condition="class", missing_caption="skip")
    assert names(source) == ["a/2.png", "b/3.png"]


# --- metadata that cannot be meant --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"file_name": "1.png", "text": "a"}, {"file_name": "1.png", "text": "a"}],
            "twice, in lines 1 and 2",
        ),
        (
            [{"file_name": "1.png", "text": "a"}, {"file_name": "9.png", "text": "a"}],
            "1 files .* not there: 9.png",
        ),
        ([{"file_name": "1.png", "caption": "a"}], "'caption'\nRename it to 'text'"),
        ([{"file": "1.png", "text": "a"}], r"line 1 has no file_name \(it has file, text\)"),
        ([{"file_name": "../1.png", "text": "a"}], "leads out of the folder"),
        ([{"file_name": "1.png", "text": 5}], "text is 5, not a string"),
    ],
)
def test_metadata_errors(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    save_all(tmp_path, ["1.png"])
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(UserError, match=message):
        find_source(str(tmp_path))


def test_metadata_that_is_not_json(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}\n{oops\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        find_source(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a\n")
    with pytest.raises(UserError, match=r"both metadata.jsonl and metadata.csv"):
        find_source(str(tmp_path))


def test_metadata_of_unread_files_are_told(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    (tmp_path / "2.heic").touch()
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": n, "text": "a"} for n in ("1.png", "2.heic")])
    notes = find_source(str(tmp_path)).notes
    assert any("1 files that are not read as images: 2.heic" in note for note in notes)
    assert any("1 .heic files are not read" in note for note in notes)


# --- the wrong folder ---------------------------------------------------------------------------------


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=f"there is no folder .*\nDid you mean {tmp_path}/images"):
        find_source(str(tmp_path / "imgaes"))
    save_all(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="is a file, not a folder"):
        find_source(str(tmp_path / "a.png"))


def test_empty_folder_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images in .*; it is empty"):
        find_source(str(tmp_path))
    (tmp_path / "all.zip").touch()
    (tmp_path / "._a.jpg").touch()
    with pytest.raises(UserError, match=r"1 hidden or macOS resource files \(._a.jpg\); it holds 1 .zip"):
        find_source(str(tmp_path))


def test_one_level_too_high_for_parts_of_a_data_set(tmp_path: Path) -> None:
    save_all(tmp_path, ["train/a/1.png", "train/b/2.png", "test/a/3.png"])
    with pytest.raises(UserError, match=rf"test/ \(1\), train/ \(2\).*\nGive one of them: {tmp_path}/train"):
        find_source(str(tmp_path))


def test_one_level_too_high_for_metadata(tmp_path: Path) -> None:
    save_all(tmp_path, ["big/1.png", "small/2.png"])
    write_jsonl(tmp_path / "big/metadata.jsonl", [{"file_name": "1.png", "text": "a"}])
    with pytest.raises(UserError, match=f"metadata in big.*\nGive one of them: {tmp_path}/big"):
        find_source(str(tmp_path))


def test_one_subfolder_is_no_class(tmp_path: Path) -> None:
    save_all(tmp_path, ["photos/cat/1.png", "photos/dog/2.png"])
    with pytest.raises(
        UserError, match=rf"found in photos/cat/ \(1\), photos/dog/ \(1\)\n.*{tmp_path}/photos"
    ):
        find_source(str(tmp_path))
    assert len(find_source(str(tmp_path), condition="none")) == 2
    assert find_source(str(tmp_path), condition="class").classes == ("photos",)  # a flag wins


def test_images_beside_class_folders(tmp_path: Path) -> None:
    save_all(tmp_path, ["0.png", "a/1.png", "b/2.png"])
    with pytest.raises(UserError, match=r"1 images lie in .* itself, others in a/ \(1\), b/ \(1\)"):
        find_source(str(tmp_path))


def test_macos_and_hidden_files_are_passed_over_and_told(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.jpg", ".cache/2.png", "__MACOSX/3.jpg"])
    (tmp_path / "._1.jpg").write_bytes(b"\0\5\26\7")
    source = find_source(str(tmp_path))
    assert names(source) == ["1.jpg"]
    assert any("._1.jpg" in note for note in source.notes)


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert names(find_source(str(tmp_path), condition="none")) == ["1.png"]


def test_shapes_or_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("shapes").kind == "text"
    save_all(tmp_path, ["shapes/1.png"])
    with pytest.raises(UserError, match=r"both the procedural set and a folder here\nWrite ./shapes"):
        find_source("shapes")
    assert len(find_source("./shapes")) == 1


def test_unknown_choices() -> None:
    with pytest.raises(UserError, match="unknown condition 'txt'\ndid you mean 'text'"):
        find_source("shapes", condition="txt")  # type: ignore[arg-type]


@pytest.mark.data
def test_the_real_sets(data_folder: Path) -> None:
    emoji = find_source(str(data_folder / "emoji/train"))
    assert (emoji.kind, len(emoji)) == ("text", 3273)
    clothing = find_source(str(data_folder / "clothing/train"))
    assert (clothing.kind, len(clothing), len(clothing.classes)) == ("class", 3068, 10)
