"""Images that lie inside other files (tar, zip, parquet, Arrow): found once, read by position, never unpacked."""

from __future__ import annotations

import functools
import hashlib
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError

# What is read into memory of one file or member, at most, in bytes: its size is no measure of what it unpacks to.
IMAGE_BYTES = 512 * 2**20  # more than Pillow's limit of pixels takes in eight-bit RGB
CAPTION_BYTES = 2**20  # of a file or member that describes one image
METADATA_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds others, as it was when it was listed."""

    path: Path
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> Container:
        state = path.stat()
        return cls(path, state.st_size, state.st_mtime_ns)

    def open(self) -> BinaryIO:
        """The file, of which positions found earlier are still true.

        Raises:
            UserError: it has changed since, or is gone.
        """
        try:
            now = Container.of(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}", "Put it back.") from None
        if now != self:
            raise UserError(
                f"{self.path} has changed since it was listed",
                "Leave data alone while a program reads them, and start the program again.",
            )
        return self.path.open("rb")


class Member(ABC):
    """A file inside another one. Its text says where it lies; equal members hold the same bytes."""

    def read(self, limit: int | None = None) -> bytes:
        """Return its bytes, at most ``limit`` (None: ``IMAGE_BYTES``).

        Raises:
            UserError: it holds more, or says so; the file around it has changed or is damaged there.
        """
        bound = IMAGE_BYTES if limit is None else limit
        held = self._read(bound)
        refuse_large(str(self), len(held), bound)
        return held

    @abstractmethod
    def _read(self, bound: int) -> bytes:
        """Return its bytes. Where its size is told, `refuse_large` it before anything is unpacked.

        Raises:
            UserError: as for ``read``.
        """

    @abstractmethod
    def __str__(self) -> str: ...


File = Path | Member


def read_bytes(file: File, limit: int | None = None) -> bytes:
    """Return the bytes of a file, wherever it lies, at most ``limit`` (None: ``IMAGE_BYTES``).

    Raises:
        UserError: it holds more.
        OSError: it cannot be read.
    """
    if isinstance(file, Member):
        return file.read(limit)
    refuse_large(str(file), file.stat().st_size, IMAGE_BYTES if limit is None else limit)
    return file.read_bytes()


def refuse_large(name: str, size: int, bound: int) -> None:
    """Refuse to read more than ``bound`` bytes.

    Raises:
        UserError: ``size`` is more.
    """
    if size > bound:
        raise UserError(
            f"{name} holds {size:,} bytes, more than the {bound:,} that are read of such a file",
            "It is damaged, or made to fill the memory: leave it out.",
        )


def open_stream(file: File) -> io.BytesIO | io.BufferedReader:
    """The bytes of a file as a seekable stream."""
    return io.BytesIO(file.read()) if isinstance(file, Member) else file.open("rb")


def file_key(file: File) -> str:
    """Hexadecimal hash of a file's bytes."""
    if isinstance(file, Member):
        return _hash_member(file)
    state = file.stat()
    return _hash_file(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1_000_000)
def _hash_file(path: Path, size: int, modified: int) -> str:
    # Size and time only save hashing the same file twice in one process: an edit in place changes them.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1_000_000)
def _hash_member(member: Member) -> str:
    return hashlib.sha256(member.read()).hexdigest()
