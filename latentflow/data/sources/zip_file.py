"""A zip file of a folder, read in place by the rules of a folder."""

from __future__ import annotations

import functools
import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import UserError, reading
from ...utils.names import composed
from ..dataset import Source
from .annotations import DataRequest
from .files import Container, Folder, Member, intact, refuse_large
from .folder import folder_source

# What `zipfile` raises: BadZipFile for a wrong checksum, RuntimeError for a password, the rest for damaged headers.
_FAILURES = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError, OSError, EOFError,
    ValueError, OverflowError, LookupError, MemoryError,
)  # fmt: skip
# Bytes that are read at once. Only some decompressors take a limit on their output; the others get little to read.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_STEP, _SMALL_STEP = 2**16, 2**12
_FIX = "Pack the folder again."


@dataclass(frozen=True, slots=True)
class ZipMember(Member):
    """A member of a zip file, by its name in it."""

    zip: Container
    name: str

    def _read(self, bound: int) -> bytes:
        self.zip.check()
        archive, parts = _open(self.zip, os.getpid()), []
        info = archive.getinfo(self.name)
        refuse_large(str(self), info.file_size, bound)
        with reading(self, *_FAILURES, fix=_FIX), archive.open(info) as stream:
            # No more comes out than the size in the header says, but one read might unpack it all before.
            while part := stream.read(_STEP if info.compress_type in _BOUNDED else _SMALL_STEP):
                parts.append(part)
        return b"".join(parts)

    def __str__(self) -> str:
        return f"{self.zip.path}: {self.name}"


@functools.lru_cache(maxsize=8)
def _open(container: Container, process: int) -> zipfile.ZipFile:
    """Open the file, once for each process: its threads take turns, but processes would move each other's position."""
    try:
        # macOS writes names in UTF-8 without saying so; `zipfile` takes such names for code page 437.
        return zipfile.ZipFile(container.path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(container.path)


def read_zip(data: str, request: DataRequest) -> Source:
    """Return the images of a zip file; a single folder at the top that holds everything is taken for the root.

    Raises:
        UserError: it is not an intact zip file; a name occurs twice or leads out of the folder; and as for a folder.
    """
    path = Path(data).expanduser()
    container = Container.of(path)
    with intact(path, "zip", *_FAILURES):
        archive = _open(container, os.getpid())
    names = [info.filename for info in archive.infolist() if not info.filename.endswith("/")]
    places = [
        PurePosixPath(name.replace("\\", "/")) for name in names
    ]  # some programs write Windows' separators
    for name, place in zip(names, places, strict=True):
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"{path} holds names that lead out of it: {name}", _FIX)
    for spelled, count in Counter(composed(str(place)) for place in places).items():
        if count > 1:
            raise UserError(f"{path} holds {spelled} twice", _FIX)
    visible = {p: name for p, name in zip(places, names, strict=True) if "__MACOSX" not in p.parts}
    tops = {place.parts[0] if len(place.parts) > 1 else "" for place in visible}
    root = PurePosixPath(*tops) if len(tops) == 1 else PurePosixPath()
    members: dict[str, Member] = {
        place.relative_to(root).as_posix(): ZipMember(container, name) for place, name in visible.items()
    }
    shown = [name for name in members if not any(part.startswith(".") for part in name.split("/")[:-1])]
    return folder_source(data, Folder.of(path, shown, members=members), request)
