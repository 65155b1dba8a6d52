"""The same images as a folder, zip, shards, table and saved data set: the same source; and what each refuses."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.cli import run
from latentflow.data import cached_pixels, find_source
from latentflow.data.pixels import read_image, read_own_mask
from latentflow.data.sources.annotations import class_name
from latentflow.data.sources.files import many_paths
from latentflow.data.sources.kinds import KINDS
from latentflow.errors import UserError

from .images import load_program, noise, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = {"a": "a red hat", "b": "a blue shoe", "c": "a bag"}


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise(seed).save(stream, "PNG")
    return stream.getvalue()


IMAGES = {name: png(seed) for seed, name in enumerate(CAPTIONS)}
MASK = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 2, (8, 8), dtype=np.uint8) * np.uint8(255)).save(
    MASK, "PNG"
)


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def saved(path: Path, **columns: Any) -> Path:
    import datasets

    images = [name for name in ("image", "img", "mask") if name in columns]
    rows = datasets.Dataset.from_dict(columns)
    for name in images:
        rows = rows.cast_column(name, datasets.Image())
    rows.save_to_disk(str(path))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    for name, content in IMAGES.items():
        (path / f"{name}.png").write_bytes(content)
    (path / "a-mask.png").write_bytes(MASK.getvalue())
    return path


def as_folder(path: Path) -> Path:
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in CAPTIONS.items()]
    write_jsonl(folder(path / "set") / "metadata.jsonl", rows)
    return path / "set"


def as_zip(path: Path) -> Path:
    rows = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in CAPTIONS.items()]
    members = {f"set/{name}.png": content for name, content in IMAGES.items()}
    members |= {"set/a-mask.png": MASK.getvalue(), "set/metadata.jsonl": "\n".join(rows).encode()}
    return zipped(path / "set.zip", members | {"__MACOSX/set/._a.png": b"no image"})


def as_shards(path: Path) -> Path:
    members = {f"{name}.png": content for name, content in IMAGES.items()}
    members |= {"a.mask.png": MASK.getvalue(), "a.json": b'{"text": "a red hat"}'}
    members |= {f"{name}.txt": text.encode() for name, text in CAPTIONS.items()}
    return tar(path / "set.tar", members)


def as_csv(path: Path) -> Path:
    folder(path / "set")
    lines = [
        "file_name,text,mask",
        "set/b.png,a blue shoe,",
        "set/a.png,a red hat,set/a-mask.png",
        "set/c.png,a bag,",
    ]
    (path / "set.csv").write_text("\n".join(lines))
    return path / "set.csv"


def as_parquet(path: Path) -> Path:
    masks = [MASK.getvalue(), None, None]
    return parquet(path / "s.parquet", image=list(IMAGES.values()), text=list(CAPTIONS.values()), mask=masks)


def as_saved(path: Path) -> Path:
    images = [{"bytes": content, "path": None} for content in IMAGES.values()]
    return saved(path / "saved", img=images, caption=list(CAPTIONS.values()), size=[1, 2, 3])


WAYS = {
    "folder": as_folder,
    "zip": as_zip,
    "shards": as_shards,
    "csv": as_csv,
    "parquet": as_parquet,
    "saved": as_saved,
}


@pytest.mark.parametrize("way", WAYS)
def test_one_set_in_every_kind_is_one_source(tmp_path: Path, way: str) -> None:
    source = find_source(str(WAYS[way](tmp_path)))
    assert source.kind == "text" and source.captions() == ["a red hat", "a blue shoe", "a bag"]
    for example, content in zip(source.examples, IMAGES.values(), strict=True):
        assert example.open().tobytes() == Image.open(io.BytesIO(content)).tobytes()
    (tmp_path / "same").mkdir()
    twin = find_source(str(as_folder(tmp_path / "same")))
    assert source.content_keys() == twin.content_keys()
    if way != "saved":  # which has no masks here
        mask = source.examples[0].open_mask()
        assert mask is not None and mask.tobytes() == Image.open(MASK).convert("L").tobytes()
        assert [example.mask is None for example in source.examples] == [False, True, True]
        assert source.fingerprint() == twin.fingerprint()
    assert pickle.loads(pickle.dumps(source.examples[1])).content_key() == source.examples[1].content_key()
    bare = find_source(source.name, condition="none", masks="none")
    assert bare.kind == "unconditional" and all(e.text is None and e.mask is None for e in bare.examples)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("folder", "csv", "saved")])
def test_what_changes_under_a_running_program_is_refused(tmp_path: Path, way: str) -> None:
    path = WAYS[way](tmp_path)
    source = find_source(str(path))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=f"{path.name} has changed since it was listed"):
        source.examples[2].open()


def test_every_kind_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        assert kind.meaning in page, kind.meaning


# --- shards -------------------------------------------------------------------------------------------


def test_names_of_many_files(tmp_path: Path) -> None:
    for number in (1, 9, 10, 11):
        (tmp_path / f"s-{number:03d}.tar").touch()
    named = [path.name for path in many_paths(f"{tmp_path}/s-{{009..011}}.tar")]
    assert named == ["s-009.tar", "s-010.tar", "s-011.tar"]
    assert [path.name for path in many_paths(f"{tmp_path}/s-0?1.tar")] == ["s-001.tar", "s-011.tar"]
    assert [path.name for path in many_paths(f"{tmp_path}/s-{{011,001}}.tar")] == ["s-011.tar", "s-001.tar"]
    (tmp_path / "odd[1].tar").touch()
    assert len(many_paths(f"{tmp_path}/odd[1].tar")) == 1
    with pytest.raises(UserError, match=r"2 of the 4 files .* not there: .*s-007.tar, .*s-008.tar"):
        many_paths(f"{tmp_path}/s-{{007..010}}.tar")
    with pytest.raises(UserError, match="no file is named like"):
        many_paths(f"{tmp_path}/t*.tar")


def test_several_shards_may_use_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    for number in range(3):
        tar(tmp_path / "w" / f"s-{number}.tar", {"./0.png": png(number), "./0.cls": str(9 + number).encode()})
    for data in (tmp_path / "w", f"{tmp_path}/w/s-{{0..2}}.tar", f"{tmp_path}/w/*.tar"):
        source = find_source(str(data))
        assert [example.name for example in source.examples] == ["s-0/0", "s-1/0", "s-2/0"]
        assert source.classes == ("9", "10", "11") and source.class_ids() == [
            0,
            1,
            2,
        ]  # numbers in their order
    assert len(set(source.content_keys())) == 3


def test_json_members(tmp_path: Path) -> None:
    rows = {
        "0": {"caption": "as downloaders write"},
        "1": {"text": ["one", "two"], "weight": 0.5},
        "2": {"text": "three", "label": "hat"},
    }
    members = {f"{key}.json": json.dumps(row).encode() for key, row in rows.items()}
    members |= {f"{key}.jpg": png(int(key)) for key in rows} | {
        "1.txt": b"two",
        "2.cls": b"4",
        "2.seg.png": b"x",
    }
    source = find_source(str(tar(tmp_path / "s.tar", members)))
    assert source.all_captions() == [("as downloaders write",), ("one", "two"), ("three",)]
    assert source.examples[1].weight == 0.5 and source.examples[2].label == "hat"
    assert any("not read: .seg.png (1)" in note for note in source.notes)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.png": b"", "0.jpg": b""}, "two members of one sample that mean the same: 0.png, 0.jpg"),
        ({"0.txt": b"a"}, "there are no images in"),
        ({"0.png": b"", "0.txt": b"a", "0.json": b'{"text": "b"}'}, ".txt says 'a', .json something else"),
        ({"0.png": b"", "0.json": b"{"}, "s.tar: 0.json is not JSON"),
        ({"0.png": b"", "0.txt": b"\xff\xfe"}, "s.tar: 0.txt is not UTF-8"),
        ({"0.png": b"", "1.png": b"", "1.txt": b"a"}, "1 of 2 images have no caption: s/0"),
    ],
)
def test_shards_that_cannot_be_meant(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_source(str(tar(tmp_path / "s.tar", members)))


def test_a_sample_without_an_image_is_told(tmp_path: Path) -> None:
    source = find_source(str(tar(tmp_path / "s.tar", {"0.png": png(0), "0.txt": b"a", "1.txt": b"b"})))
    assert len(source) == 1
    assert any("1 samples have no image and are left out: s/1" in note for note in source.notes)


def test_links_in_a_tar_file_are_told(tmp_path: Path) -> None:
    """`tar` writes the second of two hard links as a link to the first."""
    path = tar(tmp_path / "s.tar", {"0.png": png(0)})
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.LNKTYPE, "0.png"
        file.addfile(info)
    source = find_source(str(path))
    assert len(source) == 1 and any("not read: .png, a link (1)" in note for note in source.notes)


def test_broken_tar_files(tmp_path: Path) -> None:
    whole = tar(tmp_path / "s.tar", {f"{n}.png": png(n) for n in range(4)}).read_bytes()
    offset = 512 + len(png(0)) + -len(png(0)) % 512  # of the second header
    for name, content in {
        "cut in an image": whole[: offset + 600],
        "cut in a header": whole[: offset + 100],
        "damaged header": whole[:offset] + b"\x07" * 512 + whole[offset + 512 :],
        "no tar at all": b"hello" * 1000,
        "joined to another": whole + whole,
        "empty": b"",
    }.items():
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"s.tar is no intact tar file|there are no images"):
            print(name, len(find_source(str(tmp_path / "s.tar"))))
    (tmp_path / "s.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed"):
        find_source(str(tmp_path / "s.tar.gz"))


# --- zip ----------------------------------------------------------------------------------------------


def test_a_zip_follows_the_rules_of_a_folder(tmp_path: Path) -> None:
    classes = zipped(tmp_path / "c.zip", {"hat/1.png": png(1), "shoe/2.png": png(2)}, zipfile.ZIP_STORED)
    assert find_source(str(classes)).classes == ("hat", "shoe")
    windows = zipped(tmp_path / "w.zip", {"set\\hat\\1.png": png(1), "set\\shoe\\2.png": png(2)})
    assert find_source(str(windows)).classes == ("hat", "shoe")
    sidecars = zipped(tmp_path / "t.zip", {"1.png": png(1), "1.txt": b"one"})
    assert find_source(str(sidecars)).captions() == ["one"]
    with pytest.raises(UserError, match="names 1 files that are not there: 9"):
        find_source(
            str(zipped(tmp_path / "m.zip", {"1.png": png(1), "metadata.csv": b"file_name,text\n9.png,a\n"}))
        )


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names that lead out of it: \.\./1.png"):
        find_source(str(zipped(tmp_path / "slip.zip", {"../1.png": png(1)})))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.writestr("1.png", png(1))
        file.writestr("1.png", png(2))
    with pytest.raises(UserError, match=r"twice.zip holds 1.png twice"):
        find_source(str(tmp_path / "twice.zip"))
    for name in ("a/./1.png", "a//1.png", "a\\1.png"):
        with pytest.raises(UserError, match=r"same.zip holds a/1.png twice"):
            find_source(str(zipped(tmp_path / "same.zip", {"a/1.png": png(1), name: png(2)})))
    (tmp_path / "bad.zip").write_bytes(b"PK no more")
    with pytest.raises(UserError, match=r"bad.zip is no intact zip file"):
        find_source(str(tmp_path / "bad.zip"))
    content = zipped(tmp_path / "bit.zip", {"1.png": png(1)}, zipfile.ZIP_STORED).read_bytes()
    (tmp_path / "bit.zip").write_bytes(content[:80] + bytes([content[80] ^ 1]) + content[81:])
    with pytest.raises(UserError, match=r"bit.zip: 1.png cannot be read: Bad CRC"):
        find_source(str(tmp_path / "bit.zip")).examples[0].content_key()


# --- tables -------------------------------------------------------------------------------------------


def csv(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return str(tmp_path / "t.csv")


def test_absolute_paths_may_lead_out_of_the_folder_and_are_told(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "table/t.csv").write_text(f"image,label\n{tmp_path}/1.png,3\n")
    source = find_source(str(tmp_path / "table/t.csv"))
    assert source.classes == ("3",) and source.examples[0].open().size == (8, 8)
    assert any("1 files lie outside" in note for note in source.notes)
    (tmp_path / "table/t.csv").write_text("image,label\n../1.png,3\n")
    with pytest.raises(UserError, match=r"t.csv, line 2: ../1.png leads out of the folder"):
        find_source(str(tmp_path / "table/t.csv"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file_name,image", "1.png,1.png"], "has both an image and a file_name column"),
        (["imge,text", "1.png,a"], r"its columns: imge, text\n.*--columns image imge"),
        (
            ["file_name,caption", "1.png,a"],
            r"but 'caption'\nRename it to 'text', or add --columns text caption",
        ),
        (["file_name,text", "2.png,a"], "names 1 files that are not there"),
        (["file_name,text", "1.png,a", "1.png,b"], "two images are named 1.png"),
        (["file_name,text", "1.png,a,b"], "line 2 has more cells"),
        (["file_name,text,text", "1.png,a,b"], "two columns named 'text'"),
        (["file_name,weight", "1.png,-1"], "line 2: weight is '-1'"),
        (["file_name,weight", "1.png,nan"], "line 2: weight is 'nan'"),
        (["file_name,text"], "there are no rows"),
        (["file_name,text", ",a"], "line 2 holds no image"),
    ],
)
def test_tables_that_cannot_be_meant(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_source(csv(tmp_path, *lines))


def test_columns_called_otherwise(tmp_path: Path) -> None:
    data = csv(tmp_path, "path,caption,text_fr", "1.png,a hat,un chapeau")
    source = find_source(data, columns={"file_name": "path", "text": "caption"})
    assert source.captions() == ["a hat"]
    with pytest.raises(UserError, match=r"no column 'pth' .*\nDid you mean 'path'"):
        find_source(data, columns={"file_name": "pth"})
    with pytest.raises(UserError, match="'img' is none of image"):
        find_source(data, columns={"img": "path"})


def test_parquet_with_paths_class_names_and_parts(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    paths = parquet(tmp_path / "p.parquet", file_name=["1.png"], text=[["one", "a one"]], weight=[2.0])
    source = find_source(str(paths))
    assert source.all_captions() == [("one", "a one")] and source.examples[0].weight == 2
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["hat", "bag"])}
    )
    rows = {
        "image": [{"bytes": content, "path": "x.png"} for content in IMAGES.values()],
        "label": [1, 0, 1],
    }
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "hub/data/train-0.parquet"))
    named = find_source(str(tmp_path / "hub"))
    assert named.classes == ("bag", "hat") and named.class_ids() == [0, 1, 0]
    (tmp_path / "hub/data/test-0.parquet").write_bytes((tmp_path / "hub/data/train-0.parquet").read_bytes())
    with pytest.raises(
        UserError, match=r"the parts test, train of one data set\nGive one of them: .*data/train\*.parquet"
    ):
        find_source(str(tmp_path / "hub"))
    assert len(find_source(f"{tmp_path}/hub/data/train*.parquet")) == 3
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"bad.parquet is no intact parquet file"):
        find_source(str(tmp_path / "bad.parquet"))


def test_listing_a_parquet_file_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    data, read = str(as_parquet(tmp_path)), pyarrow.parquet.ParquetFile.read_row_group
    asked: list[str] = []

    def spy(file: Any, group: int, columns: list[str]) -> Any:
        asked.extend(columns)
        return read(file, group, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", spy)
    source = find_source(data)
    assert "text" in asked and "image" not in asked  # masks are looked at: some rows have none
    source.examples[0].open()
    assert "image" in asked


def test_a_parquet_file_is_cached_from_front_to_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of rows is read as a whole: in any other order once for each image."""
    from latentflow.data.sources import table

    source = find_source(str(parquet(tmp_path / "p.parquet", image=[png(seed) for seed in range(24)])))
    source.content_keys()
    groups: list[int] = []
    whole = table._column.__wrapped__
    spied = functools.lru_cache(maxsize=2)(lambda *key: (groups.append(key[1]), whole(*key))[1])
    monkeypatch.setattr(table, "_column", spied)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads, which may overtake one another
    cached_pixels(source, 8, progress=False)
    assert groups == list(range(12))


def test_an_image_in_an_archive_is_named_in_errors(tmp_path: Path) -> None:
    """Not read as itself, nor as what a mask is registered with."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cut.png", png(0)[:60])
        archive.writestr("cut-mask.png", MASK.getvalue())
    (example,) = find_source(str(tmp_path / "a.zip")).examples
    for read in (read_image, read_own_mask):
        with pytest.raises(UserError, match=r"a\.zip: cut\.png cannot be read"):
            read(example, 8)


def test_numbers_of_classes_that_stand_for_no_name(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["hat", "bag"])}
    )
    rows = {"image": [{"bytes": one, "path": None} for one in IMAGES.values()], "label": [1, -1, 0]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "p.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for data in (tmp_path / "p.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match="1 of 3 images have no class: row 00000001"):
            find_source(str(data))  # -1 is "not known", not the last one
        assert find_source(str(data), missing_caption="skip").class_ids() == [0, 1]
    with pytest.raises(UserError, match="row 5: label is 7, of 2 classes"):
        class_name(["hat", "bag"], 7, "row 5")


def test_a_parquet_row_without_an_image(tmp_path: Path) -> None:
    data = parquet(tmp_path / "p.parquet", image=[png(1), png(2), None], text=["a", "b", "c"])
    with pytest.raises(UserError, match=r"p.parquet, row 2 holds no image"):
        find_source(str(data))


# --- datasets -----------------------------------------------------------------------------------------


def test_columns_of_a_saved_set_are_inferred_or_listed(tmp_path: Path) -> None:
    source = find_source(str(as_saved(tmp_path)))
    assert any("image from 'img', text from 'caption'" in note for note in source.notes)
    assert any("columns not used: size" in note for note in source.notes)
    images = [{"bytes": png(1), "path": None}]
    two = saved(tmp_path / "two", image=images, mask=images, text=["a"])
    assert find_source(str(two)).examples[0].mask is not None
    none = saved(tmp_path / "none", text=["a"])
    with pytest.raises(UserError, match=r"no one column of images; its columns: text \(Value\)"):
        find_source(str(none))


def test_parts_of_a_saved_set(tmp_path: Path) -> None:
    import datasets

    rows = datasets.load_from_disk(str(as_saved(tmp_path)))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(
        UserError, match=rf"holds the parts train, test\nGive one of them: {tmp_path}/both/train"
    ):
        find_source(str(tmp_path / "both"))
    assert len(find_source(str(tmp_path / "both/train"))) == 3


def test_the_hub_is_asked_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []
    rows = datasets.load_from_disk(str(as_saved(tmp_path)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    assert len(find_source("hub:owner/name")) == 3 and len(find_source("hub:owner/name:test")) == 3
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(UserError, match="Write hub:owner/name"):
        find_source("hub:name")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"hub:owner/name cannot be loaded"):
        find_source("hub:owner/name")  # the tests are offline


# --- through the command line -------------------------------------------------------------------------


def broken_tar(path: Path) -> list[str]:
    (path / "s.tar").write_bytes(as_shards(path).read_bytes()[:900])
    return [str(path / "s.tar")]


BAD = {
    "broken tar": (broken_tar, "s.tar is no intact tar file"),
    "no such shard": (lambda path: [f"{path}/s-{{0..3}}.tar"], "4 of the 4 files"),
    "no image": (lambda path: [str(tar(path / "s.tar", {"1.txt": b"a"}))], "there are no images"),
    "unknown column": (lambda path: [csv(path, "imge", "1.png")], "its columns: imge"),
    "bytes and paths": (
        lambda path: [str(parquet(path / "p.parquet", image=[png(1)], file_name=["1.png"]))],
        "both an image and a file_name column",
    ),
    "two of one name": (
        lambda path: [csv(path, "file_name", "1.png", "1.png")],
        "two images are named 1.png",
    ),
    "zip-slip": (lambda path: [str(zipped(path / "z.zip", {"../1.png": png(1)}))], "lead out of it"),
    "path outside": (lambda path: [csv(path, "file_name", "../1.png")], "leads out of the folder"),
    "no such column": (
        lambda path: [csv(path, "file_name", "1.png"), "--columns", "text", "b"],
        "no column 'b'",
    ),
    "no such set": (lambda path: ["hub:no-owner/no-name"], "cannot be loaded"),
    "tags of a class": (
        lambda path: [csv(path, "file_name,label", "1.png,a"), "--shuffle-tags", "4"],
        "has no captions",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_command_line_ends_in_one_screen(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[name]
    arguments = make(tmp_path)
    main = load_program(ROOT / "train" / "flow.py").main
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main([*arguments, "-o", str(tmp_path / "run")]))
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said and "Traceback" not in said and len(said.splitlines()) < 12
    assert not (tmp_path / "run" / "checkpoints").exists()
