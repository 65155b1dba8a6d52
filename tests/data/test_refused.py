"""What each kind of DATA refuses, with which words: damaged or meant otherwise, by check and training alike."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from latentflow.cli import run
from latentflow.data import check_source, find_source
from latentflow.errors import LENGTH, UserError, one_line

from .images import folder_of, jsonl, load_program, parquet, png, saved, tar, written, zipped
from .test_fuzzing import DESCRIPTION

Make = Callable[[Path], Path]
# What is refused: how it is made, the message, settings.
Rows = dict[str, tuple[Make, str] | tuple[Make, str, dict[str, Any]]]


def folder(files: Mapping[str, str | bytes | None]) -> Make:
    return lambda path: folder_of(path, files)


def listed(*rows: Mapping[str, object]) -> Make:
    return folder({"1.png": None, "metadata.jsonl": jsonl(*rows)})


def line(text: str) -> Make:
    return folder({"1.png": None, "metadata.jsonl": text})


def row(**values: object) -> Make:
    return listed({"file_name": "1.png", "text": "a", **values})


def shard(**members: bytes) -> Make:
    """A shard of members ``png``, ``txt``, ... of sample 0 (``_1_txt``: of sample 1)."""
    named = {(f"{n[1]}.{n[3:]}" if n.startswith("_") else f"0.{n}"): c for n, c in members.items()}
    return lambda path: tar(path / "s.tar", named)


def csv(*lines: str | bytes) -> Make:
    content = b"\n".join(part.encode() if isinstance(part, str) else part for part in lines)
    return lambda path: written(written(path / "1.png", png(1)).parent / "t.csv", content)


def archive(members: Mapping[str, bytes]) -> Make:
    return lambda path: zipped(path / "z.zip", members)


def table(metadata: dict[str, str | bytes] | None = None, **columns: Any) -> Make:
    return lambda path: parquet(path / "p.parquet", metadata, **columns)


def features(content: str | bytes) -> Make:
    """A parquet file with something else where `datasets` writes the names of classes."""
    return table({"huggingface": content}, image=[png(0)], label=[1])


def mix(text: str) -> Make:
    """A mix beside a captioned set `cats`, one with classes, `hats`, and a folder of latents."""

    def make(path: Path) -> Path:
        folder_of(path / "cats", {"0.png": None, "0.txt": "a cat"})
        folder_of(path, {"hats/a/1.png": None, "hats/b/2.png": None, "latents/latents.json": "{}"})
        return written(path / "mix.yaml", text)

    return make


def of_cats(entry: str) -> Make:
    return mix(f"sources: [{{data: cats, {entry}}}]")


def twice(path: Path) -> Path:
    with zipfile.ZipFile(path / "twice.zip", "w") as file:
        file.writestr("1.png", png(1))
        file.writestr("1.png", png(2))
    return path / "twice.zip"


def parts(path: Path) -> Path:
    import datasets

    data = saved(path / "one", image=[{"bytes": png(0), "path": None}])
    rows = datasets.load_from_disk(str(data))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(path / "both"))
    assert len(find_source(str(path / "both/train"))) == 1
    return path / "both"


def invalid_strings(path: Path) -> Path:
    import pyarrow

    halves = pyarrow.array([b"a \xed\xa0\xbc hat"])  # half an emoji, as Arrow can hold it
    return parquet(path / "x.parquet", image=[png(0)], text=halves.view(pyarrow.string()))


GAPS = folder({f"{i}.png": None for i in range(9)} | {"8.txt": "eight", "7.txt": " "})
HALF = '{"file_name": "1.png", "text": "a \\ud83c hat"}'

FOLDERS: Rows = {
    "gaps": (GAPS, r"no caption for 8 of 9 images: 0.png, 1.png, 2.png, 3.png, 4.png and 3"),
    "no captions": (folder({"1.png": None}), "there are no captions", {"condition": "text"}),
    "empty captions": (
        folder({"1.png": None, "1.txt": ""}), "no image has a caption", {"missing_caption": "skip"},
    ),
    "no classes": (folder({"1.png": None}), "there are no classes", {"condition": "class"}),
    "an image without a class": (
        folder({"1.png": None, "a/2.png": None, "b/3.png": None}), r"no class for 1 of 3 images: 1.png",
        {"condition": "class"},
    ),
    "metadata and texts that differ": (
        folder({"1.png": None, "metadata.jsonl": jsonl({"file_name": "1.png", "text": "one"}), "1.txt": "other"}),
        r"metadata.jsonl and the .txt files differ on 1 image: 1.png",
    ),
    "twice": (listed(*[{"file_name": "1.png", "text": "a"}] * 2), "twice, in lines 1 and 2"),
    "absent": (row(file_name="9.png"), "names 1 file that cannot be found: 9.png"),
    "another word": (
        listed({"file_name": "1.png", "caption": "a"}), "but 'caption'\nRename it, or add --columns text caption$",
    ),
    "no file_name": (
        listed({"file": "1.png", "text": "a"}), "but 'file'\nRename it, or add --columns file_name file$",
    ),
    "outside": (row(file_name="../1.png"), "leads out of the folder"),
    "an absent mask": (row(mask="m.png"), r"names 1 mask that cannot be found: m.png\nmask is relative"),
    "a mask outside": (row(mask="../1.png"), "leads out of the folder"),
    "a number as mask": (row(mask=5), "mask is 5, not a string"),
    "its own mask": (row(mask="1.png"), r"1.png is given as its own mask\n.*--masks alpha"),
    "a mask by another word": (row(mask_file_name="m.png"), "no column mask, but 'mask_file_name'\nRename it, or"),
    "two metadata files": (
        folder({"1.png": None, "metadata.jsonl": "", "metadata.csv": ""}), "both metadata.jsonl and metadata.csv",
    ),
    "columns without metadata": (
        folder({"1.png": None}), "has no metadata.jsonl or metadata.csv", {"columns": {"text": "a"}},
    ),
    "empty": (folder({}), r"no images in .*; it is empty"),
    "only other files": (
        folder({"all.zip": "", "._a.jpg": ""}),
        r"1 hidden or macOS resource file \(._a.jpg\); it holds other files: 1 .zip",
    ),
    "parts of one data set": (
        folder({"train/a/1.png": None, "train/b/2.png": None, "test/a/3.png": None}),
        r"test/ \(1\), train/ \(2\).*\nGive one of them: .*/train",
    ),
    "metadata one level below": (
        folder({"big/1.png": None, "small/2.png": None, "big/metadata.jsonl": ""}),
        "metadata in big.*\nGive one of them: .*/big",
    ),
    "one subfolder": (
        folder({"photos/cat/1.png": None, "photos/dog/2.png": None}),
        r"found in photos/cat/ \(1\), photos/dog/ \(1\)\n.*/photos",
    ),
    "images beside class folders": (
        folder({"0.png": None, "a/1.png": None, "b/2.png": None}),
        r"itself holds 1 image, its subfolders hold others: a/ \(1\), b/ \(1\)",
    ),
    # Lines of metadata.jsonl.
    "no JSON": (line('{"file_name": "1.png", "text": "a"}\n{oops\n'), "line 2 is not JSON"),
    "a number as name": (line('{"file_name": 5}'), "line 1: file_name is 5, not a string"),
    "an object as name": (line('{"file_name": {"a": 1}}'), "file_name is {'a': 1}, not a string"),
    "a list": (line("[1]"), "line 1 is not an object"),
    "null": (line("null"), "line 1 is not an object"),
    "a number as text": (row(text=5), "text is 5, not a string or a list"),
    "a number among texts": (row(text=["a", 5]), r"line 1: text is \['a', 5\], not a string or a list of strings"),
    "an undefined label": (row(label=float("nan")), "label is nan, neither"),
    **{
        f"weight {value}": (line(f'{{"file_name": "1.png", "weight": {value}}}'), f"weight is {shown}")
        for value, shown in {
            "NaN": "nan", "1" + "0" * 400: "1000", "Infinity": "inf", "1e308": r"1e\+308",
        }.items()
    },
    "NUL in a name": (line('{"file_name": "0\\u0000.png"}'), "names 1 file that cannot be found"),
    "half a character in a name": (line('{"file_name": "\\ud83c.png"}'), "names 1 file that cannot be found"),
    "a long name": (row(file_name="a" * 5000 + ".png"), "cannot be read: file name too long|not there"),
    # Text that nothing can store.
    "half a character": (line(HALF), r"line 1: text holds \\ud83c, half"),
    "half among texts": (
        line(HALF.replace('"a \\ud83c hat"', '["a", "\\udc00"]')), r"line 1: text holds \\udc00, half",
    ),
    "half in a label": (line(HALF.replace("text", "label")), r"line 1: label holds \\ud83c, half"),
    "NUL": (line(HALF.replace("ud83c", "u0000")), "line 1: text holds NUL"),
    "a text in UTF-16": (folder({"1.png": None, "1.txt": "a hat".encode("utf-16-le")}), "1.txt holds NUL"),
    "a text in no UTF-8": (folder({"1.png": None, "1.caption": b"\xff\xfea"}), "1.caption is not UTF-8"),
}  # fmt: skip
SHARDS: Rows = {
    "two images": (shard(png=b"", jpg=b""), "two members of one sample that mean the same: 0.png, 0.jpg"),
    "no image": (shard(txt=b"a"), "there are no images in"),
    "two captions": (shard(png=b"", txt=b"a", json=b'{"text": "b"}'), ".txt says 'a', .json something else"),
    "no JSON": (shard(png=b"", json=b"{"), "s.tar: 0.json is not JSON"),
    "half a character": (shard(png=b"", json=HALF.encode()), r"0.json: text holds \\ud83c, half"),
    "two classes": (
        shard(png=b"", cls=b"hat", json=b'{"label": "bag"}'),
        ".cls says 'hat', .json something else",
    ),
    "a list": (shard(png=b"", json=b"[1]"), "s.tar: 0.json is not an object"),
    "no UTF-8": (shard(png=b"", txt=b"\xff\xfe"), "s.tar: 0.txt is not UTF-8"),
    "no caption": (shard(png=b"", _1_png=b"", _1_txt=b"a"), "no caption for 1 of 2 images: s/0"),
    "compressed": (lambda path: written(path / "s.tar.gz", ""), "is compressed"),
    "columns": (shard(png=b""), "tar files have no columns", {"columns": {"text": "a"}}),
}
ARCHIVES: Rows = {
    "absent": (
        archive({"1.png": png(1), "metadata.csv": b"file_name,text\n9.png,a\n"}),
        "names 1 file that cannot be found: 9",
    ),
    "half a character": (
        archive({"1.png": png(0), "metadata.jsonl": HALF.encode()}), r"line 1: text holds \\ud83c, half",
    ),
    "a way out": (archive({"../1.png": png(1)}), r"names that lead out of it: \.\./1.png"),
    "twice": (twice, r"twice.zip holds 1.png twice"),
    **{
        f"twice, {name}": (archive({"a/1.png": png(1), name: png(2)}), r"z.zip holds a/1.png twice")
        for name in ("a/./1.png", "a//1.png", "a\\1.png")
    },
    "no zip": (lambda path: written(path / "bad.zip", b"PK no more"), r"bad.zip is not an intact zip file"),
}  # fmt: skip
TABLES: Rows = {
    "two columns of images": (csv("file_name,image", "1.png,1.png"), "has both an image and a file_name column"),
    "bytes and paths": (table(image=[png(1)], file_name=["1.png"]), "both an image and a file_name column"),
    "no column of images": (csv("imge,text", "1.png,a"), r"its columns: imge, text\n.*--columns image imge"),
    "another word": (
        csv("file_name,caption", "1.png,a"), r"no column text, but 'caption'\nRename .*--columns text caption$",
    ),
    "other words for all": (
        csv("path,caption", "1.png,a"),
        r"no column image or text, but 'path' and 'caption'\nRename them, .*--columns image path text caption$",
    ),
    "another word beside one that is given": (
        csv("path,caption", "1.png,a"), r"no column image, .*\n.*--columns text caption image path$",
        {"columns": {"text": "caption"}},
    ),
    "no such column": (
        csv("path,caption", "1.png,a"), r"no column 'pth' .*\nDid you mean 'path'", {"columns": {"file_name": "pth"}},
    ),
    "no such name of ours": (csv("path", "1.png"), "'img' is not one of image", {"columns": {"img": "path"}}),
    "two columns for one": (
        csv("text,caption", "1.png,a"), "both 'text' and 'caption'", {"columns": {"text": "caption"}},
    ),
    "absent": (csv("file_name,text", "2.png,a"), "names 1 file that cannot be found"),
    "one name twice": (csv("file_name,text", "1.png,a", "1.png,b"), "two images are named 1.png"),
    "more cells": (csv("file_name,text", "1.png,a,b"), "line 2 has more cells"),
    "one column twice": (csv("file_name,text,text", "1.png,a,b"), "two columns named 'text'"),
    "a negative weight": (csv("file_name,weight", "1.png,-1"), "line 2: weight is '-1'"),
    "an undefined weight": (csv("file_name,weight", "1.png,nan"), "line 2: weight is 'nan'"),
    "no rows": (csv("file_name,text"), "there are no rows"),
    "a row without an image": (csv("file_name,text", ",a"), "line 2 holds no image"),
    "a path outside": (csv("image,label", "../1.png,3"), r"t.csv, line 2: ../1.png leads out of the folder"),
    "UTF-16": (csv("image,text\n1.png,a".encode("utf-16-le")), "t.csv holds NUL"),
    "no parquet": (
        lambda path: written(path / "b.parquet", b"PAR1 no more"), "b.parquet is not an intact parquet file",
    ),
    "a parquet row without an image": (
        table(image=[png(1), png(2), None], text=["a", "b", "c"]), r"p.parquet, row 2 holds no image",
    ),
    "a struct without an image": (
        table(image=[{"bytes": png(1), "path": None}, None], text=["a", "b"]), r"p.parquet, row 1 holds no image",
    ),
    "columns of what is drawn": (lambda _: Path("shapes"), "'shapes' has no columns", {"columns": {"text": "a"}}),
    "parquet with half a character": (invalid_strings, "x.parquet cannot be read: .*(UTF8|utf-8)"),
    **{
        f"features {content!r}": (features(content), f"the metadata 'huggingface' of .*p.parquet.*{message}")
        for content, message in {
            "[]": r"hold \[\] where info should be",
            '{"info": 5}': "hold 5 where features should be",
            '{"info": {"features": [1]}}': r"features is \[1\], not an object",
            '{"info": {"features": {"label": {"names": 5}}}}': "the names of label are 5",
            '{"info": {"features": {"label": {"names": ["a", 5]}}}}': r"the names of label are \['a', 5\]",
            b"\xff": "is not UTF-8",
        }.items()
    },
    "a saved set without images": (
        lambda path: saved(path / "none", text=["a"]), r"not exactly one column of images; its columns: text \(Value\)",
    ),
    "parts of a saved set": (parts, r"holds the parts train, test\nGive one of them: .*/both/train"),
}  # fmt: skip
MIXES: Rows = {
    "none": (mix("sources: []"), "lists no sources"),
    "no YAML": (mix("sources: ["), "is not valid YAML"),
    "another key": (mix("sources: [{data: cats}]\nresolution: 64"), r"unknown key in .*mix.yaml 'resolution'"),
    "two conditions": (
        mix("sources: [{data: cats}, {data: hats}]"), r"different conditions: cats \(text\), hats \(class\)",
    ),
    "twice": (mix("sources: [{data: cats}, {data: cats}]"), "lists cats twice\nUse `repeats: 2`"),
    "no data": (mix("sources: [{repeats: 2}]"), "source 1 has no data"),
    "absent": (mix("sources: [{data: cots}]"), "there is no folder .*cots\nDid you mean .*cats"),
    "a mix": (mix("sources: [{data: mix.yaml}]"), "a list of lists"),
    "latents": (mix("sources: [{data: latents}]"), "mixes in latents"),
    "a mistyped key": (of_cats("repeat: 2"), "did you mean 'repeats'"),
    "nothing to learn": (of_cats("regularisation: true"), "nothing but regularisation"),
    "regularisation in words": (of_cats("regularisation: some"), "regularisation is 'some'\nWrite true or false"),
    **{
        f"repeats {value}": (of_cats(f"repeats: {value}"), r"mix\.yaml, source 1: repeats is .*\nGive a whole number")
        for value in ("1.5", "0", "true", "1" + "0" * 12)
    },
    **{
        f"weight {value}": (of_cats(f"weight: {value}"), r"mix\.yaml, source 1: weight is")
        for value in ("0", ".nan", ".inf", "1000001", "1" + "0" * 400)
    },
}  # fmt: skip
REFUSED = {
    f"{kind}: {name}": case
    for kind, rows in {
        "folder": FOLDERS, "shards": SHARDS, "zip": ARCHIVES, "table": TABLES, "mix": MIXES,
    }.items()
    for name, case in rows.items()
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", REFUSED)
def test_check_and_training_refuse_alike(case: str, tmp_path: Path) -> None:
    make, message, *settings = REFUSED[case]
    data, options = str(make(tmp_path)), settings[0] if settings else {}
    with pytest.raises(UserError, match=message) as refused:
        find_source(data, **options)
    assert len(str(refused.value)) <= 2 * LENGTH + 1
    report = check_source(data, **options)
    assert one_line(refused.value.what) in report.problems[0]
    assert report.verdict == "not ready to train: mend the problem first"


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("pyarrow.parquet", table(image=[png(0)])),
        ("pyarrow", lambda path: written(path / "latents.json", json.dumps(DESCRIPTION)).parent),
        ("datasets", lambda path: saved(path / "s", image=[{"bytes": png(0), "path": None}])),
    ],
)
def test_a_missing_library_is_named_with_its_requirement(
    package: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package.partition('.')[0]}>="):
        find_source(str(data))


# Through the command line.
ENDINGS: dict[str, tuple[Make, list[str], str]] = {
    "broken tar": (
        lambda path: written(path / "s.tar", shard(png=png(0))(path).read_bytes()[:600]), [],
        "s.tar is not an intact tar file",
    ),
    "tags of a class": (csv("file_name,label", "1.png,a"), ["--shuffle-tags", "4"], "has no captions"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_the_command_line_ends_in_one_screen(
    tmp_path: Path, name: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, flags, message = ENDINGS[name]
    arguments = [str(make(tmp_path)), *flags, "-o", str(tmp_path / "run")]
    main = load_program(repository / "train" / "flow.py").main
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(arguments))
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said and "Traceback" not in said and len(said.splitlines()) < 12
    assert not (tmp_path / "run" / "checkpoints").exists()
