"""Data that are damaged or made to do harm: one sentence with file and reason, and no memory taken."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentflow import cli
from latentflow.cli import parse
from latentflow.config import DataConfig
from latentflow.data import find_source
from latentflow.data.sources import annotations as metadata
from latentflow.data.sources import files, kinds, latent_folder, records, table
from latentflow.data.sources import folder as folder_source
from latentflow.data.sources import hugging_face as saved_sets
from latentflow.data.sources import webdataset as shards
from latentflow.data.sources import zip_file as archives
from latentflow.errors import LENGTH, UserError, few, one_line, shown
from latentflow.training import log_to
from latentflow.training.report.folder import read_run
from latentflow.utils import files as documents
from latentflow.utils.files import read_prompts

from .images import folder_of, parquet, png, saved, tar, written, zipped
from .test_fuzzing import FEATURES, described, latents

DEEP = '{"a":' * 3000


def with_image(folder: Path, name: str, content: str | bytes) -> Path:
    return folder_of(folder, {"0.png": None, name: content})


def in_shard(folder: Path, name: str, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    return tar(folder / "s.tar", {"0.png": png(0), name: content})


def in_latents(folder: Path, content: str | bytes) -> Path:
    latents(folder)
    written(folder / "latents.json", content)
    return folder


def in_parquet(folder: Path, content: str | bytes) -> Path:
    return parquet(folder / "x.parquet", {"huggingface": content}, image=[png(0)], label=[1])


def read(data: Path) -> None:
    find_source(str(data))


def read_config(file: Path) -> None:
    parse(DataConfig, ["cats", "--config", str(file)], prog="latentflow train")


# Every document of strangers: what reads it, and how a message names it.
DOCUMENTS: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "metadata.jsonl": (
        lambda folder, text: read(with_image(folder, "metadata.jsonl", text)),
        "metadata.jsonl, line 1",
    ),
    "member": (lambda folder, text: read(in_shard(folder, "0.json", text)), "s.tar: 0.json"),
    "latents": (lambda folder, text: read(in_latents(folder, text)), "latents.json"),
    "parquet": (
        lambda folder, text: read(in_parquet(folder, text)),
        "the metadata 'huggingface' of .*x.parquet",
    ),
    "mix": (lambda folder, text: read(written(folder / "mix.yaml", text)), "mix.yaml"),
    "config": (lambda folder, text: read_config(written(folder / "config.yaml", text)), "config.yaml"),
    "run": (
        lambda folder, text: read_run(written(folder / "config.yaml", text).parent) and None,
        "config.yaml",
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DEEP, "is nested too deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "is nested more than 64 deep"),
        (f'{{"weight": {"9" * 5000}}}', r"is not (JSON|valid YAML): it holds a number of more than 4,300 digits"),
        ('{"text": "a", "text": "b"}', ": 'text' is there twice"),
        ('{"text": ', r"is not (JSON|valid YAML): "),
        ("&a [*a]", r"is nested more than 64 deep|is not JSON"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"b{n}: &b{n} [{', '.join(['*a' if not n else f'*b{n - 1}'] * 8)}]\n" for n in range(9)
        ), r"holds more than 1,000,000 values|is not JSON"),
        ("a: !!timestamp x", r"is not (JSON|valid YAML): "),
    ],
    ids=["deep", "nested", "number", "twice", "cut", "cycle", "bomb", "constructor"],
)  # fmt: skip
def test_a_document_that_cannot_be_read_is_one_sentence(
    name: str, text: str, told: str, tmp_path: Path
) -> None:
    reader, named = DOCUMENTS[name]
    with pytest.raises(UserError, match=f"{named}:? ?({told})"):
        reader(tmp_path, text)


def test_documents_say_what_they_said(tmp_path: Path) -> None:
    mark = "\ufeff"
    assert documents.parse_json('{"a": [1, NaN]}', "x")["a"][0] == 1
    assert documents.parse_yaml("a: &a {k: 1}\nb: {<<: *a, k: 2}", "x") == {"a": {"k": 1}, "b": {"k": 2}}
    assert documents.parse_yaml("", "x") is None
    assert documents.read_json(written(tmp_path / "a", f'{mark}{{"a": "ü"}}')) == {"a": "ü"}
    assert documents.read_yaml(written(tmp_path / "a", f"{mark}a: ü")) == {"a": "ü"}
    with pytest.raises(UserError, match=r"b cannot be read: .*No such file"):
        documents.read_json(tmp_path / "b")
    assert (
        parse(
            DataConfig, ["cats", "--config", str(written(tmp_path / "c", f"{mark}masks: none"))], prog="x"
        ).masks
        == "none"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"a\xff", "is not UTF-8"), ("a hat".encode("utf-16-le"), "holds NUL"), (None, "No such file")],
)
def test_a_file_of_prompts_is_read_as_other_text(content: bytes | None, told: str, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_bytes("\ufeffa hat\n\n ü \n".encode())
    assert read_prompts(str(prompts), "--prior-prompts") == ["a hat", "ü"]
    prompts.unlink()
    if content is not None:
        prompts.write_bytes(content)
    with pytest.raises(UserError, match=f"--prior-prompts .*p.txt .*{told}"):
        read_prompts(str(prompts), "--prior-prompts")


def test_a_cell_longer_than_csv_reads_and_a_label_of_many_digits(tmp_path: Path) -> None:
    with_image(tmp_path, "metadata.csv", f"file_name,text\n0.png,{'a' * 200_000}\n")
    with pytest.raises(
        UserError, match=r"metadata\.csv, line 2 cannot be read: field larger than field limit"
    ):
        find_source(str(tmp_path))
    digits = "7" * 5000
    written(tmp_path / "metadata.csv", f"file_name,label\n0.png,{digits}\n")
    assert find_source(str(tmp_path)).classes == (digits,)


# ---- parquet, saved sets, folders of latents ----


@pytest.mark.parametrize("content", ["{}", "null", '{"info": null}', '{"info": {"features": {"label": {}}}}'])
def test_metadata_without_names_leave_numbers(content: str, tmp_path: Path) -> None:
    assert find_source(str(in_parquet(tmp_path, content))).classes == ("1",)
    assert find_source(str(in_parquet(tmp_path, json.dumps(FEATURES)))).classes == ("shoe",)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", image=[png(0)] * 2, text=["a" * 300, "b" * 300])
    content = bytearray(path.read_bytes())
    at = content.index(b"a" * 40)
    content[at - 8 : at + 8] = bytes(16)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.parquet cannot be read: .+\nCopy or download it again"):
        find_source(str(path))


def test_a_saved_set_in_another_format_and_a_row_without_an_image(tmp_path: Path) -> None:
    import datasets

    held = {"bytes": png(0), "path": None}
    rows = datasets.Dataset.from_dict({"image": [held, None], "text": ["a", "b"]}).cast_column(
        "image", datasets.Image()
    )
    rows.with_format("numpy", columns=["image"]).save_to_disk(str(tmp_path / "saved"))
    source = find_source(str(tmp_path / "saved"))
    assert source.captions() == ["a", "b"]
    with pytest.raises(UserError, match="row 1 holds no image"):
        source.content_keys()


@pytest.mark.parametrize("name", latent_folder._RIGHT)
@pytest.mark.parametrize("value", [None, {"a": 5}, [[1]], -1, "x" * 99, ["\ud83c"]])
def test_every_entry_of_a_description_is_checked(name: str, value: Any, tmp_path: Path) -> None:
    latents(tmp_path)
    right = described(tmp_path)
    written(tmp_path / "latents.json", json.dumps(right))
    assert find_source(str(tmp_path)).captions() == ["a", ""]
    damaged = (
        right | {name: value} if value is not None else {key: right[key] for key in right if key != name}
    )
    if name in ("name", "given", "index") and isinstance(value, str):
        return  # as good as another
    written(tmp_path / "latents.json", json.dumps(damaged))
    with pytest.raises(UserError, match=rf"latents.json is damaged: {name} is|in version"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    ("table", "made", "told"),
    [
        ("../../etc", {"flips": False}, "tells of '../../etc'"),
        ("latents-8x9", {"flips": False, "background": [0, 0, 0]}, "tells of 'latents-8x9'"),
        ("latents", {"flips": False, "background": [0, 0, 256]}, "tables is"),
    ],
)
def test_a_description_leads_nowhere_else(table: str, made: Any, told: str, tmp_path: Path) -> None:
    latents(tmp_path)
    right = described(tmp_path)
    written(tmp_path / "latents.json", json.dumps(right | {"tables": right["tables"] | {table: made}}))
    with pytest.raises(UserError, match=told):
        find_source(str(tmp_path))


# ---- archives that hold more than they say, or too much ----

MANY = 32 * 2**20


def declared(path: Path, size: int) -> Path:
    """The archive, saying that its last member unpacks to ``size`` bytes."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def memory_below(limit: int) -> Any:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["1.png", "0.txt"])
def test_a_member_that_says_how_large_it_is_is_not_unpacked(
    name: str, compression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zipped(tmp_path / "a.zip", {"0.png": png(0), name: bytes(MANY)}, compression)
    monkeypatch.setattr(files, "IMAGE_BYTES", 2**20)
    with (
        memory_below(MANY // 2),
        pytest.raises(UserError, match=rf"a.zip: {name} holds {MANY:,} bytes, more than the 1,048,576"),
    ):
        find_source(str(path)).content_keys()
    assert path.stat().st_size < MANY / 100


def test_a_member_that_lies_about_its_size_is_not_unpacked(tmp_path: Path) -> None:
    path = declared(zipped(tmp_path / "a.zip", {"0.png": png(0), "1.png": bytes(MANY)}), 100)
    with memory_below(2**23), pytest.raises(UserError, match=r"a.zip: 1.png cannot be read: Bad CRC-32"):
        find_source(str(path)).content_keys()


def test_captions_and_metadata_are_bounded_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "METADATA_BYTES", 99)
    long, rows = b"a" * (2**20 + 1), b'{"file_name": "0.png"}\n' * 9
    for made, name in (
        (with_image(tmp_path / "a", "0.txt", long), "0.txt"),
        (with_image(tmp_path / "b", "0.caption", long), "0.caption"),
        (with_image(tmp_path / "c", "metadata.jsonl", rows), "metadata.jsonl"),
        (in_shard(tmp_path, "0.txt", long), "0.txt"),
        (in_shard(tmp_path / "a", "0.json", long), "0.json"),
        (zipped(tmp_path / "x.zip", {"0.png": png(0), "0.txt": long}), "0.txt"),
        (zipped(tmp_path / "y.zip", {"0.png": png(0), "metadata.jsonl": rows}), "metadata.jsonl"),
    ):
        with pytest.raises(UserError, match=f"{name} holds .* bytes, more than the"):
            find_source(str(made))


def test_columns_and_rows_of_a_parquet_file_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(table, "IMAGE_BYTES", 2**20)
    texts = {"image": [png(0)], "text": ["a" * 2**22]}
    pyarrow.parquet.write_table(
        pyarrow.table(texts), tmp_path / "x.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(UserError, match=r"x.parquet: group 0 holds 4,19.* bytes, more than"):
        find_source(str(tmp_path / "x.parquet"))
    rows = {"image": [png(0)] * 100_000}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "y.parquet")
    assert (tmp_path / "y.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"y.parquet claims 100000 rows in \d+ bytes"):
        find_source(str(tmp_path / "y.parquet"))


# ---- what reaches a terminal ----


def test_names_are_written_on_one_line_wherever_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\n2026-01-01 00:00:00,000 plan: \x1b[31m\x9b2J\u202e" + os.fsdecode(b"\xe9")
    assert few([name]) == one_line(name) and not set(one_line(name)) & set("\n\x1b\x9b\u202e\udce9")
    log = log_to(tmp_path)
    log.warning("left out: %s", name.replace("\n", ""))
    for handler in log.handlers:
        handler.flush()
    told = (tmp_path / "train.log").read_text("utf-8") + capsys.readouterr().err
    assert told.count(r"left out: a2026-01-01 00:00:00,000 plan: \x1b[31m\x9b2J\u202e\udce9") == 2
    assert not set(told) & set("\x1b\x9b\u202e")
    log_to(None)


def test_an_error_fits_on_a_screen() -> None:
    error = UserError("a" * 10**6, "b" * 10**6)
    assert len(error.what) <= LENGTH and len(error.fix) <= LENGTH and "[...]" in error.what
    value = [[[[["a" * 10**6] * 10**5]]]]
    assert len(shown(value)) < 2000


# ---- a defect of our own keeps its traceback ----

SEEDS: dict[str, Callable[[Path], object]] = {
    "metadata": lambda folder: read(with_image(folder, "metadata.jsonl", '{"file_name": "0.png", "text": "a"}')),
    "csv": lambda folder: read(with_image(folder, "metadata.csv", "file_name,text\n0.png,a\n")),
    "sidecar": lambda folder: read(with_image(folder, "0.txt", "a")),
    "table": lambda folder: read(with_image(folder, "t.csv", "image,text\n0.png,a\n") / "t.csv"),
    "parquet": lambda folder: read(in_parquet(folder, json.dumps(FEATURES))),
    "shard": lambda folder: read(in_shard(folder, "0.json", '{"text": "a"}')),
    "zip": lambda folder: read(zipped(folder / "a.zip", {"0.png": png(0)})),
    "latents": lambda folder: read(in_latents(folder, json.dumps((latents(folder), described(folder))[1]))),
    "saved": lambda folder: read(saved(folder / "s", image=[{"bytes": png(0), "path": None}], text=["a"])),
    "mix": lambda folder: read(
        written(with_image(folder / "a", "0.txt", "a").parent / "m.yaml", "sources: [{data: a}]")
    ),
    "config": lambda folder: read_config(written(folder / "c.yaml", "masks: none")),
}  # fmt: skip
OURS = [
    ("metadata", folder_source, "parse_row"), ("metadata", metadata, "_label"),
    ("metadata", folder_source, "our_columns"), ("metadata", documents, "_refuse_excess"),
    ("csv", folder_source, "_file_name"), ("csv", records, "decode"),
    ("sidecar", folder_source, "read_sidecars"), ("sidecar", folder_source, "_left_out"),
    ("table", metadata, "text_in"), ("table", metadata, "_path_in"), ("parquet", metadata, "class_name"),
    ("parquet", table, "_filled"), ("parquet", table, "our_columns"), ("shard", shards, "_json_object"),
    ("shard", shards, "_is_caption"), ("shard", shards, "TarMember"), ("zip", archives, "folder_source"),
    ("zip", archives, "refuse_large"), ("latents", latent_folder, "place_of"), ("latents", latent_folder, "_Index"),
    ("latents", latent_folder, "index_schema"), ("saved", metadata, "parse_row"), ("saved", saved_sets, "ArrowMember"),
    ("mix", kinds, "_part"), ("mix", documents, "_repeated_key"), ("config", cli, "_convert"),
]  # fmt: skip


@pytest.mark.parametrize("failure", [KeyError, ZeroDivisionError, TypeError, RuntimeError, IndexError])
@pytest.mark.parametrize(("seed", "module", "name"), OURS, ids=lambda one: getattr(one, "__name__", one))
def test_a_defect_of_our_own_keeps_its_traceback(
    seed: str,
    module: Any,
    name: str,
    failure: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise failure("planted")

    monkeypatch.setattr(module, name, broken)
    if name == "refuse_large":
        tmp_path = Path(zipped(tmp_path / "b.zip", {"0.png": png(0), "0.txt": b"a"}))
        with pytest.raises(failure, match="planted"):
            read(tmp_path)
        return
    with pytest.raises(failure, match="planted"):
        SEEDS[seed](tmp_path)


def test_names_that_are_text_are_classes_as_they_are(tmp_path: Path) -> None:
    """A joiner inside a word is a part of it, unseen as it is: only what no file can hold is written otherwise."""
    names = ["می\u200cخواهم", "👩\u200d🚀", "soft\u00adhyphen"]
    for name in (*names, os.fsdecode(b"\xe9")):
        written(tmp_path / name / "0.png", png(0))
    assert set(find_source(str(tmp_path)).classes) == {*names, r"\udce9"}
    assert one_line(names[0]) == names[0]


def test_a_value_of_a_config_file_is_refused_without_a_word_of_the_parser_of_flags(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"c\.yaml: resolution: True is not a valid value\nExpected: int"):
        read_config(written(tmp_path / "c.yaml", "resolution: true"))
    assert "".join(capfd.readouterr()) == ""
