"""What lies beside images: captions are read, whatever they are called; what is not read is named, always."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from latentflow.data import check_source, find_source
from latentflow.errors import UserError

from .images import load_program
from .test_kinds import png, tar, zipped

CAPTIONS = ["0.txt", "0.TXT", "0.caption", "0.Caption", "0.png.txt", "0.png.CAPTION"]
UNREAD = [
    "0.tags", "0.json", "0.cap", "0.csv", "0.yaml", "captions.txt", "captions.json", "metadata.json", "Metadata.JSONL",
    "1.txt", "0.jpg.txt", "notes", "list.tsv",
]  # fmt: skip


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "data" / name).write_bytes(content)
    return path / "data"


def archive(path: Path, files: Mapping[str, bytes]) -> Path:
    return zipped(path / "data.zip", files)


@pytest.mark.parametrize("make", [folder, archive])
@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_read_whatever_its_file_is_called(
    name: str, make: Callable[[Path, Mapping[str, bytes]], Path], tmp_path: Path
) -> None:
    source = find_source(str(make(tmp_path, {"0.png": png(0), name: b"\xef\xbb\xbf a red\nhat "})))
    assert source.kind == "text" and source.captions() == ["a red hat"]
    ending = ".caption" if name.lower().endswith(".caption") else ".txt"
    assert source.notes == (f"captions from {ending} files beside the images",)


@pytest.mark.parametrize("name", ["0.txt", "0.caption", "0.png.txt", "0.PNG.Caption"])
def test_a_caption_in_a_shard_is_read_whatever_its_member_is_called(name: str, tmp_path: Path) -> None:
    source = find_source(str(tar(tmp_path / "s.tar", {"0.png": png(0), name: b" a red\nhat "})))
    assert source.kind == "text" and source.captions() == ["a red hat"]
    assert not any("not read" in note for note in source.notes)


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
        told = [note for note in source.notes if f"1 other files are not read: {place}{name};" in note]
        assert len(told) == 1 and "metadata.jsonl" in told[0] and ".txt or .caption" in told[0]
        for path in (tmp_path / "data" / place / name, tmp_path / "data.zip"):
            path.unlink(missing_ok=True)
    many = find_source(str(make(tmp_path, files | {f"{place}{n}.tags": b"a" for n in range(9)})))
    named = ", ".join(f"{place}{n}.tags" for n in range(5))
    assert any(f"9 other files are not read: {named} and 4 more;" in note for note in many.notes)


def test_members_of_a_shard_that_are_not_read_are_named(tmp_path: Path) -> None:
    members = {"0.png": png(0), "0.tags": b"a", "1.tags": b"a", "2.tags": b"a", "captions.csv": b"a"}
    notes = find_source(str(tar(tmp_path / "s.tar", members))).notes
    assert "members not read: .tags (3): 0.tags, 1.tags and 1 more; .csv (1): captions.csv" in notes


@pytest.mark.parametrize(
    ("name", "other"), [("0.txt", "0.caption"), ("0.txt", "0.TXT"), ("0.png.txt", "0.txt")]
)
def test_two_captions_of_one_image_must_agree(name: str, other: str, tmp_path: Path) -> None:
    files = {"0.png": png(0), name: b"a hat", other: b" a\nhat"}
    data = folder(tmp_path, files)
    assert find_source(str(data)).captions() == ["a hat"]
    (data / other).write_bytes(b"")  # says nothing
    assert find_source(str(data)).captions() == ["a hat"]
    (data / other).write_bytes(b"a shoe")
    told = rf"1 images have captions that differ: 0.png \({', '.join(sorted((name, other)))}\)"
    with pytest.raises(UserError, match=told):
        find_source(str(data))
    assert "captions that differ: 0.png" in check_source(str(data), progress=False).problems[0]
    assert find_source(str(data), condition="none").captions() == [""]
    if "TXT" not in other:
        shard = tar(tmp_path / "s.tar", {"0.png": png(0), name: b"a hat", other: b"a shoe"})
        with pytest.raises(UserError, match="contradict each other"):
            find_source(str(shard))


def test_captions_that_are_not_asked_for_are_told(tmp_path: Path) -> None:
    files = {"hat/0.png": png(0), "hat/0.caption": b"a hat", "shoe/1.png": png(1)}
    notes = find_source(str(folder(tmp_path, files)), condition="class").notes
    assert "captions found as well, not used (--condition decides)" in notes


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    data = folder(tmp_path, {"0.png": png(0), "metadata.csv": b"file_name,text,tags,image\n0.png,a,b,c\n"})
    assert "columns of metadata.csv not used: tags, image" in find_source(str(data)).notes
    (data / "table.csv").write_bytes(b"image,text,tags\n0.png,a,b\n")
    assert "columns not used: tags" in find_source(str(data / "table.csv")).notes


def test_check_names_what_is_not_read(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, {"0.png": png(0), "0.\x1b[31mtags": b"a", "1.png": png(1)})
    load_program(repository / "train" / "check.py").main([str(data)])
    told = capsys.readouterr().out
    assert (
        "1 other files are not read: 0.\\x1b[31mtags; captions are read from" in told and "\x1b" not in told
    )
