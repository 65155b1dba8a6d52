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

from ...errors import UserError, reading, reason
from ..dataset import Source
from .assemble import Wanted
from .files import SUFFIXES, ArchivedFolder
from .folder import folder_source
from .members import Container, Member, refuse_large

# BadZipFile tells a wrong checksum, RuntimeError a password; what headers of nonsense lead to is not wrapped.
_FAILURES = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError, RuntimeError, OSError, EOFError,
    ValueError, OverflowError, LookupError, MemoryError,
)  # fmt: skip
# Bytes that are read at once. Only some decompressors are told how much may come out; the others' input is small.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_STEP, _SMALL_STEP = 2**16, 2**12


@dataclass(frozen=True, slots=True)
class ZipMember(Member):
    """A member of a zip file, by its name in it."""

    zip: Container
    name: str

    def _read(self, bound: int) -> bytes:
        self.zip.open().close()  # unchanged
        archive, parts = _opened(self.zip, os.getpid()), []
        told = archive.getinfo(self.name)
        refuse_large(str(self), told.file_size, bound)
        with reading(self, *_FAILURES, fix="Pack the folder again."), archive.open(told) as stream:
            # No more than the size that was told comes out, but in one piece it might all be unpacked before.
            while part := stream.read(_STEP if told.compress_type in _BOUNDED else _SMALL_STEP):
                parts.append(part)
        return b"".join(parts)

    def __str__(self) -> str:
        return f"{self.zip.path}: {self.name}"


def is_zip(data: str) -> bool:
    """Whether DATA is a zip file, by its name."""
    path = Path(data).expanduser()
    return path.suffix.lower() == ".zip" and path.is_file()


def read_zip(data: str, wanted: Wanted) -> Source:
    """The images of a zip file; a folder that holds all of it is taken for the root.

    Raises:
        UserError: it is no zip file, or damaged; a name is there twice or leads out of the folder; and what a folder
            is refused for.
    """
    path = Path(data).expanduser()
    container = Container.of(path)
    try:
        archive = _opened(container, os.getpid())
    except _FAILURES as error:
        raise UserError(
            f"{path} is no intact zip file: {reason(error)}", "Copy or download it again."
        ) from None
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    # Some programs write the separators of Windows.
    places = {info.filename: PurePosixPath(info.filename.replace("\\", "/")) for info in infos}
    strange = [name for name, place in places.items() if place.is_absolute() or ".." in place.parts]
    if strange:
        raise UserError(f"{path} holds names that lead out of it: {strange[0]}", "Pack the folder again.")
    twice = [
        str(place) for place, count in Counter(places[info.filename] for info in infos).items() if count > 1
    ]
    if twice:
        raise UserError(f"{path} holds {twice[0]} twice", "Pack the folder again.")
    visible = {name: place for name, place in places.items() if "__MACOSX" not in place.parts}
    above = _common(list(visible.values()))
    members: dict[str, Member] = {
        place.relative_to(above).as_posix(): ZipMember(container, name) for name, place in visible.items()
    }
    return folder_source(data, _folder(path, members), wanted)


def _folder(path: Path, members: dict[str, Member]) -> ArchivedFolder:
    images: list[str] = []
    ignored: list[str] = []
    others: list[str] = []
    for name in sorted(members):
        place = PurePosixPath(name)
        if any(part.startswith(".") for part in place.parts[:-1]):
            continue  # hidden folders, as in a folder
        if place.suffix.lower() in SUFFIXES:
            (ignored if place.name.startswith(".") else images).append(name)
        else:
            others.append(name)
    return ArchivedFolder(path, tuple(images), tuple(ignored), tuple(others), members)


def _common(places: list[PurePosixPath]) -> PurePosixPath:
    """The one folder at the top that everything lies in, else the top itself."""
    tops = {place.parts[0] if len(place.parts) > 1 else "" for place in places}
    return PurePosixPath(next(iter(tops))) if len(tops) == 1 else PurePosixPath()


@functools.lru_cache(maxsize=8)
def _opened(container: Container, process: int) -> zipfile.ZipFile:
    """One open file for each process: its threads take turns, but processes would move each other's position."""
    return zipfile.ZipFile(container.path)
