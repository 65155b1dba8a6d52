"""The files of a folder, or of an archive that is read as one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.files import decode
from .members import CAPTION_BYTES, File, Member, read_bytes

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
)  # fmt: skip

CAPTIONS = (".txt", ".caption")  # of a file beside an image that holds its caption


@dataclass(frozen=True)
class Folder:
    """The images below a folder: paths relative to ``root`` in posix form, sorted."""

    root: Path
    images: tuple[str, ...]
    ignored: tuple[str, ...]  # hidden and macOS resource files that carry an image's suffix
    others: tuple[str, ...]  # files that are no images by their name
    closed: tuple[str, ...] = field(default=(), kw_only=True)  # folders that could not be listed, and why

    @property
    def direct(self) -> list[str]:
        return [name for name in self.images if "/" not in name]

    def per_subfolder(self) -> Counter[str]:
        """Number of images below each first-level subfolder, by name."""
        return Counter(name.split("/")[0] for name in sorted(self.images) if "/" in name)

    def suffixes(self) -> Counter[str]:
        """Return the number of files that are no images, by their suffix in lower case."""
        return Counter(_suffix(name) for name in self.others)

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
    """All images below ``root`` (links are followed once). Hidden files and folders are never images.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    images: list[str] = []
    ignored: list[str] = []
    others: list[str] = []
    seen = set[str]()
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
            if _suffix(file) in SUFFIXES:
                (ignored if file.startswith(".") else images).append(within + file)
            else:
                others.append(within + file)
    if any(Path(error.filename) == root for error in closed):
        raise closed[0]
    told = tuple(f"{error.filename} ({(error.strerror or '').lower()})" for error in closed)
    return Folder(root, tuple(sorted(images)), tuple(sorted(ignored)), tuple(sorted(others)), closed=told)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path for each of many files takes long)


@dataclass(frozen=True)
class Sidecars:
    """Captions in files beside the images.

    Attributes:
        texts: caption by the image's name, white space made single; "" where its file is empty.
        files: every file that is one.
        clashes: images with captions that differ, with their files.
    """

    texts: Mapping[str, str]
    files: frozenset[str]
    clashes: tuple[str, ...]


def read_sidecars(folder: Folder) -> Sidecars:
    """Read the captions of ``cat.png``: ``cat.txt``, ``cat.caption``, ``cat.png.txt``, in lower or upper case.

    Raises:
        UserError: one of the files is no UTF-8 text, or larger than ``CAPTION_BYTES``.
    """
    images: dict[str, list[str]] = {}
    for name in folder.images if any(_suffix(name) in CAPTIONS for name in folder.others) else ():
        for called in {name, os.path.splitext(name)[0]}:  # noqa: PTH122 (as in _suffix)
            images.setdefault(called, []).append(name)
    found: dict[str, dict[str, str]] = {}  # image -> file -> caption
    files = set()
    for name in folder.others:
        described = images.get(os.path.splitext(name)[0], []) if _suffix(name) in CAPTIONS else []  # noqa: PTH122
        if described:
            files.add(name)
            raw = read_bytes(folder.file(name), CAPTION_BYTES)
            text = " ".join(decode(raw, str(folder.root / name)).split())
            for image in described:
                found.setdefault(image, {})[name] = text
    texts = {image: max(told.values(), key=bool) for image, told in sorted(found.items())}
    clashes = [
        f"{image} ({', '.join(told)})"
        for image, told in sorted(found.items())
        if len({text for text in told.values() if text}) > 1
    ]
    return Sidecars(texts, frozenset(files), tuple(clashes))
