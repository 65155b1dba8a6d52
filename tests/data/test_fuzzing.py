"""Every parser of what users bring reads thousands of damaged inputs or raises a `UserError`, nothing else.

The inputs are the same each time. `--run-slow` tries some 10,000 others, of hypothesis.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from latentflow.cli import parse
from latentflow.config import DataConfig
from latentflow.data import decode_image, find_source, read_mask
from latentflow.data.sources.latent_folder import index_schema
from latentflow.errors import LENGTH, UserError, printable
from latentflow.pipeline.adapter_files import AdapterFacts, read_adapter
from latentflow.training.report.folder import read_run

from .images import encoded, folder_of, jsonl, noise, parquet, saved, tar

QUICK, SLOW = 300, 650  # inputs for each parser


IMAGES = [encoded(noise(seed, 4, 4)) for seed in range(3)]
MASK = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 17)
ROWS = [
    {"file_name": "0.png", "text": "a red hat", "label": "hat", "weight": 0.5},
    {"file_name": "1.png", "text": ["a shoe", "a blue shoe"], "label": 3, "mask": "2.png"},
]
LINES = jsonl(*ROWS).encode()
DESCRIPTION = {
    "version": 1, "complete": True, "name": "cats", "pictures": 2, "kind": "text", "classes": ["a", "b"],
    "notes": ["captions from metadata.jsonl"], "resolution": 8, "sizes": [[8, 8], [4, 16]],
    "tables": {"latents": {"flips": False, "background": [255, 255, 255], "size": [8, 8]}},
    "given": "0" * 40, "index": "",
}  # fmt: skip
FEATURES = {"info": {"features": {"label": {"names": ["hat", "shoe"], "_type": "ClassLabel"}}}}


@dataclass(frozen=True)
class Parser:
    """What is damaged, and what reads it: the file of that name in a folder that ``fill`` made."""

    name: str
    file: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, Path], object]  # of the folder and the file
    fill: Callable[[Path], None] = lambda folder: None
    is_text: bool = False
    costs: int = 1  # how many times as long as the others it takes


def look(data: Path, **wanted: Any) -> None:
    """As far as a training reads the data before it decodes images."""
    source = find_source(str(data), **wanted)
    source.fingerprint(), source.order(), source.class_ids() if source.kind == "class" else None
    assert len(source) == len(source.all_captions()) == len(list(source.content_keys()))
    for text in (
        *source.classes,
        *(text for texts in source.all_captions() for text in texts),
        *source.notes,
    ):
        text.encode()
    for example in source.examples:
        assert example.weight > 0


def images(folder: Path) -> None:
    folder_of(folder, {f"{number}.png": image for number, image in enumerate(IMAGES)})


def tables(folder: Path) -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    plain = parquet(folder / "a.parquet", image=IMAGES, text=["a", "b", None], label=[0, 1, 1])
    held = [{"bytes": one, "path": None} for one in IMAGES]
    table = pyarrow.table({"image": held, "label": [0, 1, -1], "text_1": [["a", "b"], ["c"], []]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(FEATURES)})
    pyarrow.parquet.write_table(table, folder / "b.parquet", compression="zstd")
    paths = parquet(folder / "c.parquet", file_name=["0.png", "1.png"], text=["a", "b"])
    return [plain.read_bytes(), (folder / "b.parquet").read_bytes(), paths.read_bytes()]


def features(folder: Path) -> list[bytes]:
    return [json.dumps(FEATURES).encode()]


def read_features(folder: Path, file: Path) -> None:
    metadata: dict[str, str | bytes] = {"huggingface": file.read_bytes()}
    look(parquet(folder / "x.parquet", metadata, image=IMAGES, label=[0, 1, 1]))


def latents(folder: Path) -> None:
    """A folder of latents without latents: what is read before the shards."""
    import pyarrow

    row = {
        "texts": ["a"], "label": None, "class_id": -1, "weight": 1.0, "repeats": 1, "key": "k", "pixel_key": "k",
        "mask_key": "",
        "group": 0, "bucket": 0, "height": 8, "width": 8,
    }  # fmt: skip
    rows = [row | {"name": "0.png"}, row | {"name": "1.png", "texts": [], "bucket": 1}]
    with pyarrow.ipc.new_file(str(folder / "index.arrow"), index_schema(pixel_keys=True)) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=index_schema(pixel_keys=True)))


def described(folder: Path) -> dict[str, Any]:
    import hashlib

    return DESCRIPTION | {"index": hashlib.sha256((folder / "index.arrow").read_bytes()).hexdigest()}


def latent_seeds(folder: Path) -> list[bytes]:
    latents(folder)
    return [json.dumps(described(folder)).encode()]


def index_seeds(folder: Path) -> list[bytes]:
    latents(folder)
    return [(folder / "index.arrow").read_bytes()]


def read_index(folder: Path, file: Path) -> None:
    (folder / "latents.json").write_text(json.dumps(described(folder)))
    look(folder)


def shards(folder: Path) -> list[bytes]:
    members = {
        "0.png": IMAGES[0],
        "0.txt": b"a hat",
        "1.png": IMAGES[1],
        "1.json": jsonl(ROWS[1]).encode(),
        "1.cls": b"3",
    }
    found = [tar(folder / "s.tar", members).read_bytes()]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):  # headers of their own for a long name
        with tarfile.open(folder / "s.tar", "w", format=form) as file:
            info = tarfile.TarInfo("ü" * 120 + ".png")
            info.size, info.mtime, info.uname = len(IMAGES[0]), 0.5, "ü"
            file.addfile(info, io.BytesIO(IMAGES[0]))
        found.append((folder / "s.tar").read_bytes())
    return found


def read_json_member(folder: Path, file: Path) -> None:
    look(tar(folder / "s.tar", {"0.png": IMAGES[0], "0.json": file.read_bytes()}))


def archives(folder: Path) -> list[bytes]:
    members = {"d/0.png": IMAGES[0], "d/0.txt": b"a hat", "d/1.png": IMAGES[1], "d/1.caption": "ü".encode()}
    found = []
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", kind) as file:
            for name, content in members.items():
                file.writestr(zipfile.ZipInfo(name), content, kind)  # of a fixed date
        found.append(stream.getvalue())
    return found


def data_set(folder: Path) -> None:
    template = folder.parent / "saved"
    if not template.is_dir():
        saved(template, image=[{"bytes": one, "path": None} for one in IMAGES], text=["a", "b", "c"])
        state = json.loads((template / "state.json").read_text())
        (template / "state.json").write_text(json.dumps(state | {"_fingerprint": "0" * 16}))
    shutil.copytree(template, folder, dirs_exist_ok=True)


def data_set_file(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        data_set(folder)
        return [(folder / name).read_bytes()]

    return seeds


def adapters(folder: Path) -> list[bytes]:
    layer = "transformer.blocks.0.attention.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(1, 4), f"{layer}.lora_B.weight": torch.ones(4, 1)}
    facts = AdapterFacts(base={"float32": "0" * 64}, words=["w"], base_name="b")
    settings = {"lora_adapter_metadata": json.dumps({"transformer.r": 1, "transformer.lora_alpha": 1})}
    return [save(tensors), save(tensors, facts.metadata() | settings | {"format": "pt"})]


def read_adapter_file(folder: Path, file: Path) -> None:
    read_adapter(str(folder), str(folder), {"local_files_only": True})


def read_config(folder: Path, file: Path) -> None:
    try:
        parse(DataConfig, ["cats", "--config", str(file)], prog="latentflow train")
    except SystemExit as end:  # of tyro: a value that no flag could have
        raise AssertionError(f"no sentence: {end.code}") from end


def masks(folder: Path) -> list[bytes]:
    return [encoded(MASK, format) for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")]


PARSERS = [
    Parser("metadata.jsonl", "metadata.jsonl", lambda _: [LINES],
           lambda folder, _: look(folder, missing_caption="empty"), images, True),
    Parser("metadata.csv", "metadata.csv",
           lambda _: [b'file_name,text,label,weight\n0.png,"a, hat",hat,1\n1.png,b,c,\n'],
           lambda folder, _: look(folder, missing_caption="empty"), images, True),
    Parser("sidecar", "0.txt", lambda _: ["a hät\n".encode()],
           lambda folder, _: look(folder, missing_caption="empty"), images, True),
    Parser("table.csv", "table.csv", lambda _: [b"image,text,mask\n0.png,a hat,2.png\n1.png,b,\n"],
           lambda _, file: look(file), images, True),
    Parser("table.parquet", "table.parquet", tables,
           lambda _, file: look(file, missing_caption="empty"), images),
    Parser("parquet metadata", "metadata", features, read_features, is_text=True),
    Parser("shard.tar", "shard.tar", shards, lambda _, file: look(file)),
    Parser("member.json", "member", lambda _: [jsonl(ROWS[1]).encode()], read_json_member, is_text=True),
    Parser("folder.zip", "folder.zip", archives, lambda _, file: look(file, missing_caption="empty")),
    Parser("mix.yaml", "mix.yaml", lambda _: [b"sources:\n  - {data: a, repeats: 2, weight: 0.5}\n  - data: b\n"],
           lambda _, file: look(file), lambda folder: [images_in(folder / name) for name in "ab"] and None, True),
    Parser("latents.json", "latents.json", latent_seeds, lambda folder, _: look(folder), latents, True),
    Parser("index.arrow", "index.arrow", index_seeds, read_index),
    Parser("dataset_info.json", "dataset_info.json", data_set_file("dataset_info.json"),
           lambda folder, _: look(folder), data_set, True, 2),
    Parser("state.json", "state.json", data_set_file("state.json"), lambda folder, _: look(folder), data_set, True, 2),
    Parser("data.arrow", "data-00000-of-00001.arrow", data_set_file("data-00000-of-00001.arrow"),
           lambda folder, _: look(folder), data_set, False, 2),
    Parser("config.yaml", "config.yaml",
           lambda _: [b"resolution: 64\nvalidation: 0.1\nmasks: none\ncolumns: {text: t}\n"],
           read_config, is_text=True, costs=4),
    Parser("run", "config.yaml", lambda _: [yaml.safe_dump({"network": "dit", "data": "cats"}).encode()],
           lambda folder, _: read_run(folder), is_text=True),
    Parser("adapter", "pytorch_lora_weights.safetensors", adapters, read_adapter_file),
    Parser("mask", "mask.png", masks, lambda _, file: read_mask(decode_image(file))),
]  # fmt: skip


def images_in(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    number = len(list(folder.parent.iterdir()))
    (folder / "0.png").write_bytes(encoded(noise(number, 4, 4)))


# ---- the damage ----

# Bits of text that parsers trip over.
ODD = [
    b"\\ud83c", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"[]", b"{}",
    b'""', b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b'"', b"'", b",", b"\r", b"\n\n", b"\x1b[31m",
    b"!!timestamp x", b"!!int ''", b"&a [*a]", b"<<: 1\n", b"*x", b"../", b"/", b"\x80", b"a" * 200_000, b"-1", b"0",
]  # fmt: skip


def edited(content: bytes, random: Random) -> bytes:
    """The content with a few of its bytes changed, left out, repeated or put in."""
    at, kind = random.randrange(len(content) + 1), random.randrange(7)
    if kind < 2 and at < len(content):
        value = content[at] ^ random.randrange(1, 256) if kind else random.choice([0, 1, 0x7F, 0x80, 0xFF])
        return content[:at] + bytes([value]) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + content[at + random.randrange(1, 33) :]
    if kind == 4:
        end = at + random.randrange(1, 65)
        return content[:end] + content[at:end] + content[end:]
    new = random.choice(ODD) if random.random() < 0.8 else random_bytes(random)
    return content[:at] + new + content[at + (len(new) if kind == 5 else 0) :]


def random_bytes(random: Random) -> bytes:
    return bytes(random.randrange(256) for _ in range(random.randrange(64)))


def odd_value(random: Random, depth: int = 0) -> Any:
    """A JSON value of any type."""
    kind = random.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [odd_value(random, depth + 1) for _ in range(random.randrange(3))]
    if kind == 8:
        return {str(odd_value(random, 9)): odd_value(random, depth + 1) for _ in range(random.randrange(3))}
    text = "".join(random.choice("a0 \n\ud83c\udce9\0é🐈./-\x1b\u202e") for _ in range(random.randrange(6)))
    number = random.choice([0, 1, -1, 2**31, 2**63, -(2**64), 10**400])
    return [None, True, False, number, random.choice([0.5, -1e300, 1e309, float("nan")]), text, ""][kind]


def swapped(value: Any, random: Random) -> Any:
    """A JSON value in which one of the values inside is another, or is gone."""
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key in one if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ():
            places.append((one, key))
            walk(one[key])

    whole = json.loads(json.dumps(value))
    walk(whole)
    held, key = random.choice(places)
    if random.random() < 0.2:
        del held[key]
    else:
        held[key] = odd_value(random)
    return whole


def objects(seed: bytes) -> list[dict[str, Any]]:
    """The objects of a seed that is JSON, JSON lines or YAML; none of any other."""
    try:
        rows = [yaml.safe_load(one) for one in (seed.splitlines() if seed.count(b"}\n") > 1 else [seed])]
    except yaml.YAMLError:
        return []
    return rows if all(isinstance(row, dict) for row in rows) else []


def damaged(parser: Parser, seeds: list[bytes], random: Random) -> bytes:
    content = random.choice(seeds)
    kind = random.random() if parser.is_text else 1
    if kind < 0.05:
        return random_bytes(random)
    if kind < 0.5 and (rows := objects(content)):
        return b"".join(json.dumps(swapped(row, random)).encode() + b"\n" for row in rows)
    for _ in range(random.randrange(1, 4)):
        content = edited(content, random)
    return content


class Trial:
    """A parser with a folder of its own, and how many inputs it read and refused."""

    def __init__(self, parser: Parser, root: Path) -> None:
        self.parser, self.folder, self.read, self.refused = parser, root / "data", 0, 0
        (root / "seeds").mkdir()
        self.folder.mkdir()
        self.seeds = parser.seeds(root / "seeds")
        parser.fill(self.folder)
        for content in self.seeds:  # undamaged they are read
            self.parse(content)

    def parse(self, content: bytes) -> None:
        file = self.folder / self.parser.file
        file.unlink(missing_ok=True)  # never in place: what is mapped from the file would change
        file.write_bytes(content)
        self.parser.read(self.folder, file)

    def __call__(self, random: Random) -> None:
        """Damage a seed, and read it.

        Raises:
            Exception: anything but a `UserError` that fits on a screen.
        """
        try:
            self.parse(damaged(self.parser, self.seeds, random))
            self.read += 1
        except UserError as error:
            self.refused += 1
            text = str(error)
            assert text == printable(text) and len(text) <= 2 * LENGTH + 1 and text.count("\n") < 24


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_damaged_input_is_read_or_refused(parser: Parser, tmp_path: Path) -> None:
    trial = Trial(parser, tmp_path)
    for number in range(QUICK // parser.costs):
        random = Random(f"{parser.name} {number}")
        try:
            trial(random)
        except Exception as error:
            error.add_note(f"input {number} of {parser.name}")
            raise
    assert trial.read and trial.refused >= 5


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_thousands_of_damaged_inputs_are_read_or_refused(parser: Parser, tmp_path: Path) -> None:
    """Hypothesis makes what fails as small as it can, but which inputs it tries depends on its version."""
    import hypothesis
    from hypothesis import strategies

    trial = Trial(parser, tmp_path)

    @hypothesis.settings(
        max_examples=SLOW // parser.costs, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def attempt(random: Random) -> None:
        trial(random)

    attempt()
    print(f"\n{parser.name}: {trial.read} read, {trial.refused} refused")
    assert trial.read and trial.refused
