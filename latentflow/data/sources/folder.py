"""What to make of a folder: metadata > sidecar texts > subfolders > nothing."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

from ...errors import UserError, few
from ...utils.files import storable
from ..dataset import FileExample, Kind, Source
from .annotations import METADATA_NAMES, Metadata, read_metadata
from .assemble import Condition, MaskFiles, Masks, Wanted, fields_of, find_masks, source_of
from .files import CAPTIONS, SUFFIXES, Folder, Sidecars, read_sidecars

_FOREIGN = (".heic", ".heif", ".svg", ".psd", ".raw", ".cr2", ".nef", ".arw", ".dng", ".jxl", ".eps", ".pdf")
_PACKED = (".tar", ".zip", ".parquet", ".arrow")
_SYSTEM = ("thumbs.db", "desktop.ini")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


def folder_source(data: str, folder: Folder, wanted: Wanted) -> Source:
    """The source of a folder's images.

    Raises:
        UserError: the folder is empty or of the wrong level; metadata cannot be understood or contradict sidecars;
            captions or classes are missing; an image has two different masks.
    """
    metadata = read_metadata(folder, wanted.columns)
    mask_files = find_masks(folder, metadata)
    folder = _without_masks(folder, mask_files, metadata)
    if not folder.images:
        raise _nothing_here(folder)
    sidecars = read_sidecars(folder)
    kind, notes = _decide(folder, metadata, sidecars, wanted.condition)
    if kind == "text":
        _refuse_contradiction(metadata, sidecars)
    examples = _examples(folder, metadata, sidecars.texts, kind)
    examples, told = _with_masks(examples, mask_files, wanted.masks)
    source = source_of(data, examples, kind, wanted, notes, folder.root if folder.root.is_dir() else None)
    return source.noted(*told, *_left_out(folder, metadata, sidecars))


def _examples(
    folder: Folder, metadata: Metadata | None, sidecars: Mapping[str, str], kind: Kind
) -> list[FileExample]:
    """Every image with all that is said of it that ``kind`` may use."""
    subfolders = kind == "class" and not (metadata is not None and metadata.has_label)
    examples = []
    for name in folder.images:
        row = metadata.rows.get(name) if metadata is not None else None
        fields = fields_of(row.said) if row is not None else {}
        if not fields.get("text"):
            fields |= {"text": sidecars.get(name), "texts": ()}
        if subfolders:
            # A name of a folder may be no text, which a class must be.
            fields["label"] = storable(name.split("/")[0]) if "/" in name else None
        examples.append(FileExample(name, path=folder.file(name), **fields))
    return examples


def _decide(
    folder: Folder, metadata: Metadata | None, sidecars: Sidecars, condition: Condition
) -> tuple[Kind, list[str]]:
    """What to condition on, and the notes that say why and what was passed over."""
    has_text = (metadata is not None and metadata.has_text) or bool(sidecars.texts)
    has_label = metadata is not None and metadata.has_label
    if condition == "none":
        return "unconditional", ["unconditional, as asked: captions and classes are not used"]
    if condition == "text" and not has_text:
        raise UserError(
            f"there are no captions in {folder.root} (no metadata with a text column, no .txt or .caption files)",
            "Add metadata.jsonl (file_name, text) or a .txt beside each image, or use --condition none.",
        )
    if condition == "auto" and metadata is not None and metadata.has_text:
        rest = [("label", has_label), ("sidecar texts", bool(sidecars.texts))]
        return "text", [f"captions from {metadata.path.name}", *_passed_over(rest)]
    if condition == "auto" and has_label and metadata is not None:
        rest = [("sidecar texts", bool(sidecars.texts))]
        return "class", [f"classes from {metadata.path.name}", *_passed_over(rest)]
    if condition == "text" or (condition == "auto" and has_text):
        origin = (
            metadata.path.name
            if metadata and metadata.has_text
            else f"{_endings(sidecars)} files beside the images"
        )
        _refuse_splits(folder)
        rest = [("subfolders", len(folder.per_subfolder()) > 1)]
        return "text", [f"captions from {origin}", *_passed_over(rest)]
    if condition == "class":
        origin = metadata.path.name if metadata and has_label else "subfolders"
        if origin == "subfolders":
            _refuse_unclassed(folder)
        return "class", [f"classes from {origin}", *_passed_over([("captions", has_text)])]
    if folder.per_subfolder():
        _refuse_wrong_level(folder)
        return "class", ["classes from subfolders"]
    return "unconditional", ["unconditional: there are no captions, no classes and no subfolders"]


def _passed_over(sources: list[tuple[str, bool]]) -> list[str]:
    return [f"{name} found as well, not used (--condition decides)" for name, present in sources if present]


def _without_masks(folder: Folder, masks: MaskFiles, metadata: Metadata | None) -> Folder:
    """The folder without the files that are masks; what the metadata list as an image is one all the same."""
    no_images = masks.named | (set(masks.listed.values()) - set(metadata.rows if metadata else ()))
    return dataclasses.replace(folder, images=tuple(name for name in folder.images if name not in no_images))


def _with_masks(
    examples: list[FileExample], files: MaskFiles, masks: Masks
) -> tuple[list[FileExample], list[str]]:
    """The examples with their masks, and the notes that say where these come from."""
    notes, unused = [], "" if masks == "auto" else f", not used (--masks {masks})"
    if files.listed:
        notes.append(f"masks of {len(files.listed)} images in the metadata{unused}")
    if files.named:
        named = few(sorted(files.named))
        notes.append(f"{len(files.named)} files are masks of the images beside them{unused}: {named}")
    if masks == "none":
        return examples, notes
    if masks == "alpha":
        notes.append("masks from the alpha channels: what is transparent is to be repainted")
        return [dataclasses.replace(e, mask=e.path) for e in examples], notes
    paths = files.files()
    return [dataclasses.replace(e, mask=paths.get(e.name)) for e in examples], notes


def _endings(sidecars: Sidecars) -> str:
    return " and ".join(
        ending for ending in CAPTIONS if any(name.lower().endswith(ending) for name in sidecars.files)
    )


def _refuse_contradiction(metadata: Metadata | None, sidecars: Sidecars) -> None:
    if sidecars.clashes:
        raise UserError(
            f"{len(sidecars.clashes)} images have captions that differ: {few(sidecars.clashes)}",
            "Keep one caption file for each image, or use --condition class|none.",
        )
    if metadata is None:
        return
    clash = [
        name for name, text in sidecars.texts.items()
        if (row := metadata.rows.get(name))
        and row.said.texts
        and text not in {" ".join(one.split()) for one in row.said.texts}
    ]  # fmt: skip
    if clash:
        raise UserError(
            f"{metadata.path.name} and the {_endings(sidecars)} files differ on {len(clash)} images: {few(clash)}",
            "Keep one of the two (rename the other), or use --condition class|none.",
        )


def _nothing_here(folder: Folder) -> UserError:
    held = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in folder.suffixes().items())
    what = f"there are no images in {folder.root} or below it"
    if folder.ignored:
        what += f" except {len(folder.ignored)} hidden or macOS resource files ({few(folder.ignored)})"
    what += f"; it holds {held} files" if held else "; it is empty"
    if folder.closed:
        what += f"; {len(folder.closed)} folders in it cannot be opened: {few(folder.closed)}"
    return UserError(what, f"Images end in {', '.join(SUFFIXES)}.")


def _refuse_splits(folder: Folder) -> None:
    """Parts of one data set (train, test) are not classes, and are not to be mixed."""
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
    """Refuses to take subfolders for classes where that is hardly meant."""
    _refuse_splits(folder)
    counts = folder.per_subfolder()
    if folder.direct:
        raise UserError(
            f"{len(folder.direct)} images lie in {folder.root} itself, others in {_counted(counts)}",
            "Move every image into the subfolder of its class, or use --condition none for all of them.",
        )
    deep = not any(name.count("/") == 1 for name in folder.images)
    if len(counts) == 1 or deep:
        parents = Counter(name.rsplit("/", 1)[0] for name in folder.images)
        deepest = os.path.commonpath(list(parents))
        fix = "Give one of these folders, or use --condition class to take the first level as classes"
        if deepest:
            fix = f"Give the folder that holds the images or the class folders, {folder.root / deepest}"
        raise UserError(
            f"there are no images in {folder.root} itself; they were found in {_counted(parents)}",
            f"{fix}; or --condition none for all of them together.",
        )


def _refuse_unclassed(folder: Folder) -> None:
    if not folder.per_subfolder():
        raise UserError(
            f"there are no classes in {folder.root}: no subfolders, no metadata with a label column",
            "Put each image in a subfolder named like its class, or add metadata.jsonl (file_name, label).",
        )


def _left_out(folder: Folder, metadata: Metadata | None, sidecars: Sidecars) -> list[str]:
    notes = []
    if metadata is not None and metadata.unused:
        notes.append(f"columns of {metadata.path.name} not used: {few(metadata.unused)}")
    strange = sorted(set(metadata.rows) - set(folder.images)) if metadata else []
    if strange:
        notes.append(f"metadata name {len(strange)} files that are not read as images: {few(strange)}")
    if folder.ignored:
        count = len(folder.ignored)
        notes.append(f"{count} hidden or macOS resource files passed over: {few(folder.ignored)}")
    if folder.closed:
        notes.append(
            f"{len(folder.closed)} folders cannot be opened and are passed over: {few(folder.closed)}"
        )
    foreign = {suffix: n for suffix, n in folder.suffixes().items() if suffix in _FOREIGN}
    if foreign:
        counts = ", ".join(f"{n} {suffix}" for suffix, n in foreign.items())
        notes.append(f"{counts} files are not read: convert them to PNG or JPEG to use them")
    packed = {suffix: n for suffix, n in folder.suffixes().items() if suffix in _PACKED}
    if packed:
        counts = ", ".join(f"{n} {suffix}" for suffix, n in packed.items())
        notes.append(f"{counts} files lie beside the images and are not read: give them as DATA of their own")
    read = sidecars.files | ({metadata.path.name} if metadata is not None else set())
    unread = [name for name in folder.others if name not in read and not _is_told(name)]
    if unread:
        notes.append(
            f"{len(unread)} other files are not read: {few(unread)}; captions are read from "
            f"{' or '.join(METADATA_NAMES)}, or from a {' or '.join(CAPTIONS)} file named like its image"
        )
    return notes


def _is_told(name: str) -> bool:
    """Return whether a file has a note of its own, or was put there by the system."""
    place = PurePosixPath(name)
    system = place.name.startswith(".") or place.name.lower() in _SYSTEM
    return system or place.suffix.lower() in (*_FOREIGN, *_PACKED)


def _counted(counts: Mapping[str, int]) -> str:
    return few([f"{name}/ ({n})" for name, n in counts.items()])
