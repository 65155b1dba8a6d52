"""The files of a folder, or of an archive that is read as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from latentflow.errors import UserError

from .members import File, Member, read_bytes

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """The pictures below a folder: paths relative to ``root`` in posix form, sorted."""

    root: Path
    images: tuple[str, ...]
    ignored: tuple[str, ...]  # hidden and macOS resource files that carry a picture's suffix
    others: Mapping[str, int]  # suffix -> number of files that are not read
    closed: tuple[str, ...] = field(default=(), kw_only=True)  # folders that could not be listed, and why

    @property
    def direct(self) -> list[str]:
        return [name for name in self.images if "/" not in name]

    def per_subfolder(self) -> Counter[str]:
        """Number of pictures below each first-level subfolder, by name."""
        return Counter(name.split("/")[0] for name in sorted(self.images) if "/" in name)

    def holds(self, name: str) -> bool:
        return (self.root / name).is_file()

    def file(self, name: str) -> File:
        return self.root / name


@dataclass(frozen=True)
class ArchivedFolder(Folder):
    """A folder in an archive; ``root`` is the archive's path, for messages."""

    members: Mapping[str, Member]

    def holds(self, name: str) -> bool:
        return name in self.members

    def file(self, name: str) -> File:
        return self.members[name]


def list_folder(root: Path) -> Folder:
    """All pictures below ``root`` (links are followed once). Hidden files and folders are never pictures.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    images: list[str] = []
    ignored: list[str] = []
    others, seen = Counter[str](), set[str]()
    closed: list[OSError] = []
    for here, folders, files in os.walk(root, followlinks=True, onerror=closed.append):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        within = "" if (relative := Path(here).relative_to(root).as_posix()) == "." else relative + "/"
        for file in files:
            suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 (a Path for each of many files takes long)
            if suffix in SUFFIXES:
                (ignored if file.startswith(".") else images).append(within + file)
            else:
                others[suffix] += 1
    if any(Path(error.filename) == root for error in closed):
        raise closed[0]
    told = tuple(f"{error.filename} ({(error.strerror or '').lower()})" for error in closed)
    return Folder(root, tuple(sorted(images)), tuple(sorted(ignored)), others, closed=told)


def read_sidecars(folder: Folder) -> dict[str, str]:
    """Caption per picture from the ``.txt`` of the same name beside it, white space made single."""
    texts: dict[str, str] = {}
    for name in folder.images if folder.others.get(".txt") else ():
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        if folder.holds(beside):
            texts[name] = " ".join(read_text(folder.file(beside), str(folder.root / beside)).split())
    return texts


def read_text(file: File, name: str) -> str:
    """The text of a UTF-8 file, line ends as they are.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}", "Save it as UTF-8.") from None
