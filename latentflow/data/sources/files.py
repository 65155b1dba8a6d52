"""Files on disk and inside other files (tar, zip, parquet, Arrow): their names, and bytes read in place."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ...errors import UserError, reason
from ...utils.libraries import missing
from ...utils.names import composed, find_path, near_path
from ...utils.progress import progress_bar

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
)  # fmt: skip
CAPTION_SUFFIXES = (".txt", ".caption")  # of the file beside an image that holds its caption

# The most bytes that are read of one file or member: its own size does not say how much it unpacks to.
IMAGE_BYTES = 512 * 2**20  # more than Pillow's limit of pixels takes in eight-bit RGB
CAPTION_BYTES = 2**20
METADATA_BYTES = 2**30

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds others, with its state when it was listed."""

    path: Path
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> Container:
        state = path.stat()
        return cls(path, state.st_size, state.st_mtime_ns)

    def check(self) -> None:
        """Raise `UserError` where it has changed since or is gone: positions found earlier are valid no more."""
        try:
            now = Container.of(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}", "Put it back.") from None
        if now != self:
            raise UserError(
                f"{self.path} has changed since it was listed",
                "Leave data alone while a program reads them, and start the program again.",
            )

    def open(self) -> BinaryIO:
        """Open the file, after `check`."""
        self.check()
        return self.path.open("rb")


class Member(ABC):
    """A file inside another one. ``str`` tells where it lies; equal members hold the same bytes."""

    def read(self, limit: int | None = None) -> bytes:
        """Return its bytes, at most ``limit`` (None: ``IMAGE_BYTES``).

        Raises:
            UserError: it holds more or claims to; the file around it has changed or is damaged there.
        """
        bound = IMAGE_BYTES if limit is None else limit
        content = self._read(bound)
        refuse_large(str(self), len(content), bound)
        return content

    @abstractmethod
    def _read(self, bound: int) -> bytes:
        """Return its bytes. Where its size is stated, call `refuse_large` before anything is unpacked."""

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
    """Raise `UserError` if ``size`` is more than ``bound`` bytes."""
    if size > bound:
        raise UserError(
            f"{name} holds {size:,} bytes, more than the {bound:,} that are read of such a file",
            "It is damaged, or made to fill the memory: leave it out.",
        )


@contextmanager
def intact(path: Path, kind: str, *failures: type[BaseException]) -> Iterator[None]:
    """Turn failures of the library that opens a file of some ``kind`` into a `UserError`: it is not intact."""
    try:
        yield
    except failures as error:
        fix = "It may be cut off: copy or download it again."
        raise UserError(f"{path} is not an intact {kind} file: {reason(error)}", fix) from None


def import_optional(module: str, what: str) -> Any:
    """Import a module of an optional library, which ``what`` needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing(f"{what} needs", module.partition(".")[0]) from None


def open_stream(file: File) -> io.BytesIO | io.BufferedReader:
    """Return the bytes of a file as a seekable stream."""
    return io.BytesIO(file.read()) if isinstance(file, Member) else file.open("rb")


def file_state(file: File) -> tuple[File, int, int]:
    """Return a file with its size and time, which an edit changes: the key under which its hash is remembered."""
    if isinstance(file, Member):
        return file, 0, 0
    state = file.stat()
    return file, state.st_size, state.st_mtime_ns


def file_key(file: File) -> str:
    """Return the hexadecimal hash of a file's bytes."""
    return _hash(*file_state(file))


@functools.lru_cache(maxsize=1_000_000)
def _hash(file: File, size: int, modified: int) -> str:
    with open_stream(file) as stream:
        return hash_stream(stream)


def hash_stream(stream: BinaryIO) -> str:
    """Return the hexadecimal hash of a stream. For small files this is faster than `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while part := stream.read(2**18):
        digest.update(part)
    return digest.hexdigest()


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case (a `Path` for each of many files takes long)."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


@dataclass(frozen=True)
class Folder:
    """The files below a folder on disk or in an archive; names are relative to ``root``, in posix form, sorted.

    Attributes:
        root: the folder, or the path of the archive.
        images: by their suffix.
        hidden: hidden and macOS resource files with an image's suffix.
        others: all other files.
        closed: folders that could not be listed, and why.
        members: the files of an archive by name; None on disk.
    """

    root: Path
    images: tuple[str, ...]
    hidden: tuple[str, ...]
    others: tuple[str, ...]
    closed: tuple[str, ...] = ()
    members: Mapping[str, Member] | None = None

    @classmethod
    def of(
        cls,
        root: Path,
        names: Iterable[str],
        *,
        closed: Iterable[str] = (),
        members: Mapping[str, Member] | None = None,
    ) -> Folder:
        """Sort files into images and others, by their names."""
        images: list[str] = []
        hidden: list[str] = []
        others: list[str] = []
        for name in sorted(names):
            if suffix_of(name) not in IMAGE_SUFFIXES:
                others.append(name)
            else:
                (hidden if name.rpartition("/")[2].startswith(".") else images).append(name)
        return cls(root, tuple(images), tuple(hidden), tuple(others), tuple(closed), members)

    @property
    def direct(self) -> list[str]:
        """The images in no subfolder."""
        return [name for name in self.images if "/" not in name]

    def per_subfolder(self) -> Counter[str]:
        """Return the number of images below each first-level subfolder, by name."""
        return Counter(name.split("/")[0] for name in self.images if "/" in name)

    def count_others(self, suffixes: Sequence[str] | None = None) -> str:
        """Return numbers of files that are no images by suffix, such as "3 .txt, 1 .csv"; "" where there are none."""
        counts = Counter(suffix_of(name) for name in self.others)
        return ", ".join(
            f"{count} {suffix or 'without suffix'}"
            for suffix, count in counts.items()
            if suffixes is None or suffix in suffixes
        )

    def find(self, name: str) -> str | None:
        """Return the file that a text calls ``name``, as it is spelled here; None where there is none.

        Its Unicode spelling does not matter, and ``\\`` stands for ``/``, as on Windows, where no name holds one.
        """
        separated = [PurePosixPath(name.replace("\\", "/")).as_posix()] if "\\" in name else []
        for written in (name, *separated):
            if written.startswith("/") or ".." in written.split("/"):
                continue
            if self.holds(written):
                return written
            if spelled := self._by_composed.get(composed(written)):
                return spelled
        return None

    @functools.cached_property
    def _by_composed(self) -> dict[str, str]:
        return {composed(name): name for name in (*self.images, *self.others, *self.hidden)}

    def holds(self, name: str) -> bool:
        return (self.root / name).is_file() if self.members is None else name in self.members

    def file(self, name: str) -> File:
        return self.root / name if self.members is None else self.members[name]


def list_folder(root: Path) -> Folder:
    """List all files below ``root``; links are followed once, and hidden folders are left out."""
    names: list[str] = []
    seen = set[str]()
    closed: list[OSError] = []
    walk = os.walk(root, followlinks=True, onerror=closed.append)
    for here, folders, files in progress_bar(walk, desc="listing folders", delay=3, leave=False):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        within = "" if (relative := Path(here).relative_to(root).as_posix()) == "." else relative + "/"
        names += [within + file for file in files]
    reasons = [f"{error.filename} ({(error.strerror or '').lower()})" for error in closed]
    return Folder.of(root, names, closed=reasons)


def many_paths(data: str) -> list[Path]:
    """Return the files that ``data`` names: one, ``shards-{000..009}.tar`` as in a shell, or ``shards/*.tar``.

    Raises:
        UserError: one of the files does not exist; the braces are malformed.
    """
    found: list[Path] = []
    for name in _expand_braces(str(Path(data).expanduser())):
        if (path := find_path(Path(name))).exists() or not glob.has_magic(name):
            found.append(path)
        else:
            found += sorted(Path(match) for match in glob.glob(name))  # noqa: PTH207 (from any folder)
    absent = [str(path) for path in found if not path.is_file()]
    if absent or not found:
        what = f"{len(absent)} of the {len(found)} files of {data} do not exist: {', '.join(absent[:5])}"
        hint = near_path(absent[0]) if absent else ""
        raise UserError(what if absent else f"no file is named like {data}", f"{hint}Check the path.")
    return list(dict.fromkeys(found))


def common_folder(paths: list[Path]) -> Path:
    """Return the deepest folder that holds all these files."""
    return Path(os.path.commonpath([path.parent.absolute() for path in paths]))


def _expand_braces(text: str) -> list[str]:
    """Return all texts that the braces stand for; a range keeps its leading zeros."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first:
            raise UserError(f"{text}: {{{match[1]}}} counts down", "Write the smaller number first.")
        words = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    elif "," in match[1]:
        words = match[1].split(",")
    else:
        raise UserError(
            f"{text}: {{{match[1]}}} is not a range", "Write {000..009} or {a,b}; quote it in the shell."
        )
    before, after = text[: match.start()], text[match.end() :]
    return [expanded for word in words for expanded in _expand_braces(before + word + after)]


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a folder and of its subfolder data, as on the hub; none where it holds images."""
    files = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    if files and any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()):
        return []
    return sorted(files)
