"""Pictures that lie inside other files (tar, zip, parquet, Arrow): found once, read by position, never unpacked."""

from __future__ import annotations

import functools
import hashlib
import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from latentflow.errors import UserError


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

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes.

        Raises:
            UserError: the file around it has changed or is damaged there.
        """

    @abstractmethod
    def __str__(self) -> str: ...


File = Path | Member


def read_bytes(file: File) -> bytes:
    """The bytes of a file, wherever it lies."""
    return file.read() if isinstance(file, Member) else file.read_bytes()


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
