"""A folder of images: its metadata file before texts beside the images before subfolders as classes before nothing."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ...config import Control
from ...errors import UserError, did_you_mean, few, plural, shown
from ...utils.files import decode, storable
from ...utils.names import composed, near_name
from ..dataset import Kind, Source
from .annotations import (
    CONTROL_COLUMNS,
    DataRequest,
    Found,
    RowAnnotation,
    annotated_example,
    build_source,
    choose_condition,
    our_columns,
    parse_row,
    text_in,
    unused,
    unused_columns,
)
from .beside import MASK_ENDING, choose_files, files_beside, find_controls, stem_of
from .files import (
    CAPTION_BYTES,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Folder,
    list_folder,
    read_bytes,
    suffix_of,
)
from .records import read_records

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_LACKS = "metadata.jsonl (file_name, text, label), a .txt beside each image, or a subfolder for each class"
_FOREIGN = (".heic", ".heif", ".svg", ".psd", ".raw", ".cr2", ".nef", ".arw", ".dng", ".jxl", ".eps", ".pdf")
_VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
_PACKED = (".tar", ".zip", ".parquet", ".arrow")
_SYSTEM = ("thumbs.db", "desktop.ini", "icon\r")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


# ---------------------------------------------------------------- metadata


@dataclass(frozen=True)
class Metadata:
    """The metadata file of a folder; empty where there is none.

    Attributes:
        name: the file's name.
        rows: annotations by the image's name, in the order of the file.
        masks: names of masks by the image's name.
        controls: kind -> names of its control images, by the image's name.
        others: names of control images of kinds that are not asked for, where another is: no images of the set.
        unused: columns that are not read.
    """

    name: str = ""
    rows: Mapping[str, RowAnnotation] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[Control, Mapping[str, str]] = field(default_factory=dict)
    others: Set[str] = frozenset()
    unused: tuple[str, ...] = ()

    @property
    def has_label(self) -> bool:
        return any(row.label for row in self.rows.values())

    @property
    def has_text(self) -> bool:
        return any(row.texts for row in self.rows.values())


def read_metadata(folder: Folder, request: DataRequest) -> Metadata:
    """Read the metadata file of a folder, if there is one.

    Raises:
        UserError: there are two; a line cannot be read; a file is listed twice or does not exist.
    """
    found, renamed = [name for name in METADATA_NAMES if folder.holds(name)], request.columns
    if not found and renamed:
        raise UserError(
            f"--columns is given, but {folder.root} has no {' or '.join(METADATA_NAMES)}", "Leave it out."
        )
    if not found:
        return Metadata()
    if len(found) > 1:
        raise UserError(f"{folder.root} holds both {' and '.join(METADATA_NAMES)}", "Keep one of them.")
    path = folder.root / found[0]
    records = list(read_records(folder.file(found[0]), path, renamed.values()))
    columns = dict.fromkeys(name for _, record in records for name in record)
    ours = request.used_columns(our_columns(columns, renamed, str(path), image="file_name"))
    rows: dict[str, RowAnnotation] = {}
    beside: dict[str, dict[str, str]] = {column: {} for column in ("mask", *request.control_columns)}
    others: set[str] = set()
    lines: dict[str, int] = {}
    for line, record in records:
        row, where = {ours[name]: value for name, value in record.items()}, f"{path}, line {line}"
        name = _existing(folder, where, _file_name(row, where))
        if name in rows:
            both = f"lines {lines[name]} and {line}"
            raise UserError(f"{path} lists {name} twice, in {both}", "Keep one of the two lines.")
        lines[name], rows[name] = line, parse_row(row, where)
        for column, files in beside.items():
            if other := text_in(row, column, where):
                files[name] = _existing(folder, where, other)
        for column in CONTROL_COLUMNS if request.control else ():
            if isinstance(left_out := row.get(unused(column)), str):
                others.add(folder.find(left_out) or left_out)
        if beside["mask"].get(name) == name:
            raise UserError(
                f"{where}: {name} is given as its own mask",
                "Name the mask's file, or use --masks alpha to read masks from the alpha channels.",
            )
    masks = beside.pop("mask")
    controls: dict[Control, dict[str, str]] = {}
    for column, kind in request.control_columns.items():
        controls.setdefault(kind, {}).update(beside[column])
    for names, what, column in (
        (rows, "file", "file_name"),
        (masks.values(), "mask", "mask"),
        *((files.values(), "control image", column) for column, files in beside.items()),
    ):
        if absent := [name for name in names if not folder.holds(name)]:
            hint = did_you_mean(near_name(absent[0], folder.images))
            raise UserError(
                f"{path} names {plural(len(absent), what)} that cannot be found: {few(absent)}",
                f"{hint}{column} is relative to the folder of the metadata.",
            )
    return Metadata(found[0], rows, masks, controls, others, tuple(unused_columns(ours, "file_name")))


def _file_name(row: Mapping[str, object], where: str) -> str:
    name = row.get("file_name")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{where}: file_name is {shown(name)}, not a string", "Write it in quotes.")
    if not name:
        raise UserError(
            f"{where} has no file_name (it has {', '.join(row) or 'nothing'})",
            "Name the column file_name; it is relative to the folder of the metadata.",
        )
    return name


def _existing(folder: Folder, where: str, name: str) -> str:
    """Return the file of the folder that a path names, as it is spelled there; the path where there is none."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        hint = did_you_mean(near_name(name, folder.images))
        raise UserError(f"{where}: {name} leads out of the folder", f"{hint}Give a path below it.")
    return folder.find(relative.as_posix()) or relative.as_posix()


# ---------------------------------------------------------------- captions beside the images


@dataclass(frozen=True)
class Sidecars:
    """Captions in files beside the images.

    Attributes:
        texts: caption by the image's name, white space made single; "" where its file is empty.
        files: the files that hold them.
        clashes: images with captions that differ, with their files.
    """

    texts: Mapping[str, str]
    files: frozenset[str]
    clashes: tuple[str, ...]

    @property
    def endings(self) -> str:
        return " and ".join(e for e in CAPTION_SUFFIXES if any(suffix_of(name) == e for name in self.files))


def read_sidecars(folder: Folder) -> Sidecars:
    """Read the captions of ``cat.png``: ``cat.txt``, ``cat.caption``, ``cat.png.txt``, in lower or upper case.

    Raises:
        UserError: one of the files is not UTF-8 text, or larger than ``CAPTION_BYTES``.
    """
    sidecars = [name for name in folder.others if suffix_of(name) in CAPTION_SUFFIXES]
    described: dict[str, list[str]] = {}  # images by their name, and by their name without its suffix
    for image in folder.images if sidecars else ():
        for stem in {composed(image), stem_of(image)}:
            described.setdefault(stem, []).append(image)
    found: dict[str, dict[str, str]] = {}  # image -> file -> caption
    for name in sidecars:
        if images := described.get(stem_of(name)):
            raw = read_bytes(folder.file(name), CAPTION_BYTES)
            text = " ".join(decode(raw, str(folder.root / name)).split())
            for image in images:
                found.setdefault(image, {})[name] = text
    texts = {image: max(captions.values(), key=bool) for image, captions in sorted(found.items())}
    clashes = [
        f"{image} ({', '.join(captions)})"
        for image, captions in sorted(found.items())
        if len({composed(text) for text in captions.values() if text}) > 1
    ]
    return Sidecars(
        texts, frozenset(name for captions in found.values() for name in captions), tuple(clashes)
    )


# ---------------------------------------------------------------- the source


def read_folder(data: str, request: DataRequest) -> Source:
    """Return the images of a folder on disk; see ``folder_source``."""
    return folder_source(data, list_folder(Path(data).expanduser()), request)


def folder_source(data: str, folder: Folder, request: DataRequest) -> Source:
    """Return the source of a folder's images.

    Raises:
        UserError: the folder is empty or of the wrong level; metadata cannot be understood or contradict the texts
            beside the images; captions or classes are missing; an image has two different masks or control images.
    """
    metadata = read_metadata(folder, request)
    beside = files_beside(folder.images, metadata.rows, MASK_ENDING)
    named = sorted({mask for masks in beside.values() for mask in masks})
    controls = find_controls(folder, metadata.controls, metadata.rows, request)
    no_images = {*named, *metadata.masks.values(), *controls.names, *metadata.others} - metadata.rows.keys()
    folder = dataclasses.replace(folder, images=tuple(n for n in folder.images if n not in no_images))
    if not folder.images:
        raise _no_images(folder)
    sidecars = read_sidecars(folder)
    kind, notes = _decide(folder, metadata, sidecars, request)
    if kind == "text":
        _refuse_contradiction(metadata, sidecars)
    masks = choose_files(folder, metadata.masks, beside, "mask") if request.masks == "auto" else {}
    captioned = metadata.has_text or bool(sidecars.texts)
    by_subfolder = not metadata.has_label and (kind == "class" or (kind == "text" and not captioned))
    examples = []
    for name in folder.images:
        row = metadata.rows.get(name, RowAnnotation())
        if not row.texts and (text := sidecars.texts.get(name)):
            row = dataclasses.replace(row, texts=(text,))
        if by_subfolder:
            # A folder's name may be no text, which a class must be.
            label = storable(name.split("/")[0]) if "/" in name else None
            row = dataclasses.replace(row, label=label)
        led = {kind: files[name] for kind, files in controls.files.items() if name in files}
        examples.append(annotated_example(name, folder.file(name), masks.get(name), row, led))
    if metadata.masks:
        notes.append(f"masks of {plural(len(metadata.masks), 'image')} in the metadata{request.unused_masks}")
    if named:
        what = f"{plural(len(named), 'mask')} in files beside the images"
        notes.append(f"{what}{request.unused_masks}: {few(named)}")
    notes += [*controls.notes, *_left_out(folder, metadata, sidecars)]
    hint = _stray_caption(
        folder, sidecars, [example.name for example in examples if kind == "text" and not example.text]
    )
    root = folder.root if folder.root.is_dir() else None
    return build_source(data, examples, kind, request, notes, root, caption_hint=hint)


def _stray_caption(folder: Folder, sidecars: Sidecars, without: Sequence[str]) -> str:
    """Return a question that names a file which probably holds the caption of an image ``without`` one; "" if none
    does."""
    strays = [
        name for name in folder.others if suffix_of(name) in CAPTION_SUFFIXES and name not in sidecars.files
    ]
    for image in without[:5]:
        if near := near_name(image, strays):
            return f"Is {near} the caption of {image}? Then name it like the image. "
    return ""


def _decide(
    folder: Folder, metadata: Metadata, sidecars: Sidecars, request: DataRequest
) -> tuple[Kind, list[str]]:
    """Choose what to condition on, and write notes on where it comes from and what is not used."""
    described, auto = metadata.has_text, request.condition == "auto"
    labelled = metadata.has_label
    origins = [metadata.name] * described
    origins += [f"{sidecars.endings} files beside the images"] * bool(sidecars.texts)
    found = [Found("text", "captions", " and ".join(origins))] if origins else []
    # A single subfolder is where the images lie, unless it is asked for or there is nothing else.
    if labelled or len(folder.per_subfolder()) > (1 if auto and origins else 0):
        classes = Found("class", "classes", metadata.name if labelled else "subfolders")
        found.insert(0 if labelled and not described else len(found), classes)
    kind, notes = choose_condition(found, request, str(folder.root), _LACKS)
    if kind == "text" and not (auto and described):
        _refuse_splits(folder)
    elif kind == "class" and auto and not labelled:
        _refuse_wrong_level(folder)
    return kind, notes


def _refuse_contradiction(metadata: Metadata, sidecars: Sidecars) -> None:
    if sidecars.clashes:
        raise UserError(
            f"{plural(len(sidecars.clashes), 'image')} with captions that differ: {few(sidecars.clashes)}",
            "Keep one caption file for each image, or use --condition class|none.",
        )
    clash = [
        name for name, text in sidecars.texts.items()
        if (row := metadata.rows.get(name))
        and row.texts
        and composed(text) not in {composed(" ".join(caption.split())) for caption in row.texts}
    ]  # fmt: skip
    if clash:
        raise UserError(
            f"{metadata.name} and the {sidecars.endings} files differ on {plural(len(clash), 'image')}: {few(clash)}",
            "Keep one of the two (rename the other), or use --condition class|none.",
        )


def _no_images(folder: Folder) -> UserError:
    what = f"there are no images in {folder.root} or below it"
    if folder.hidden:
        what += (
            f" except {plural(len(folder.hidden), 'hidden or macOS resource file')} ({few(folder.hidden)})"
        )
    held = folder.count_others()
    what += f"; it holds other files: {held}" if held else "; it is empty"
    if folder.closed:
        what += f"; {plural(len(folder.closed), 'folder')} in it cannot be opened: {few(folder.closed)}"
    fix = f"Images end in {', '.join(IMAGE_SUFFIXES)}."
    if folder.count_others(_FOREIGN):
        fix += " Convert others to PNG or JPEG."
    if folder.count_others(_VIDEOS):
        fix += " Of a video, save frames as images."
    return UserError(what, fix)


def _refuse_splits(folder: Folder) -> None:
    """Refuse to mix the parts of one data set (train, test), which are no classes either."""
    counts = folder.per_subfolder()
    parts = [name for name in counts if name.lower() in _SPLITS]
    described = [name for name in counts if any((folder.root / name / m).is_file() for m in METADATA_NAMES)]
    if folder.direct or not (described or (parts and len(parts) == len(counts))):
        return
    best = next((name for name in counts if name.lower().startswith("train")), (described or parts)[0])
    why = f"metadata in {few(described)}" if described else "parts of one data set"
    raise UserError(
        f"{folder.root} is one level too high: its images lie in {_counted(counts)} ({why})",
        f"Give one of them: {folder.root / best}",
    )


def _refuse_wrong_level(folder: Folder) -> None:
    """Refuse to take subfolders for classes where that is hardly meant."""
    _refuse_splits(folder)
    counts = folder.per_subfolder()
    if folder.direct:
        raise UserError(
            f"{folder.root} itself holds {plural(len(folder.direct), 'image')}, its subfolders hold others: "
            f"{_counted(counts)}",
            "Move every image into the subfolder of its class, or use --condition none for all of them.",
        )
    if len(counts) == 1 or not any(name.count("/") == 1 for name in folder.images):
        parents = Counter(name.rsplit("/", 1)[0] for name in folder.images)
        deepest = os.path.commonpath(list(parents))
        fix = "Give one of these folders, or use --condition class to take the first level as classes"
        if deepest:
            fix = f"Give the folder that holds the images or the class folders, {folder.root / deepest}"
        raise UserError(
            f"there are no images in {folder.root} itself; they were found in {_counted(parents)}",
            f"{fix}; or --condition none for all of them together.",
        )


def _counted(counts: Mapping[str, int]) -> str:
    return few([f"{name}/ ({n})" for name, n in counts.items()])


def _left_out(folder: Folder, metadata: Metadata, sidecars: Sidecars) -> list[str]:
    """Write notes on everything in the folder that is not read."""
    notes = []
    if metadata.unused:
        notes.append(f"columns of {metadata.name} not used: {few(metadata.unused)}")
    if strange := sorted(metadata.rows.keys() - set(folder.images)):
        notes.append(
            f"not read as images, though in the metadata: {plural(len(strange), 'file')}: {few(strange)}"
        )
    if folder.hidden:
        what = plural(len(folder.hidden), "hidden or macOS resource file")
        notes.append(f"not read: {what}: {few(folder.hidden)}")
    if folder.closed:
        what = plural(len(folder.closed), "folder")
        notes.append(f"not read: {what} that cannot be opened: {few(folder.closed)}")
    if foreign := folder.count_others(_FOREIGN):
        notes.append(f"not read: {foreign}; to use them, convert them to PNG or JPEG")
    if packed := folder.count_others(_PACKED):
        notes.append(f"not read: {packed} beside the images; to use them, give them as DATA")
    read = {*sidecars.files, metadata.name}
    if unread := [name for name in folder.others if name not in read and not _has_own_note(name)]:
        notes.append(
            f"not read: {plural(len(unread), 'other file')}: {few(unread)}; captions are read from "
            f"{' or '.join(METADATA_NAMES)}, or from a {' or '.join(CAPTION_SUFFIXES)} file named like its image"
        )
    return notes


def _has_own_note(name: str) -> bool:
    """Return whether a file has a note of its own, or was put there by the system."""
    place = PurePosixPath(name)
    system = place.name.startswith(".") or place.name.lower() in _SYSTEM
    return system or place.suffix.lower() in (*_FOREIGN, *_PACKED)
