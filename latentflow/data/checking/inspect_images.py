"""Inspection of images, each decoded once, on all cores, and again only when its file changes; near duplicates."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from ...errors import UserError, few, one_line, plural
from ...utils.progress import progress_bar
from ..cache.store import LOOKS, cache_root
from ..dataset import Example, FileExample, Source
from ..images import ImageFileError, decoding, name_of, to_rgb
from ..sources.files import Member

log = logging.getLogger(__name__)

THUMBNAIL = 8  # pixels, the side of the thumbnails by which near duplicates are compared
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = range(5, 9)  # orientations that swap width and height
_ENOUGH = 128  # pixels of the short side that a perceptual hash needs
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")
_TASK = 32  # images that a worker is given at once
_MANY = 1000  # images from which starting processes pays
MOST_UNREADABLE = 0.05  # a larger share hints at a broken copy rather than a few bad files


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The properties of one image, or the reason why it cannot be read.

    Attributes:
        width, height: after EXIF rotation.
        mode, format: Pillow's names.
        rotated: whether EXIF turns or mirrors it.
        animated: whether it has more frames than the first, which is the one that is used.
        key: the example's content key.
        hash: perceptual hash (64 bits, as a signed number): few bits differ between copies of one image.
        thumbnail: RGB pixels, ``THUMBNAIL`` x ``THUMBNAIL``, row by row.
        mask_width, mask_height: of its mask, 0 where there is none.
        profile: the name of its colour profile where that is another than sRGB.
        profile_problem: why the profile cannot be used.
        error: why it cannot be used; everything else is then empty.
        mask_error: why its mask cannot be used.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    rotated: bool = False
    animated: bool = False
    key: str = ""
    hash: int = 0
    thumbnail: bytes = b""
    mask_width: int = 0
    mask_height: int = 0
    profile: str = ""
    profile_problem: str = ""
    error: str | None = None
    mask_error: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def mask_size(self) -> tuple[int, int] | None:
        return (self.mask_width, self.mask_height) if self.mask_width else None


def inspect_image(example: Example) -> ImageInfo:
    """Decode an image and its mask. What cannot be read is a result, not an error."""
    try:
        info = _inspect(example)
    except UserError as error:
        return ImageInfo(error=error.why if isinstance(error, ImageFileError) else error.what)
    try:
        mask = example.open_mask()
    except UserError as error:
        return dataclasses.replace(info, mask_error=error.what)
    return info if mask is None else dataclasses.replace(info, mask_width=mask.width, mask_height=mask.height)


def _inspect(example: Example) -> ImageInfo:
    with example.open() as image:
        width, height = image.size
        mode, format = image.mode, image.format or ""
        with decoding(name_of(image)):
            # A JPEG is decoded at an eighth of its size where that is enough: all its data are read, the fewer
            # pixels only save time.
            image.draft(None, (_ENOUGH, _ENOUGH))  # None keeps the mode
            image.load()
            orientation = image.getexif().get(_ORIENTATION, 1)
            animated = format != "MPO" and bool(getattr(image, "is_animated", False))
            upright = ImageOps.exif_transpose(image)
        hash, thumbnail = _perceptual_hash(upright)
    if orientation in _TURNED:
        width, height = height, width
    profile = example.profile()
    return ImageInfo(
        width, height, mode, format, orientation != 1, animated, example.content_key(), hash, thumbnail,
        profile=profile.name if profile is not None else "",
        profile_problem=profile.problem if profile is not None else "",
    )  # fmt: skip


def _perceptual_hash(upright: Image.Image) -> tuple[int, bytes]:
    """Return the perceptual hash and the thumbnail of an image."""
    import imagehash

    factor = min(upright.size) // _ENOUGH
    if factor > 1 and upright.mode in _REDUCIBLE and "transparency" not in upright.info:
        upright = upright.reduce(factor)
    small = to_rgb(upright).resize((64, 64), Image.Resampling.BOX)
    bits = np.packbits(imagehash.phash(small).hash)
    thumbnail = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return int(bits.view(np.dtype(">i8"))[0]), thumbnail.tobytes()


def inspect_images(source: Source, progress: bool = True) -> Iterator[ImageInfo]:
    """Yield the properties of every image of ``source``, in its order; known ones come from the cache.

    Raises:
        UserError: a process that decodes images was killed.
    """
    waiting: deque[tuple[list[Example], list[ImageInfo | None], Future[list[ImageInfo]] | None]] = deque()
    examples = iter(source.examples)
    with (
        _Inspected(source) as inspected,
        _workers(source) as pool,
        progress_bar(total=len(source), desc="checking images", unit="image", hidden=not progress) as bar,
    ):
        while True:
            while len(waiting) < 8 * _cores() and (task := list(islice(examples, _TASK))):
                known = [inspected.get(example) for example in task]
                new = [example for example, info in zip(task, known, strict=True) if info is None]
                waiting.append((task, known, pool.submit(_inspect_all, new) if new else None))
            if not waiting:
                return
            task, known, future = waiting.popleft()
            fresh = iter(_result(future) if future else [])
            for example, info in zip(task, known, strict=True):
                if info is None:
                    info = next(fresh)
                    inspected.add(example, info)
                yield info
                bar.update()


def _inspect_all(examples: list[Example]) -> list[ImageInfo]:
    return [inspect_image(example) for example in examples]


def _result(future: Future[list[ImageInfo]]) -> list[ImageInfo]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes images was killed, probably for want of memory",
            "Start again: the images that were inspected are remembered. An image of very many pixels may be the "
            "reason.",
        ) from None


def _workers(source: Source) -> Executor:
    """Return processes where they pay: most of the time goes to Python between Pillow's calls, which threads share."""
    import imagehash  # noqa: F401 (once: workers start as copies of this process)

    plain = all(isinstance(e, FileExample) and not isinstance(e.path, Member) for e in source.examples)
    # Where processes do not start as copies of this one, they would spend longer on importing torch.
    if len(source) >= _MANY and plain and "fork" in multiprocessing.get_all_start_methods():
        return ProcessPoolExecutor(_cores(), multiprocessing.get_context("fork"), _end_with_parent)
    return ThreadPoolExecutor(_cores())


def _end_with_parent() -> None:
    """End this worker when the process that it works for is killed; it would wait for work without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- before training


def readable(source: Source) -> Source:
    """Return the source without the images that cannot be decoded; its notes name them. Nothing is ever deleted.

    Raises:
        UserError: more than 5 % cannot be decoded, or none is left.
    """
    if source.precomputed:
        return source  # checked when it was made
    notable = {
        example.name: info
        for example, info in zip(source.examples, inspect_images(source), strict=True)
        if info.error is not None or info.profile
    }
    errors = {name: info.error for name, info in notable.items() if info.error is not None}
    profiles, unusable = profiles_of(notable)
    notes = [profile_line(profiles)] if profiles else []
    if profiles and any(isinstance(e, FileExample) and e.colours == "stored" for e in source.examples):
        count = sum(profiles.values())
        notes = [
            f"{plural(count, 'image')} with another colour profile than sRGB, not used (--colours stored)"
        ]
    notes += profile_warnings(unusable)
    if problems := unreadable_problems(errors, len(source)):
        raise UserError(
            problems[0], "Repair them or move them away; `latentflow check DATA --json` lists them all."
        )
    if errors:
        all_names = "; `latentflow check DATA --json` names all" if len(errors) > 5 else ""
        what = f"{plural(len(errors), 'image')} cannot be read, left out"
        notes.append(f"{what}: {list_reasons(errors)}{all_names}")
        source = source.subset([row for row, e in enumerate(source.examples) if e.name not in errors])
    return source.noted(*map(one_line, notes)) if notes else source


def counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def profiles_of(infos: Mapping[str, ImageInfo]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of images of each colour profile other than sRGB, and by image why one cannot be used."""
    profiles = counted(info.profile for info in infos.values() if info.profile and not info.profile_problem)
    return profiles, {name: info.profile_problem for name, info in infos.items() if info.profile_problem}


def profile_warnings(unusable: Mapping[str, str]) -> list[str]:
    what = f"{plural(len(unusable), 'image')} with a colour profile that cannot be used, read as sRGB"
    return [f"{what}: {list_reasons(unusable)}"] if unusable else []


def unreadable_problems(unreadable: Mapping[str, str], images: int) -> list[str]:
    share = len(unreadable) / images
    if share <= MOST_UNREADABLE:
        return []
    what = f"{len(unreadable)} of {plural(images, 'image')} cannot be read ({share:.0%}; the limit is 5%)"
    return [one_line(f"{what}: {list_reasons(unreadable)}")]


def profile_line(profiles: Mapping[str, int]) -> str:
    """Return a line on the images whose colours are converted from these profiles."""
    count = sum(profiles.values())
    return (
        f"{plural(count, 'image')} with another colour profile than sRGB, converted: {list_counts(profiles)}"
    )


def list_counts(counts: Mapping[str, int], limit: int = 5) -> str:
    return few([f"{name} ({count})" for name, count in counts.items()], limit)


def list_reasons(reasons: Mapping[str, str]) -> str:
    return few([f"{name} ({why})" for name, why in reasons.items()])


# ---------------------------------------------------------------- the cache

_VERSION = 2  # raise it when fields of ImageInfo change, or their meaning
_AT_ONCE = 1024  # rows that are written at once: a disk may take 20 ms to store anything safely
_FIELDS = [f.name for f in dataclasses.fields(ImageInfo) if not f.name.endswith("error")]


class _Inspected:
    """Images that were inspected before, in a small database in the cache; valid while size and time of files are.

    Only images that can be read are remembered: the reason why one cannot may pass.
    """

    def __init__(self, source: Source) -> None:
        root = cache_root()
        inside = source.root is not None and root.resolve().is_relative_to(source.root.resolve())
        self._path = None if inside else root / LOOKS.format(_VERSION)
        self._database: sqlite3.Connection | None = None
        self._new: list[tuple[object, ...]] = []  # rows that are not written yet

    def __enter__(self) -> _Inspected:
        with self._going_on_without():
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Threads take turns; other processes are waited for.
                self._database = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
                columns = ", ".join(_FIELDS)
                self._database.execute(
                    f"CREATE TABLE IF NOT EXISTS looks (place BLOB PRIMARY KEY, state TEXT, {columns})"
                )
                os.utime(self._path)  # the cache makes room by removing what was not used for longest
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        if self._database is not None:
            self._database.close()

    def get(self, example: Example) -> ImageInfo | None:
        row = None
        if self._database is not None and (place := _place(example)) is not None:
            with self._going_on_without():
                row = self._database.execute(
                    f"SELECT {', '.join(_FIELDS)} FROM looks WHERE place = ? AND state = ?", place
                ).fetchone()
        return None if row is None else ImageInfo(**dict(zip(_FIELDS, row, strict=True)))

    def add(self, example: Example, info: ImageInfo) -> None:
        if not (info.error or info.mask_error) and (place := _place(example)) is not None:
            self._new.append((*place, *(getattr(info, name) for name in _FIELDS)))
        if len(self._new) >= _AT_ONCE:
            self._write()

    def _write(self) -> None:
        rows, self._new = self._new, []
        if self._database is not None and rows:
            marks = ", ".join("?" * len(rows[0]))
            with self._going_on_without(), self._database:
                self._database.executemany(f"INSERT OR REPLACE INTO looks VALUES ({marks})", rows)

    @contextmanager
    def _going_on_without(self) -> Iterator[None]:
        """Warn of an error of the database or the disk, and go on without remembering."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            log.warning(
                "inspected images cannot be remembered in %s (%s): going on without; delete the file if it is damaged",
                self._path,
                error,
            )
            if self._database is not None:
                self._database.close()
                self._database = None


def _place(example: Example) -> tuple[bytes, str] | None:
    """Return the place of an image, and the state of its files there; None where a file is gone."""
    files = [example.path if isinstance(example, FileExample) else example.content_key(), example.mask]
    try:
        states = [_state(file) if isinstance(file, Path) else repr(file) for file in files]
    except OSError:
        return None
    place = os.fsencode(files[0].absolute()) if isinstance(files[0], Path) else repr(files[0]).encode()
    alpha = b" alpha" if files[0] == files[1] else b""
    stored = b" stored" if isinstance(example, FileExample) and example.colours == "stored" else b""
    return place + alpha + stored, f"{PIL.__version__} {states}"


def _state(file: Path) -> str:
    state = file.stat()
    return f"{os.fsencode(file)!r} {state.st_size} {state.st_mtime_ns}"
