"""Masks and control images in files that are named like their images."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...config import CONTROLS, Control
from ...errors import UserError, few, plural
from ...utils.names import composed, near_path
from .annotations import DataRequest, counted_controls
from .files import File, Folder, file_key, list_folder

MASK_ENDING, CONTROL_ENDING = "-mask", "-control"


def files_beside(images: Iterable[str], listed: Container[str], ending: str) -> dict[str, list[str]]:
    """Find the files among images that are named like another one with ``ending`` added, by the name of that image.

    What the metadata list as an image (``listed``) is one, whatever its name. Several such files of an image have
    different formats.
    """
    by_stem: dict[str, list[str]] = {}
    for name in images:
        by_stem.setdefault(stem_of(name), []).append(name)
    stems: set[str] = set()  # of images
    beside: dict[str, list[str]] = {}
    for stem in sorted(by_stem, key=len):  # an image's stem is shorter than its mask's
        base = stem.removesuffix(ending)
        if base != stem and base in stems and not any(name in listed for name in by_stem[stem]):
            beside |= dict.fromkeys(by_stem[base], by_stem[stem])
        else:
            stems.add(stem)
    return beside


def choose_files(
    folder: Folder, listed: Mapping[str, str], beside: Mapping[str, list[str]], what: str
) -> dict[str, File]:
    """Return the one file of every image that has any, listed in the metadata or beside it.

    Args:
        what: they are, in one word or two.

    Raises:
        UserError: an image has several, and they differ.
    """
    found, root = dict(listed), folder.root
    for name, others in beside.items():
        for other in others:
            first = found.setdefault(name, other)
            if first != other and file_key(folder.file(first)) != file_key(folder.file(other)):
                flag = "--masks" if what == "mask" else "--control"
                raise UserError(
                    f"{root / name} has two {what}s that differ: {root / first} and {root / other}",
                    f"Keep one of them (move the other away), or use {flag} none.",
                )
    return {name: folder.file(other) for name, other in found.items()}


class ControlFiles(NamedTuple):
    """The control images of a folder.

    Attributes:
        files: kind -> files by the name of the image.
        names: of files in the folder that are control images, and so no images of the set.
        notes: lines for the user.
    """

    files: Mapping[Control, Mapping[str, File]]
    names: frozenset[str]
    notes: tuple[str, ...]


def find_controls(
    folder: Folder,
    listed: Mapping[Control, Mapping[str, str]],
    rows: Container[str],
    request: DataRequest,
) -> ControlFiles:
    """Find the control images that are asked for: those that the metadata list, else those of the folder of control
    images, or in files beside the images.

    A file ``cat-control.png`` is of the kind that is asked for; of several kinds they say theirs
    (``cat-control-image.png``), and have folders of their own in the folder of control images.

    Args:
        listed: kind -> those in the metadata, by the name of the image.
        rows: names of images in the metadata.

    Raises:
        UserError: an image has two of a kind that differ; there is no such folder.
    """
    endings = (CONTROL_ENDING, *(f"{CONTROL_ENDING}-{kind}" for kind in CONTROLS))
    beside = {
        ending: files_beside(folder.images, rows, ending)
        for ending in endings
        if any(f"{ending}." in name for name in folder.images)
    }
    named = {other for found in beside.values() for others in found.values() for other in others}
    if not request.control:
        what = f"{plural(len(named), 'file')} named like control images are images of the set"
        reads = f"{what} (--control image or labels reads them as such): {few(sorted(named))}"
        return ControlFiles({}, frozenset(), (reads,) if named else ())
    files: dict[Control, dict[str, File]] = {}
    names = {*named, *(other for found in listed.values() for other in found.values())}
    for kind in request.control:
        own, alone = listed.get(kind, {}), len(request.control) == 1
        if request.control_folder is None:
            called: dict[str, list[str]] = {}
            for ending in (CONTROL_ENDING, f"{CONTROL_ENDING}-{kind}")[not alone :]:
                for name, others in beside.get(ending, {}).items():
                    called.setdefault(name, []).extend(others)
            files[kind] = choose_files(folder, own, called, "control image")
        else:
            root = Path(request.control_folder).expanduser()
            found, within = _in_folder(folder, root if alone else root / kind, kind)
            files[kind] = found | {name: folder.file(other) for name, other in own.items()}
            names |= within
    counted = counted_controls(kind for kind, found in files.items() for _ in found)
    return ControlFiles(files, frozenset(names), tuple(counted))


def _in_folder(folder: Folder, root: Path, kind: Control) -> tuple[dict[str, File], set[str]]:
    """Return the files of a folder of control images by the names of their images, and the names of those in it that
    ``folder`` holds as well."""
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}", near_path(str(root)).strip() or "Check --control-folder."
        )
    other, (here, there) = list_folder(root), (root.resolve(), folder.root.resolve())
    inside = f"{here.relative_to(there).as_posix()}/" if here.is_relative_to(there) else None
    within = {name for name in folder.images if inside is not None and name.startswith(inside)}
    stems = {stem_of(name): name for name in other.images}
    own: dict[str, File] = {}
    for ending in (f"{CONTROL_ENDING}-{kind}", CONTROL_ENDING, ""):  # the image's own name comes first
        own |= {
            stem.removesuffix(ending): other.file(n) for stem, n in stems.items() if stem.endswith(ending)
        }
    return {name: own[stem_of(name)] for name in folder.images if stem_of(name) in own}, within


def stem_of(name: str) -> str:
    """Return the name without its suffix, equal for all Unicode spellings of it."""
    return os.path.splitext(composed(name))[0]  # noqa: PTH122 (a `Path` for each of many files takes long)
