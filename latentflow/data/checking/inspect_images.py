"""Inspection of images, each decoded once, on all cores, and again only when its file changes; near duplicates."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ...errors import UserError
from ..cache.eviction import LOOKS, cache_root
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
        tqdm(total=len(source), desc="checking images", unit=" images", disable=not progress or None) as bar,
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


# ---------------------------------------------------------------- the cache

_VERSION = 2  # raise it when fields of ImageInfo change, or their meaning
_AT_ONCE = 1024  # rows that are written at once: a disk may take 20 ms to store anything safely
_FIELDS = [f.name for f in dataclasses.fields(ImageInfo) if not f.name.endswith("error")]
_FLAGS = ("rotated", "animated")


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
        if row is None:
            return None
        values = dict(zip(_FIELDS, row, strict=True))
        return ImageInfo(**values | {flag: bool(values[flag]) for flag in _FLAGS})

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


# Near duplicates are one image saved twice, at another size, quality or format, or cropped by a percent or two: their
# perceptual hashes differ in at most ``BITS`` of 64 bits, and, as hashes of different images also meet by chance, their
# thumbnails by at most ``LEVELS`` of 255 (root mean square) and their aspect ratios by at most 5 %. Mirror images are
# not.
BITS = 6
LEVELS = 4.0
ASPECT = 0.05
_BANDS = 8  # of 8 bits: where 6 bits differ at most, two bands at least are equal
_MOST_NEIGHBOURS = 200  # images that one is compared with in one table, which bounds the time on any data


def near_duplicates(
    hashes: NDArray[np.int64], thumbnails: NDArray[np.uint8], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of the group (N,) that each image belongs to. A group grows from pair to pair.

    Args:
        hashes: (N,) perceptual hashes.
        thumbnails: (N, D) pixels.
        sizes: (N, 2) widths and heights.
    """
    aspects = np.log(sizes[:, 0] / sizes[:, 1]).astype(np.float32)
    # Copies are compared once: thousands of equal blank pages would make millions of pairs.
    records = np.concatenate(
        [hashes[:, None].view(np.uint8), thumbnails, aspects[:, None].view(np.uint8)], axis=1
    )
    _, first, copies = np.unique(records, axis=0, return_index=True, return_inverse=True)
    labels = _grouped(hashes[first].view(np.uint64), thumbnails[first], aspects[first])
    return labels[copies.reshape(-1)]


def _grouped(
    hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8], aspects: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return groups (N,) joined by near pairs. Only images that agree in two bands of their hashes are compared."""
    bands = hashes[:, None].view(np.uint8).astype(np.uint16)
    labels = np.arange(len(hashes))
    for first, second in combinations(range(_BANDS), 2):
        keys = bands[:, first] << 8 | bands[:, second]
        order = np.lexsort((hashes, keys))
        keys = keys[order]
        alive = np.arange(len(keys))
        for step in range(1, _MOST_NEIGHBOURS):
            alive = alive[: np.searchsorted(alive, len(keys) - step)]
            alive = alive[keys[alive] == keys[alive + step]]
            if not len(alive):
                break
            a, b = order[alive], order[alive + step]
            # In a film nearly all pairs are near: those within one group already are neither compared nor kept.
            close = (labels[a] != labels[b]) & (np.bitwise_count(hashes[a] ^ hashes[b]) <= BITS)
            labels = _merged(labels, _verified(a[close], b[close], thumbnails, aspects))
    return labels


def _merged(labels: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the groups after joining those of each pair (P, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return labels
    edges = labels[pairs]
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(len(labels),) * 2)
    joined: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return joined[labels].astype(np.int64)


def _verified(
    a: NDArray[np.int64], b: NDArray[np.int64], thumbnails: NDArray[np.uint8], aspects: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the pairs (P, 2) among candidates ``a`` and ``b`` that are near by shape and thumbnail."""
    alike = np.abs(aspects[a] - aspects[b]) <= ASPECT
    a, b = a[alike], b[alike]
    difference = thumbnails[a].astype(np.float32) - thumbnails[b]
    near = np.square(difference).mean(axis=1) <= LEVELS**2
    return np.stack([a[near], b[near]], axis=1)
