"""One name in two Unicode spellings (NFC, NFD) is one name; a name that is missing is answered with the file that was
meant; tables of any separator; shards of names with dots."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from latentflow.cli import parse, run
from latentflow.config import DataConfig
from latentflow.data import check_source, decode_image, find_source
from latentflow.data.sources.kinds import KINDS
from latentflow.errors import UserError
from latentflow.models import train_tokenizer
from latentflow.utils.files import result_of
from latentflow.utils.names import as_spelled, composed, find_path, near_name, near_path

from .images import encoded, folder_of, jsonl, load_program, noise, png, tar, written, zipped

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
SPELLINGS = [(NFC, NFD), (NFD, NFC)]  # as text, as file
SPELLED = pytest.mark.parametrize(("said", "there"), SPELLINGS, ids=["NFD on disk", "NFC on disk"])

MASK = encoded(noise(0).convert("L"))
assert NFC != NFD and composed(NFD) == NFC


@pytest.fixture(autouse=True)
def keeps_spellings(tmp_path: Path) -> None:
    (tmp_path / NFD).touch()
    if [one.name for one in tmp_path.iterdir()] != [NFD] or (tmp_path / NFC).exists():
        pytest.skip("this disk does not tell the spellings apart")
    (tmp_path / NFD).unlink()


# --- one name in two spellings ------------------------------------------------------------------------------


def on_disk(path: Path, files: Mapping[str, str | bytes | None]) -> Path:
    return folder_of(path / "set", files)


def in_zip(path: Path, files: Mapping[str, str | bytes | None]) -> Path:
    return zipped(path / "set.zip", contents(files))


def in_mac_zip(path: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """As macOS packs a folder: names in UTF-8, without the flag that says so."""
    content = bytearray(in_zip(path, files).read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = -1
        while (place := content.find(signature, place + 1)) >= 0:
            struct.pack_into("<H", content, place + flags, 0)
    data = path / "mac.zip"
    data.write_bytes(content)
    assert NFC not in "".join(zipfile.ZipFile(data).namelist())
    return data


def contents(files: Mapping[str, str | bytes | None]) -> dict[str, bytes]:
    return {
        name: png(seed) if content is None else content.encode() if isinstance(content, str) else content
        for seed, (name, content) in enumerate(files.items())
    }


@pytest.mark.parametrize("make", [on_disk, in_zip, in_mac_zip])
@SPELLED
def test_metadata_and_masks_find_their_files(
    said: str, there: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    row = {"file_name": f"{said}/{said}.png", "text": "a cup", "mask": f"{said}/mask {said}.png"}
    files = {f"{there}/{there}.png": None, f"{there}/mask {there}.png": MASK, "metadata.jsonl": jsonl(row)}
    (example,) = find_source(str(make(tmp_path, files))).examples
    assert example.text == "a cup" and example.name == f"{there}/{there}.png"
    mask = example.open_mask()
    assert mask is not None and example.open().size == mask.size == (8, 8)


@pytest.mark.parametrize("make", [on_disk, in_zip, in_mac_zip])
@SPELLED
def test_captions_and_masks_beside_an_image_in_the_other_spelling(
    said: str, there: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    files = {f"{there}.png": None, f"{said}.txt": "a cup", f"{said}-mask.png": None, f"{there}.png.txt": ""}
    (example,) = find_source(str(make(tmp_path, files))).examples
    assert example.text == "a cup" and example.mask is not None


def test_captions_that_differ_in_their_spelling_do_not_contradict(tmp_path: Path) -> None:
    files = {"0.png": None, "0.txt": NFD, "metadata.jsonl": jsonl({"file_name": "0.png", "text": NFC})}
    assert find_source(str(on_disk(tmp_path, files))).captions() == [NFC]
    members = {"0.png": png(0), "0.txt": NFD.encode(), "0.json": json.dumps({"text": NFC}).encode()}
    assert find_source(str(tar(tmp_path / "s.tar", members))).captions() == [NFC]


@pytest.mark.parametrize("make", [on_disk, in_zip, in_mac_zip])
def test_class_folders_in_two_spellings_are_one_class(make: Callable[..., Path], tmp_path: Path) -> None:
    source = find_source(str(make(tmp_path, {f"{NFC}/1.png": None, f"{NFD}/2.png": None, "tea/3.png": None})))
    assert source.classes == (NFC, "tea") and sorted(source.class_ids()) == [0, 0, 1]
    assert any("two spellings of Unicode (NFC and NFD) are one each: café" in note for note in source.notes)


def test_a_class_of_one_spelling_stays_as_it_is(tmp_path: Path) -> None:
    """Runs that know it so continue."""
    source = find_source(str(on_disk(tmp_path, {f"{NFD}/1.png": None, "tea/3.png": None})))
    assert source.classes == (NFD, "tea")


def test_classes_of_tables_and_shards_in_two_spellings_are_one(tmp_path: Path) -> None:
    table = on_disk(tmp_path, {"1.png": None, "2.png": None}) / "t.csv"
    written(table, f"image,label\n1.png,{NFC}\n2.png,{NFD}\n")
    members = {
        "1.png": png(1),
        "1.cls": NFC.encode(),
        "2.png": png(2),
        "2.json": f'{{"label": "{NFD}"}}'.encode(),
    }
    for data in (table, tar(tmp_path / "s.tar", members)):
        assert find_source(str(data)).classes == (NFC,)


@pytest.mark.parametrize("make", [on_disk, in_zip])
def test_two_images_that_differ_in_their_spelling_alone_are_refused(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    data = make(tmp_path, {f"{NFC}.png": None, f"{NFD}.png": None})
    with pytest.raises(
        UserError, match=r"two images are named café.png, in two spellings|holds café.png twice"
    ):
        find_source(str(data))


@SPELLED
def test_a_table_and_the_data_themselves_are_found(said: str, there: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / there, {f"{there}/{there}.png": None, f"{there}.csv": ""})
    written(folder / f"{there}.csv", f"image,text\n{said}/{said}.png,a cup\n")
    (example,) = find_source(str(tmp_path / said / f"{said}.csv")).examples
    assert example.name == f"{said}/{said}.png" and example.open().size == (8, 8)
    assert len(find_source(str(tmp_path / said), condition="none")) == 1
    tar(folder / f"{there}.tar", {"0.png": png(0)})
    assert len(find_source(str(tmp_path / said / f"{said}.tar"))) == 1
    assert decode_image(str(tmp_path / said / said / f"{said}.png")).size == (8, 8)


def test_members_of_one_sample_in_two_spellings_are_one_sample(tmp_path: Path) -> None:
    source = find_source(str(tar(tmp_path / "s.tar", {f"{NFD}.png": png(0), f"{NFC}.txt": b"a cup"})))
    assert source.captions() == ["a cup"] and source.examples[0].name == f"s/{NFD}"


def test_names_of_columns_are_compared_alike(tmp_path: Path) -> None:
    data = written(on_disk(tmp_path, {"1.png": None}) / "t.csv", f"{NFD},text\n1.png,a\n")
    assert len(find_source(str(data), columns={"image": NFC})) == 1


def test_words_of_captions_are_counted_whole(tmp_path: Path) -> None:
    files = {"0.png": None, "0.txt": f"a {NFC}", "1.png": None, "1.txt": f"a {NFD}"}
    assert check_source(str(on_disk(tmp_path, files))).caption_facts.common == {"a": 2, NFC: 2}


def test_tokenizers_read_both_spellings_of_a_caption_alike() -> None:
    """So captions need no spelling of ours."""
    tokenizer = train_tokenizer([f"a {NFC}", "a tea"])
    assert tokenizer(NFC)["input_ids"] == tokenizer(NFD)["input_ids"]


def test_the_helper() -> None:
    assert as_spelled(NFC, {NFD: 1, "tea": 2}) == NFD and as_spelled(NFC, (NFD, NFC)) == NFC
    assert as_spelled("coffee", (NFD,)) == "coffee"
    assert find_path(Path("/") / NFC / NFC) == Path("/") / NFC / NFC


@SPELLED
def test_checkpoints_and_config_files(said: str, there: str, tmp_path: Path) -> None:
    index = written(tmp_path / there / "pipeline" / "model_index.json", "{}")
    assert result_of(str(tmp_path / said)) == str(index.parent)
    written(tmp_path / "train.yml", "")
    with pytest.raises(UserError, match=r"not found: .*train.yaml\nDid you mean '.*/train.yml'\?"):
        parse(DataConfig, ["cats", "--config", str(tmp_path / "train.yaml")], prog="latentflow train")


# --- hints --------------------------------------------------------------------------------------------------

THERE = ("cat.PNG", "big dog.png", "images/hat.png", "a/1.png", "a/b/shoe.jpg", "bags/bag.png", f"{NFD}.gif")
MEANT = {
    "cat.png": "cat.PNG", "Cat.png": "cat.PNG", "cat.jpg": "cat.PNG", "cat": "cat.PNG", "cat.png ": "cat.PNG",
    "/cat.png": "cat.PNG", "./CAT.PNG": "cat.PNG", "big  dog.png": "big dog.png", "BIG DOG.PNG": "big dog.png",
    "hat.png": "images/hat.png", "photos/hat.png": "images/hat.png", "images\\hat.jpeg": "images/hat.png",
    "/home/me/images/hat.png": "images/hat.png", "C:\\me\\hat.png": "images/hat.png", "shoe.png": "a/b/shoe.jpg",
    f"{NFC}.png": f"{NFD}.gif", "bags/bga.png": "bags/bag.png", "images/hta.png": "images/hat.png",
    "a/2.png": None, "01.png": "a/1.png", "a/01.png": "a/1.png", "quite another.png": None, "": None,
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_the_file_that_was_meant(name: str) -> None:
    assert near_name(name, THERE) == MEANT[name]


@pytest.mark.parametrize(
    "name", [name for name, meant in MEANT.items() if meant in THERE[:3] and ":" not in name]
)
def test_tables_and_metadata_name_the_file_that_was_meant(name: str, tmp_path: Path) -> None:
    files = folder_of(tmp_path / "set", dict.fromkeys(THERE))
    listed = written(files / "metadata.jsonl", jsonl({"file_name": name, "text": "a"}))
    message = (
        rf"(names 1 file that cannot be found|leads out of the folder)[^\n]*\nDid you mean '{MEANT[name]}'\?"
    )
    with pytest.raises(UserError, match=message):
        find_source(str(files))
    archive = zipped(
        tmp_path / "a.zip", {one: png(0) for one in THERE} | {"metadata.jsonl": listed.read_bytes()}
    )
    with pytest.raises(UserError, match=message):
        find_source(str(archive))
    if name == name.strip():
        with pytest.raises(UserError, match=message):
            find_source(str(written(files / "t.csv", f"image,text\n{name},a\n")))


def test_a_mask_that_is_missing_is_answered_too(tmp_path: Path) -> None:
    files = {
        "1.png": None,
        "masks/1.PNG": None,
        "metadata.jsonl": jsonl({"file_name": "1.png", "mask": "masks/1.png"}),
    }
    with pytest.raises(UserError, match=r"names 1 mask that .*\nDid you mean 'masks/1.PNG'\?"):
        find_source(str(on_disk(tmp_path, files)))


@pytest.mark.parametrize("stray", ["Cat.txt", "cat .txt", "captions/cat.txt", "cat.jpg.txt"])
def test_a_caption_that_is_named_otherwise_is_answered_too(stray: str, tmp_path: Path) -> None:
    files = {"dog.png": None, "dog.txt": "a dog", "cat.png": None, stray: "a cat"}
    with pytest.raises(
        UserError, match=f"no caption for 1 of 2 images: cat.png\nIs {stray} the caption of cat.png"
    ):
        find_source(str(on_disk(tmp_path, files)))


@pytest.mark.parametrize("table", ["metadata.csv", "t.csv"])
def test_paths_of_windows_are_read(table: str, tmp_path: Path) -> None:
    files = {"a/1.png": None, "b/2.png": None, "a/3\\4.png": None, "masks/m.png": None}
    text = "file_name,text,mask\n.\\a\\1.png,one,masks\\m.png\nb\\2.png,two,\na/3\\4.png,three,\n"
    data = on_disk(tmp_path, {**files, table: text})
    source = find_source(str(data / table if table == "t.csv" else data), missing_caption="skip")
    assert sorted(source.captions()) == ["one", "three", "two"]
    assert len(set(source.content_keys())) == 3 and sum(e.mask is not None for e in source.examples) == 1
    for outside in ("..\\1.png", "a\\..\\..\\1.png"):
        written(data / table, f"file_name,text\n{outside},one\n")
        with pytest.raises(UserError, match=r"leads out of the folder|cannot be found"):
            find_source(str(data / table if table == "t.csv" else data))


def test_the_hint_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, dict.fromkeys(THERE))
    monkeypatch.chdir(tmp_path)
    for name, meant in {
        "cat.jpg": "cat.PNG", "hat.png": "images/hat.png", "nowhere/hat.png": "images/hat.png",
        "images/hat.jpg": "images/hat.png", "imgs": "images", "a/b/shoe.png": "a/b/shoe.jpg",
        f"{tmp_path}/images/hat.PNG": f"{tmp_path}/images/hat.png",
    }.items():  # fmt: skip
        assert near_path(name) == f"Did you mean '{meant}'? ", name
    assert near_path("quite/another.png") == ""
    with pytest.raises(UserError, match=r"there is no file cat.jpg\nDid you mean 'cat.PNG'\?"):
        decode_image("cat.jpg")
    with pytest.raises(UserError, match=r"there is no folder or file imgs\nDid you mean 'images'\?"):
        find_source("imgs")
    tar(tmp_path / "cats.tar", {})
    with pytest.raises(
        UserError, match=r"files of CATS.tar do not exist: CATS.tar\nDid you mean 'cats.tar'\?"
    ):
        find_source("CATS.tar")


# --- tables of any separator ------------------------------------------------------------------------------------

ROWS = [
    ("file_name", "text", "weight"),
    ("1.png", "red, round; old\nhat", "1"),
    ("2.png", 'a "big" shoe', "0.5"),
]


def spreadsheet(separator: str) -> str:
    import csv

    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(ROWS)
    return text.getvalue()


CSV = {
    "commas": spreadsheet(","),
    "semicolons": spreadsheet(";"),
    "tabs": spreadsheet("\t"),
    "bars": spreadsheet("|"),
    "Excel": "sep=;\r\n" + spreadsheet(";"),
    "a line of its own": "SEP=^\r\n" + spreadsheet("^"),
    "empty columns": "".join(f"{line};;\n" for line in spreadsheet(";").split("\r\n")[:-1]) + ";;;;\n",
    "spaces": ' file_name , text ,weight\n1.png, "red, round; old\nhat", 1\n2.png, "a ""big"" shoe", 0.5\n',
    "byte order mark": "\ufeff" + spreadsheet(";"),
}  # fmt: skip


@pytest.mark.parametrize("table", ["metadata.csv", "t.csv", "t.tsv"])
@pytest.mark.parametrize("name", CSV)
def test_every_separator_is_read(name: str, table: str, tmp_path: Path) -> None:
    data = on_disk(tmp_path, {"1.png": None, "2.png": None, table: CSV[name]})
    source = find_source(str(data if table == "metadata.csv" else data / table))
    assert source.captions() == ["red, round; old\nhat", 'a "big" shoe'] and source.weights() == [1.0, 0.5]


def test_what_a_comma_file_was_read_as_stays(tmp_path: Path) -> None:
    """Runs on it continue: quotes after a space are text, and columns without a name are not read."""
    rows = 'file_name,text,\n1.png, "Hello" sign; old,\n2.png,"a, b|c\td",seen\n'
    data = on_disk(tmp_path, {"1.png": None, "2.png": None, "metadata.csv": rows})
    assert find_source(str(data)).captions() == ['"Hello" sign; old', "a, b|c\td"]


def test_two_names_with_a_tab_between_are_no_column(tmp_path: Path) -> None:
    """`mask image` is another word for `mask`."""
    data = on_disk(tmp_path, {"1.png": None, "m.png": MASK, "t.tsv": "mask\timage\nm.png\t1.png\n"}) / "t.tsv"
    assert find_source(str(data)).examples[0].mask is not None


def test_columns_that_are_named_decide(tmp_path: Path) -> None:
    data = on_disk(tmp_path, {"1.png": None, "t.csv": "bild;titel, kurz\n1.png;ein Hut\n"}) / "t.csv"
    assert find_source(str(data), columns={"image": "bild", "text": "titel, kurz"}).captions() == ["ein Hut"]


REFUSED = {
    "more cells": (
        "file_name;text\n1.png;a;b\n",
        'line 2 has more cells .*\nPut text that holds semicolons in double quotes: "red; round"',
    ),
    "more cells after sep": ("sep=;\nfile_name;text\n1.png;a\n1.png;a;b\n", "line 4 has more cells"),
    "upper case": ("file_name,Text\n1.png,a\n", r"no column text, but 'Text'\nRename it, or add --columns text Text"),
    "all in upper case": (
        "File Name;Text\n1.png;a\n",
        r"no column (image|file_name) or text, but 'File Name' and 'Text'\n"
        r".* --columns (image|file_name) 'File Name' text Text",
    ),
    "two of one name": ("file_name; text;text\n1.png;a;b\n", "two columns named 'text'"),
    "a decimal comma": ("file_name;text;weight\n1.png;a;0,5\n", "weight is '0,5'\n.*with a decimal point"),
    "UTF-16": ("file_name\ttext\n".encode("utf-16"), "not UTF-8 text: it begins as UTF-16 does\nSave it as UTF-8"),
    "a long line": ("file_name;" + "x" * 200_000 + "\n1.png;a\n", "line 1 cannot be read: field larger than"),
    "cp1252": ("file_name;text\n1.png;café\n".encode("cp1252"), "csv is not UTF-8 text: .*0xe9.*\nSave it as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("table", ["metadata.csv", "t.csv"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_table_is_refused_for(name: str, table: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    data = on_disk(tmp_path, {"1.png": None, table: content})
    with pytest.raises(UserError, match=message):
        find_source(str(data if table == "metadata.csv" else data / table))


def test_columns_in_upper_case_are_read_when_they_are_named(tmp_path: Path) -> None:
    data = on_disk(tmp_path, {"1.png": None, "metadata.csv": "File Name;Text\n1.png;a hat\n"})
    assert find_source(str(data), columns={"file_name": "File Name", "text": "Text"}).captions() == ["a hat"]


# --- shards ---------------------------------------------------------------------------------------------------------

SHARDS = {
    "images alone": {"22.05.png": png(0), "23.05.png": png(1)},
    "with captions": {"22.05.png": png(0), "22.05.txt": b"a", "22.06.png": png(1), "22.06.txt": b"b"},
    "in folders": {"v1.2/a/22.05.png": png(0)},
    "beside others": {"1.png": png(0), "1.seg.png": png(1), "22.05.png": png(2)},
    "upper case": {"22.05.PNG": png(0)},
    "two dots": {"22.05..png": png(0)},
}


@pytest.mark.parametrize("name", SHARDS)
def test_names_with_dots_in_a_shard_are_refused_with_the_rule(name: str, tmp_path: Path) -> None:
    data = tar(tmp_path / "s.tar", SHARDS[name])
    with pytest.raises(
        UserError,
        match=r"the name of a sample ends at the first dot, so \S*22.05..?(png|PNG) is '05..?(png|PNG)' of a sample "
        r"'22', not an image\n.*such as 22_05_?.(png|PNG)",
    ):
        find_source(str(data))


def test_dots_in_folders_and_other_images_of_a_sample_are_no_fault(tmp_path: Path) -> None:
    members = {"v1.2/0.png": png(0), "v1.2/0.seg.png": png(1), "v1.2/1.png": png(2), "2.seg.png": png(3)}
    source = find_source(str(tar(tmp_path / "s.tar", members | {"v1.2/1.b.txt": b"lost"})))
    assert [example.name for example in source.examples] == ["s/v1.2/0", "s/v1.2/1"]
    (note,) = [note for note in source.notes if note.startswith("members not read")]
    assert ".seg.png (2)" in note and note.endswith("; the name of a sample ends at the first dot")


# --- through the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [on_disk, in_zip])
def test_check_of_a_set_with_every_odd_name(
    make: Callable[..., Path], tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        "🦊.png", "a b.png", "100%.png", "#1.png", "x" * 200 + ".png", "-rf.png", "C.PNG", "d.JPEG", "con.png",
        "NUL.png", "a\nb.png", "tab\t.png", "a..png", "%s{}.png",
    ]  # fmt: skip
    files = dict.fromkeys(names) | {
        "Thumbs.db": b"x",
        ".DS_Store": b"x",
        "__MACOSX/._C.PNG": b"x",
        "._C.PNG": b"x",
    }
    files |= {f"{name.rpartition('.')[0]}.txt": f"thing {number}" for number, name in enumerate(names)}
    data = make(tmp_path, files)
    load_program(repository / "train" / "check.py").main(
        [str(data), "--report", str(tmp_path / "r.html"), "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == len(names) and not report["problems"] and not report["unreadable"]
    assert find_source(str(data)).kind == "text"


@pytest.mark.parametrize("program", ["check", "flow"])
def test_the_command_line_answers_with_the_file(
    program: str,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = on_disk(tmp_path, {"images/1.PNG": None, "t.csv": "file_name;text\nimages\\1.png;a\n"}) / "t.csv"
    arguments = [str(data), *(["-o", str(tmp_path / "run"), "--dry-run"] if program == "flow" else [])]
    monkeypatch.setattr(sys, "argv", ["latentflow", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run(lambda: load_program(repository / "train" / f"{program}.py").main(arguments))
    said = "".join(capsys.readouterr())
    assert stopped.value.code in (1, 2)
    assert "cannot be found" in said and "Did you mean 'images/1.PNG'?" in said and "Traceback" not in said


def test_every_kind_says_so_in_the_docs(repository: Path) -> None:
    page = (repository / "docs" / "reference" / "data.md").read_text(encoding="utf-8")
    assert KINDS["table"].meaning in page and "NFC" in page and "first dot" in page


def test_a_tar_of_macos(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in {f"./{NFD}.png": png(0), f"./._{NFD}.png": b"x", f"./{NFC}.cls": b"tea"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    assert find_source(str(tmp_path / "s.tar")).classes == ("tea",)
