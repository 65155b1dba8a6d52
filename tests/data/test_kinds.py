"""The same images as a folder, zip, shards, table and saved data set: the same source; and what each refuses."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.data import cached_pixels, find_source
from latentflow.data.dataset import read_image, read_own_mask
from latentflow.data.sources.annotations import class_name
from latentflow.data.sources.files import many_paths
from latentflow.data.sources.kinds import KINDS
from latentflow.errors import UserError

from .images import encoded, folder_of, jsonl, parquet, png, saved, tar, written, zipped

CAPTIONS = {"a": "a red hat", "b": "a blue shoe", "c": "a bag"}
IMAGES = {name: png(seed) for seed, name in enumerate(CAPTIONS)}
PNGS = {f"{name}.png": content for name, content in IMAGES.items()}
HELD = [{"bytes": content, "path": None} for content in IMAGES.values()]
LISTED = jsonl(*({"file_name": f"{name}.png", "text": text} for name, text in CAPTIONS.items()))
MASK = encoded(
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (8, 8), dtype=np.uint8) * np.uint8(255))
)


def as_folder(path: Path) -> Path:
    return folder_of(path / "set", PNGS | {"a-mask.png": MASK, "metadata.jsonl": LISTED})


def as_zip(path: Path) -> Path:
    members = {f"set/{name}": content for name, content in PNGS.items()}
    members |= {"set/a-mask.png": MASK, "set/metadata.jsonl": LISTED.encode()}
    return zipped(path / "set.zip", members | {"__MACOSX/set/._a.png": b"no image"})


def as_shards(path: Path) -> Path:
    texts = {f"{name}.txt": text.encode() for name, text in CAPTIONS.items()}
    return tar(
        path / "set.tar",
        PNGS | {"a.mask.png": MASK, "a.json": b'{"text": "a red hat"}', "._a.png": b""} | texts,
    )


def as_csv(path: Path) -> Path:
    folder_of(path / "set", PNGS | {"a-mask.png": MASK})
    rows = ["set/b.png,a blue shoe,", "set/a.png,a red hat,set/a-mask.png", "set/c.png,a bag,"]
    return written(path / "set.csv", "\n".join(["file_name,text,mask", *rows]))


def as_parquet(path: Path) -> Path:
    masks = [MASK, None, None]
    return parquet(path / "s.parquet", image=list(IMAGES.values()), text=list(CAPTIONS.values()), mask=masks)


def as_saved(path: Path) -> Path:
    return saved(path / "saved", img=HELD, caption=list(CAPTIONS.values()), size=[1, 2, 3])


WAYS = {
    "folder": as_folder, "zip": as_zip, "shards": as_shards, "csv": as_csv, "parquet": as_parquet, "saved": as_saved,
}  # fmt: skip


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
        assert mask is not None and mask.tobytes() == Image.open(io.BytesIO(MASK)).convert("L").tobytes()
        assert [example.mask is None for example in source.examples] == [False, True, True]
        assert source.fingerprint() == twin.fingerprint()
    assert pickle.loads(pickle.dumps(source.examples[1])).content_key() == source.examples[1].content_key()
    bare = find_source(source.name, condition="none", masks="none")
    assert bare.kind == "unconditional" and all(e.text is None and e.mask is None for e in bare.examples)


@pytest.mark.parametrize("way", ["zip", "shards", "parquet"])
def test_what_changes_or_vanishes_under_a_running_program_is_refused(tmp_path: Path, way: str) -> None:
    path = WAYS[way](tmp_path)
    source = find_source(str(path))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=f"{path.name} has changed since it was listed"):
        source.examples[2].open()
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} cannot be read"):
        source.content_keys()


def test_every_kind_is_in_the_documentation(repository: Path) -> None:
    page = (repository / "docs" / "reference" / "data.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        assert kind.meaning in page, kind.meaning


# --- shards -------------------------------------------------------------------------------------------


def test_names_of_many_files(tmp_path: Path) -> None:
    for number in (1, 9, 10, 11):
        (tmp_path / f"s-{number:03d}.tar").touch()
    for pattern, numbers in {"{009..011}": (9, 10, 11), "0?1": (1, 11), "{011,001}": (11, 1)}.items():
        found = many_paths(f"{tmp_path}/s-{pattern}.tar")
        assert [path.name for path in found] == [f"s-{number:03d}.tar" for number in numbers]
    (tmp_path / "odd[1].tar").touch()
    assert len(many_paths(f"{tmp_path}/odd[1].tar")) == 1
    for pattern, message in {
        "s-{007..010}": r"2 of the 4 files .* do not exist: .*s-007.tar, .*s-008.tar",
        "t*": "no file is named like",
        "s-{9..1}": "counts down",
        "s-{a}": "is not a range",
    }.items():
        with pytest.raises(UserError, match=message):
            many_paths(f"{tmp_path}/{pattern}.tar")


def test_several_shards_may_use_the_same_keys(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    for number in range(3):
        tar(tmp_path / "w" / f"s-{number}.tar", {"./0.png": png(number), "./0.cls": str(9 + number).encode()})
    for data in (tmp_path / "w", f"{tmp_path}/w/s-{{0..2}}.tar", f"{tmp_path}/w/*.tar"):
        source = find_source(str(data))
        assert [example.name for example in source.examples] == ["s-0/0", "s-1/0", "s-2/0"]
        assert source.classes == ("9", "10", "11")  # numbers in their order
        assert source.class_ids() == [0, 1, 2]
    assert len(set(source.content_keys())) == 3


def test_json_members_links_and_samples_without_an_image(tmp_path: Path) -> None:
    rows = {
        "0": {"caption": "as downloaders write"},
        "1": {"text": ["one", "two"], "weight": 0.5},
        "2": {"text": "three", "label": "hat"},
    }
    members = {f"{key}.json": json.dumps(row).encode() for key, row in rows.items()}
    members |= {f"{key}.jpg": png(int(key)) for key in rows}
    members |= {"1.txt": b"two", "2.cls": b"4", "2.seg.png": b"x", "7.txt": b"b"}
    path = tar(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as file:  # `tar` writes the second of two hard links as a link to the first
        info = tarfile.TarInfo("8.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "0.jpg"
        file.addfile(info)
    source = find_source(str(path))
    assert source.all_captions() == [("as downloaders write",), ("one", "two"), ("three",)]
    assert source.examples[1].weight == 0.5 and source.examples[2].label == "hat"
    assert any("1 sample without an image, left out: s/7" in note for note in source.notes)
    (unread,) = [note for note in source.notes if "not read" in note]
    assert ".seg.png (1)" in unread and ".jpg, a link (1)" in unread


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
        with pytest.raises(UserError, match=r"s.tar is not an intact tar file|there are no images"):
            print(name, len(find_source(str(tmp_path / "s.tar"))))


# --- zip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_follows_the_rules_of_a_folder(tmp_path: Path, compression: int) -> None:
    for form in ("{}/{}.png", "set\\{}\\{}.png"):  # as some programs write it on Windows
        members = {form.format(name, number): png(number) for number, name in enumerate(("hat", "shoe"))}
        assert find_source(str(zipped(tmp_path / "c.zip", members, compression))).classes == ("hat", "shoe")


def test_an_image_in_an_archive_is_named_in_errors(tmp_path: Path) -> None:
    """Not read as itself, nor as what a mask is registered with."""
    (example,) = find_source(
        str(zipped(tmp_path / "a.zip", {"cut.png": png(0)[:60], "cut-mask.png": MASK}))
    ).examples
    for read in (read_image, read_own_mask):
        with pytest.raises(UserError, match=r"a\.zip: cut\.png cannot be read"):
            read(example, 8)


# --- tables -------------------------------------------------------------------------------------------


def test_absolute_paths_may_lead_out_of_the_folder_and_are_counted(tmp_path: Path) -> None:
    written(tmp_path / "1.png", png(1))
    table = written(tmp_path / "table/t.csv", f"image,label,tags\n{tmp_path}/1.png,3,x\n")
    source = find_source(str(table))
    assert source.classes == ("3",) and source.examples[0].open().size == (8, 8)
    assert any("1 file outside" in note for note in source.notes)
    assert "columns not used: tags" in source.notes


def test_columns_called_otherwise(tmp_path: Path) -> None:
    folder_of(tmp_path, {"1.png": None, "t.csv": "path,caption,text_fr\n1.png,a hat,un chapeau"})
    source = find_source(str(tmp_path / "t.csv"), columns={"file_name": "path", "text": "caption"})
    assert source.captions() == ["a hat"]


CLASSED = {"red_hat/1.png": None, "shoe/2.png": None, "shoe/3.png": None}


@pytest.mark.parametrize(
    "make",
    [
        lambda path: folder_of(path / "set", CLASSED),
        lambda path: zipped(path / "set.zip", {name: png(seed) for seed, name in enumerate(CLASSED)}),
        lambda path: folder_of(
            path / "set",
            {Path(name).name: None for name in CLASSED}
            | {
                "metadata.jsonl": jsonl(
                    *({"file_name": Path(n).name, "label": Path(n).parts[0]} for n in CLASSED)
                )
            },
        ),
    ],
    ids=["folder", "zip", "metadata"],
)
def test_class_names_are_captions_where_captions_are_asked_for(make, tmp_path: Path) -> None:
    path = str(make(tmp_path))
    assert find_source(path).kind == "class"
    source = find_source(path, condition="text")
    assert (source.kind, source.classes) == ("text", ())
    assert [example.text for example in source.examples] == ["red hat", "shoe", "shoe"]
    assert "captions: the names of the classes" in source.notes[0]


def with_class_names(*labels: int) -> Any:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["hat", "bag"])}
    )
    return datasets.Dataset.from_dict({"image": HELD, "label": list(labels)}, features=features)


def test_parquet_with_paths_class_names_and_parts(tmp_path: Path) -> None:
    written(tmp_path / "1.png", png(1))
    paths = parquet(tmp_path / "p.parquet", file_name=["1.png"], text=[["one", "a one"]], weight=[2.0])
    source = find_source(str(paths))
    assert source.all_captions() == [("one", "a one")] and source.examples[0].weight == 2
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    with_class_names(1, 0, 1).to_parquet(str(hub / "train-0.parquet"))
    parquet(tmp_path / "p-2.parquet", image=[png(2)], text=["two"])
    several = find_source(f"{tmp_path}/p*.parquet")
    assert [example.name for example in several.examples] == ["p-2/row 00000000", "p/1.png"]
    named = find_source(str(tmp_path / "hub"))
    assert named.classes == ("bag", "hat") and named.class_ids() == [0, 1, 0]
    written(hub / "test-0.parquet", (hub / "train-0.parquet").read_bytes())
    message = r"the parts test, train of one data set\nGive one of them: .*data/train\*.parquet"
    with pytest.raises(UserError, match=message):
        find_source(str(tmp_path / "hub"))
    assert len(find_source(f"{hub}/train*.parquet")) == 3


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
    whole = table._read_column.__wrapped__
    spied = functools.lru_cache(maxsize=2)(lambda *key: (groups.append(key[1]), whole(*key))[1])
    monkeypatch.setattr(table, "_read_column", spied)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads, which may overtake one another
    cached_pixels(source, 8)
    assert groups == list(range(12))


def test_numbers_of_classes_that_stand_for_no_name(tmp_path: Path) -> None:
    rows = with_class_names(1, -1, 0)
    rows.to_parquet(str(tmp_path / "p.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for data in (tmp_path / "p.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match="no class for 1 of 3 images: row 00000001"):
            find_source(str(data))  # -1 is "not known", not the last one
        assert find_source(str(data), missing_caption="skip").class_ids() == [0, 1]
        assert find_source(str(data), missing_caption="empty").class_ids() == [0, -1, 1]
    with pytest.raises(UserError, match="row 5: label is 7, of 2 classes"):
        class_name(["hat", "bag"], 7, "row 5")


# --- datasets -----------------------------------------------------------------------------------------


def test_columns_of_a_saved_set_are_inferred_or_listed(tmp_path: Path) -> None:
    import datasets

    source = find_source(str(as_saved(tmp_path)))
    assert any("image from 'img', text from 'caption'" in note for note in source.notes)
    assert any("columns not used: size" in note for note in source.notes)
    datasets.DatasetDict({"all": datasets.load_from_disk(source.name)}).save_to_disk(
        str(tmp_path / "one-part")
    )
    assert len(find_source(str(tmp_path / "one-part"))) == 3
    two = saved(tmp_path / "two", image=HELD[:1], mask=HELD[:1], text=["a"])
    assert find_source(str(two)).examples[0].mask is not None
    both = saved(tmp_path / "both", image=HELD[:1], caption=["a"], Caption=["A"])
    assert find_source(str(both)).captions() == ["a"]


def test_control_images_of_the_hub_are_no_masks(tmp_path: Path) -> None:
    """ControlNet's column is read as what was asked for; asked for nothing, a note says what it may be."""
    columns = {
        "image": HELD[:1],
        "conditioning_image": HELD[1:2],
        "segmentation_mask": HELD[2:3],
        "text": ["a"],
    }
    data = str(saved(tmp_path / "led", **columns))
    source = find_source(data)
    assert not source.has_masks and not source.examples[0].control_kinds
    note = (
        "conditioning_image: --control image draws by it; if it is a mask: --columns mask conditioning_image"
    )
    assert note in source.notes
    [example] = find_source(data, columns={"mask": "conditioning_image"}).examples
    assert example.mask is not None and not example.control_kinds
    for kinds in (("image",), ("labels",), ("image", "labels")):
        source = find_source(data, control=kinds)
        assert source.examples[0].control_kinds == kinds and not source.has_masks
        assert ("image" in kinds) == (note not in source.notes)
    own = find_source(str(saved(tmp_path / "own", control=HELD[2:3], **columns)), control="image")
    assert own.examples[0].control_key("image") == source.examples[0].control_key(
        "labels"
    )  # our name comes first


def test_the_hub_is_asked_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []
    rows = datasets.load_from_disk(str(as_saved(tmp_path)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    assert len(find_source("hub:owner/name")) == 3 and len(find_source("hub:owner/name:test")) == 3
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(UserError, match="Write hub:owner/name"):
        find_source("hub:name")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows.select([]))
    with pytest.raises(UserError, match="there are no rows in hub:owner/name"):
        find_source("hub:owner/name")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"hub:owner/name cannot be loaded"):
        find_source("hub:owner/name")  # the tests are offline
