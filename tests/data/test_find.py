"""What is inferred from a folder, what is not read and therefore named, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from latentflow.data import Source, check_source, find_source
from latentflow.errors import UserError

from .images import folder_of, jsonl, load_program, png, save_all, tar, zipped

Files = Mapping[str, str | bytes | None]  # None is an image


def names(source: Source) -> list[str]:
    return [example.name for example in source.examples]


# --- precedence ---------------------------------------------------------------------------------------

LISTED = jsonl({"file_name": "b.png", "text": " bee "}, {"file_name": "a.png", "text": "ay", "label": 3})
BESIDE = {"cats/1.png": None, "dogs/2.png": None, "cats/1.txt": "a\n cat\n", "dogs/2.txt": "a dog"}
GAPS = {f"{i}.png": None for i in range(9)} | {"8.txt": "eight", "7.txt": " "}
CLASSED = {"hat/1.png": None, "shoe/a/2.png": None, "shoe/3.png": None}
# (files, settings, what the source is, parts of its notes)
FOUND: dict[str, tuple[Files, dict[str, Any], dict[str, Any], list[str]]] = {
    "metadata.jsonl": (
        {"b.png": None, "a.png": None, "metadata.jsonl": LISTED}, {},
        {"kind": "text", "names": ["a.png", "b.png"], "captions": ["ay", "bee"]},
        ["captions from metadata.jsonl", "classes from metadata.jsonl found as well, not used"],
    ),
    "not asked for": (
        {"b.png": None, "a.png": None, "metadata.jsonl": LISTED}, {"condition": "none"}, {"kind": "unconditional"}, [],
    ),
    "metadata.csv with labels": (
        {"x/1.png": None, "2.png": None, "metadata.csv": "\ufefffile_name,label\nx/1.png,cat\n2.png,ant\n"}, {},
        {"kind": "class", "classes": ("ant", "cat"), "names": ["2.png", "x/1.png"], "class_ids": [0, 1]}, [],
    ),
    "metadata that say nothing": (
        {"1.png": None, "2.png": None, "metadata.jsonl": jsonl({"file_name": "1.png"})}, {},
        {"kind": "unconditional", "names": ["1.png", "2.png"]}, [],
    ),
    "metadata of files that are not read": (
        {"1.png": None, "2.heic": "",
         "metadata.jsonl": jsonl({"file_name": "1.png", "text": "a"}, {"file_name": "2.heic", "text": "a"})}, {},
        {"kind": "text"}, ["not read as images, though in the metadata: 1 file: 2.heic", "not read: 1 .heic;"],
    ),
    "texts beside": (
        BESIDE, {}, {"kind": "text", "captions": ["a cat", "a dog"]}, ["classes from subfolders found as well"],
    ),
    "texts beside, classes asked for": (
        BESIDE, {"condition": "class"}, {"kind": "class", "classes": ("cats", "dogs"), "class_ids": [0, 1]},
        ["captions from .txt files beside the images found as well, not used (--condition decides)"],
    ),
    "metadata before texts": (
        {"1.png": None, "2.png": None, "1.txt": "one\n", "2.txt": "two",
         "metadata.jsonl": jsonl({"file_name": "1.png", "text": "one"})},
        {}, {"captions": ["one", "two"]}, [],
    ),
    "texts that differ from metadata, not asked for": (
        {"1.png": None, "1.txt": "other", "metadata.jsonl": jsonl({"file_name": "1.png", "text": "one"})},
        {"condition": "none"}, {"kind": "unconditional"}, [],
    ),
    "subfolders": (CLASSED, {}, {"kind": "class", "classes": ("hat", "shoe"), "class_ids": [0, 1, 1]}, []),
    "subfolders, nothing asked for": (CLASSED, {"condition": "none"}, {"kind": "unconditional"}, []),
    "nothing": ({"1.png": None}, {}, {"kind": "unconditional", "classes": ()}, []),
    "gaps, empty": (GAPS, {"missing_caption": "empty"}, {"captions": [""] * 8 + ["eight"]}, []),
    "gaps, skipped": (
        GAPS, {"missing_caption": "skip"}, {"names": ["8.png"]}, ["8 images without a caption, left out"],
    ),
    "no class, skipped": (
        {"1.png": None, "a/2.png": None, "b/3.png": None}, {"condition": "class", "missing_caption": "skip"},
        {"names": ["a/2.png", "b/3.png"]}, [],
    ),
    "no class, without a condition": (
        {"1.png": None, "a/2.png": None, "b/3.png": None}, {"condition": "class", "missing_caption": "empty"},
        {"names": ["1.png", "a/2.png", "b/3.png"], "class_ids": [-1, 0, 1], "classes": ("a", "b")},
        ["1 image without a class, trained on without a condition: 1.png"],
    ),
    "a level too high, asked for": (
        {"photos/cat/1.png": None, "photos/dog/2.png": None}, {"condition": "class"}, {"classes": ("photos",)}, [],
    ),
    "a level too high, without classes": (
        {"photos/cat/1.png": None, "photos/dog/2.png": None}, {"condition": "none"},
        {"names": ["photos/cat/1.png", "photos/dog/2.png"]}, [],
    ),
    "hidden files": (
        {"1.jpg": None, ".cache/2.png": None, "__MACOSX/3.jpg": None, "._1.jpg": b"\0\5\26\7"}, {},
        {"names": ["1.jpg"]}, ["._1.jpg"],
    ),
    "tables beside images": (
        {"0.png": None, "x.parquet": ""}, {}, {"names": ["0.png"]}, ["not read: 1 .parquet beside the images"],
    ),
    "columns that are not used": (
        {"0.png": None, "metadata.csv": "file_name,text,tags,image\n0.png,a,b,c\n"}, {}, {"kind": "text"},
        ["columns of metadata.csv not used: tags, image"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_a_folder_is(tmp_path: Path, case: str) -> None:
    files, settings, wanted, notes = FOUND[case]
    source = find_source(str(folder_of(tmp_path, files)), **settings)
    found = {"kind": source.kind, "names": names(source), "classes": source.classes}
    for name, value in wanted.items():
        assert (found[name] if name in found else getattr(source, name)()) == value
    for part in notes:
        assert any(part in note for note in source.notes), part


# --- captions beside the images -------------------------------------------------------------------------

CAPTIONS = ["0.txt", "0.TXT", "0.caption", "0.Caption", "0.png.txt", "0.png.CAPTION"]
UNREAD = [
    "0.tags", "0.json", "0.cap", "0.csv", "0.yaml", "captions.txt", "captions.json", "metadata.json", "Metadata.JSONL",
    "1.txt", "0.jpg.txt", "notes", "list.tsv",
]  # fmt: skip


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    return folder_of(path / "data", files)


def archive(path: Path, files: Mapping[str, bytes]) -> Path:
    return zipped(path / "data.zip", files)


def shard(path: Path, files: Mapping[str, bytes]) -> Path:
    return tar(path / "data.tar", files)


@pytest.mark.parametrize("make", [folder, archive, shard])
@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_read_whatever_its_file_is_called(
    name: str, make: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    source = find_source(str(make(tmp_path, {"0.png": png(0), name: b"\xef\xbb\xbf a red\nhat "})))
    assert source.kind == "text" and source.captions() == ["a red hat"]
    ending = ".caption" if name.lower().endswith(".caption") else ".txt"
    origin = "1 sample in 1 tar file, read in place"
    assert source.notes == (origin if make is shard else f"captions from {ending} files beside the images",)


@pytest.mark.parametrize("make", [folder, archive])
@pytest.mark.parametrize("place", ["", "hat/"])
def test_every_file_that_is_not_read_is_named(
    place: str, make: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    """Flat, and in folders that are classes, where nobody looks for captions."""
    files = {f"{place}0.png": png(0), "shoe/5.png": png(5)} if place else {"0.png": png(0), "2.png": png(2)}
    for name in UNREAD:
        source = find_source(str(make(tmp_path, files | {place + name: b"a hat", "Thumbs.db": b""})))
        assert source.kind == ("class" if place else "unconditional")
        notes = [note for note in source.notes if f"not read: 1 other file: {place}{name};" in note]
        assert len(notes) == 1 and "metadata.jsonl" in notes[0] and ".txt or .caption" in notes[0]
        for path in (tmp_path / "data" / place / name, tmp_path / "data.zip"):
            path.unlink(missing_ok=True)
    many = find_source(str(make(tmp_path, files | {f"{place}{n}.tags": b"a" for n in range(9)})))
    named = ", ".join(f"{place}{n}.tags" for n in range(5))
    assert any(f"not read: 9 other files: {named} and 4 more;" in note for note in many.notes)


def test_members_of_a_shard_that_are_not_read_are_named(tmp_path: Path) -> None:
    members = {"0.png": png(0), "0.tags": b"a", "1.tags": b"a", "2.tags": b"a", "captions.csv": b"a"}
    notes = find_source(str(shard(tmp_path, members))).notes
    assert "members not read: .tags (3): 0.tags, 1.tags and 1 more; .csv (1): captions.csv" in notes


@pytest.mark.parametrize(
    ("name", "other"), [("0.txt", "0.caption"), ("0.txt", "0.TXT"), ("0.png.txt", "0.txt")]
)
def test_two_captions_of_one_image_must_agree(name: str, other: str, tmp_path: Path) -> None:
    data = folder(tmp_path, {"0.png": png(0), name: b"a hat", other: b" a\nhat"})
    assert find_source(str(data)).captions() == ["a hat"]
    (data / other).write_bytes(b"")  # says nothing
    assert find_source(str(data)).captions() == ["a hat"]
    (data / other).write_bytes(b"a shoe")
    message = rf"1 image with captions that differ: 0.png \({', '.join(sorted((name, other)))}\)"
    with pytest.raises(UserError, match=message):
        find_source(str(data))
    assert "captions that differ: 0.png" in check_source(str(data)).problems[0]
    assert find_source(str(data), condition="none").captions() == [""]
    if "TXT" not in other:
        with pytest.raises(UserError, match="contradict each other"):
            find_source(str(shard(tmp_path, {"0.png": png(0), name: b"a hat", other: b"a shoe"})))


def test_check_names_what_is_not_read(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, {"0.png": png(0), "0.\x1b[31mtags": b"a", "1.png": png(1)})
    load_program(repository / "train" / "check.py").main([str(data)])
    lines = capsys.readouterr().out
    assert "not read: 1 other file: 0.\\x1b[31mtags; captions are read from" in lines
    assert "\x1b" not in lines


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=f"there is no folder .*\nDid you mean '{tmp_path}/photos'"):
        find_source(str(tmp_path / "fotos"))
    save_all(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="is a file, not a folder"):
        find_source(str(tmp_path / "a.png"))


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    save_all(tmp_path, ["1.png"])
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert names(find_source(str(tmp_path), condition="none")) == ["1.png"]


def test_shapes_or_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("shapes").kind == "text"
    with pytest.raises(UserError, match="no alpha channel"):
        find_source("shapes", masks="alpha")
    save_all(tmp_path, ["shapes/1.png"])
    with pytest.raises(UserError, match=r"both the procedural set and a folder here\nWrite ./shapes"):
        find_source("shapes")
    assert len(find_source("./shapes")) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("condition", "txt", "unknown condition 'txt'\ndid you mean 'text'"),
        ("masks", "alhpa", "unknown masks 'alhpa'\ndid you mean 'alpha'"),
        ("colours", "srbg", "unknown colours 'srbg'\ndid you mean 'srgb'"),
    ],
)
def test_unknown_choices(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_source("shapes", **{name: value})  # type: ignore[arg-type]


@pytest.mark.data
def test_the_real_sets(data_folder: Path) -> None:
    emoji = find_source(str(data_folder / "emoji/train"))
    assert (emoji.kind, len(emoji)) == ("text", 3273)
    clothing = find_source(str(data_folder / "clothing/train"))
    assert (clothing.kind, len(clothing), len(clothing.classes)) == ("class", 3068, 10)
