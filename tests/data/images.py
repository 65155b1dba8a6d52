"""Images, folders, archives and tables made on the spot."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

# What a camera stored for each EXIF orientation, so that turning it back gives the upright image.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


def noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    """An RGB image in which every pixel differs."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def png(seed: int) -> bytes:
    return encoded(noise(seed))


def turned_by_exif(image: np.ndarray, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """An image stored in an orientation, and the EXIF that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](image))), exif


def save_all(root: Path, names: list[str]) -> None:
    """Different images under ``names``, whose suffix decides the format."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(root / name)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def folder_of(root: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Files of a folder by their names; None stands for an image, each another one."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (name, content) in enumerate(files.items()):
        written(root / name, png(seed) if content is None else content)
    return root


def jsonl(*rows: Mapping[str, object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_jsonl(path: Path, rows: list[Mapping[str, object]]) -> None:
    path.write_text(jsonl(*rows), encoding="utf-8")


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


def parquet(path: Path, metadata: dict[str, str | bytes] | None = None, **columns: Any) -> Path:
    """A table in groups of two rows."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return path


def saved(path: Path, **columns: Any) -> Path:
    """A data set of the library `datasets`, saved to disk."""
    import datasets

    rows = datasets.Dataset.from_dict(columns)
    held = ("image", "img", "mask", "control", "conditioning_image", "segmentation_mask")
    for name in [name for name in held if name in columns]:
        rows = rows.cast_column(name, datasets.Image())
    rows.save_to_disk(str(path))
    return path


def load_program(path: Path) -> ModuleType:
    """A program as a module, without running it."""
    name = f"program_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def png_header(width: int, height: int) -> bytes:
    """A small file whose header promises that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
