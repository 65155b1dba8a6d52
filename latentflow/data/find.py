"""What a folder of pictures holds and what to condition on: metadata > sidecars > subfolders > nothing."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentflow.errors import UserError, lookup, nearest

from .examples import Example, FileExample, Kind, Source
from .mask_finding import MaskFiles, Masks, find_masks
from .metadata import METADATA_NAMES, Metadata, read_metadata

Condition = Literal["auto", "none", "class", "text"]
MissingCaption = Literal["error", "empty", "skip"]

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
)  # fmt: skip
_FOREIGN = (".heic", ".heif", ".svg", ".psd", ".raw", ".cr2", ".nef", ".arw", ".dng", ".jxl", ".eps", ".pdf")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


@dataclass(frozen=True)
class Folder:
    """The pictures below a folder: paths relative to ``root`` in posix form, sorted."""

    root: Path
    images: tuple[str, ...]
    ignored: tuple[str, ...]  # hidden and macOS resource files that carry a picture's suffix
    others: Mapping[str, int]  # suffix -> number of files that are not read

    @property
    def direct(self) -> list[str]:
        return [name for name in self.images if "/" not in name]

    def per_subfolder(self) -> Counter[str]:
        """Number of pictures below each first-level subfolder, by name."""
        return Counter(name.split("/")[0] for name in sorted(self.images) if "/" in name)


def find_source(
    data: str,
    *,
    condition: Condition = "auto",
    missing_caption: MissingCaption = "error",
    masks: Masks = "auto",
) -> Source:
    """The pictures of ``data``, a folder or the procedural set "shapes", and what they are conditioned on.

    ``condition`` "auto" takes the first of: ``metadata.jsonl`` or ``metadata.csv`` (file_name, text, label),
    sidecar texts (``cat.txt`` beside ``cat.png``), subfolders as classes, nothing. Any other value is obeyed.
    ``missing_caption`` says what becomes of pictures without one: "error", the "empty" caption, or "skip".

    ``masks`` "auto" takes the user's own masks from the metadata's ``mask`` column and from files named
    ``cat-mask.png`` beside ``cat.png``; "alpha" takes the alpha channel of every picture (transparent is to be
    repainted; the picture is then what its file holds beneath); "none" takes none. The files of masks are never
    pictures of the set, whatever ``masks`` is.

    Raises:
        UserError: the folder is missing, empty or of the wrong level; metadata cannot be understood or
            contradict sidecars; captions or classes are missing; a picture has two different masks.
    """
    lookup(dict.fromkeys(("auto", "none", "class", "text")), condition, "condition")
    lookup(dict.fromkeys(("error", "empty", "skip")), missing_caption, "missing-caption")
    lookup(dict.fromkeys(("auto", "none", "alpha")), masks, "masks")
    if data == "shapes":
        return _shapes(condition, masks)
    folder = list_folder(_existing(data))
    metadata = read_metadata(folder.root)
    mask_files = find_masks(folder.root, folder.images, metadata)
    folder = _without_masks(folder, mask_files, metadata)
    sidecars = read_sidecars(folder)
    if not folder.images:
        raise _nothing_here(folder)
    kind, notes = _decide(folder, metadata, sidecars, condition)
    if kind == "text":
        examples, more = _with_text(folder, metadata, sidecars, missing_caption)
    elif kind == "class":
        examples, more = _with_label(folder, metadata, missing_caption)
    else:
        examples, more = [_example(folder, name, None, None) for name in folder.images], []
    classes = tuple(sorted({e.label for e in examples if e.label is not None})) if kind == "class" else ()
    if classes:
        more.append(f"{len(classes)} classes: {few(classes, 12)}")
    examples, told = _with_masks(examples, mask_files, masks)
    notes = [*notes, *more, *told, *_left_out(folder, metadata)]
    return Source(data, tuple(examples), kind, classes, tuple(notes), folder.root)


def _shapes(condition: Condition, masks: Masks) -> Source:
    if masks == "alpha":
        raise UserError("the pictures of 'shapes' have no alpha channel", "Leave --masks alpha out.")
    from .shapes import train_source

    if Path("shapes").is_dir():
        raise UserError(
            "'shapes' is both the procedural set and a folder here",
            "Write ./shapes for the folder, or run from another directory for the procedural set.",
        )
    return train_source(condition)


def _existing(data: str) -> Path:
    path = Path(data).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{data} is a file, not a folder of pictures", f"Give the folder: {path.parent}")
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    hint = f"Did you mean {path.parent / near}?" if near else "Check the path (`shapes` needs no folder)."
    raise UserError(f"there is no folder {data}", hint)


def list_folder(root: Path) -> Folder:
    """All pictures below ``root`` (links are followed once). Hidden files and folders are never pictures."""
    images: list[str] = []
    ignored: list[str] = []
    others, seen = Counter[str](), set[str]()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        for file in files:
            name = (Path(here) / file).relative_to(root).as_posix()
            suffix = Path(file).suffix.lower()
            if suffix in SUFFIXES:
                (ignored if file.startswith(".") else images).append(name)
            else:
                others[suffix] += 1
    return Folder(root, tuple(sorted(images)), tuple(sorted(ignored)), others)


def read_sidecars(folder: Folder) -> dict[str, str]:
    """Caption per picture from the ``.txt`` of the same name beside it, white space made single."""
    texts = {}
    for name in folder.images:
        path = (folder.root / name).with_suffix(".txt")
        if path.is_file():
            try:
                texts[name] = " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error}", "Save it as UTF-8.") from None
    return texts


def _decide(
    folder: Folder, metadata: Metadata | None, sidecars: dict[str, str], condition: Condition
) -> tuple[Kind, list[str]]:
    """What to condition on, and the notes that say why and what was passed over."""
    has_text = (metadata is not None and metadata.has_text) or bool(sidecars)
    has_label = metadata is not None and metadata.has_label
    if condition == "none":
        return "unconditional", ["unconditional, as asked: captions and classes are not used"]
    if condition == "text" and not has_text:
        raise UserError(
            f"there are no captions in {folder.root} (no metadata with a text column, no .txt files)",
            "Add metadata.jsonl (file_name, text) or a .txt beside each picture, or use --condition none.",
        )
    if condition == "auto" and metadata is not None and metadata.has_text:
        rest = [("label", has_label), ("sidecar texts", bool(sidecars))]
        return "text", [f"captions from {metadata.path.name}", *_passed_over(rest)]
    if condition == "auto" and has_label and metadata is not None:
        rest = [("sidecar texts", bool(sidecars))]
        return "class", [f"classes from {metadata.path.name}", *_passed_over(rest)]
    if condition == "text" or (condition == "auto" and has_text):
        origin = metadata.path.name if metadata and metadata.has_text else ".txt files beside the pictures"
        _refuse_splits(folder)
        rest = [("subfolders", len(folder.per_subfolder()) > 1)]
        return "text", [f"captions from {origin}", *_passed_over(rest)]
    if condition == "class":
        origin = metadata.path.name if metadata and has_label else "subfolders"
        if origin == "subfolders":
            _refuse_unclassed(folder)
        return "class", [f"classes from {origin}"]
    if folder.per_subfolder():
        _refuse_wrong_level(folder)
        return "class", ["classes from subfolders"]
    return "unconditional", ["unconditional: there are no captions, no classes and no subfolders"]


def _passed_over(sources: list[tuple[str, bool]]) -> list[str]:
    return [f"{name} found as well, not used (--condition decides)" for name, present in sources if present]


def _with_text(
    folder: Folder, metadata: Metadata | None, sidecars: dict[str, str], missing_caption: MissingCaption
) -> tuple[list[Example], list[str]]:
    texts = dict(sidecars)
    if metadata is not None:
        _refuse_contradiction(metadata, sidecars)
        texts.update({name: row.text for name, row in metadata.rows.items() if row.text})
    missing = [name for name in folder.images if not texts.get(name)]
    if missing and missing_caption == "error":
        raise UserError(
            f"{len(missing)} of {len(folder.images)} pictures have no caption: {few(missing)}",
            "Add them, or choose --missing-caption empty (an empty caption) or skip (leave them out).",
        )
    if len(missing) == len(folder.images):
        raise UserError("no picture has a caption", "Use --condition none for an unconditional model.")
    skipped = set(missing) if missing_caption == "skip" else set()
    fate = {"empty": "given the empty caption", "skip": "left out"}.get(missing_caption, "")
    notes = [f"{len(missing)} pictures without a caption, {fate}: {few(missing)}"] if missing else []
    labels = {name: row.label for name, row in metadata.rows.items()} if metadata else {}
    kept = [name for name in folder.images if name not in skipped]
    return [_example(folder, name, texts.get(name, ""), labels.get(name)) for name in kept], notes


def _with_label(
    folder: Folder, metadata: Metadata | None, missing: MissingCaption
) -> tuple[list[Example], list[str]]:
    if metadata is not None and metadata.has_label:
        labels = {name: row.label for name, row in metadata.rows.items() if row.label}
    else:
        labels = {name: name.split("/")[0] for name in folder.images if "/" in name}
    without = [name for name in folder.images if name not in labels]
    if without and missing != "skip":
        raise UserError(
            f"{len(without)} of {len(folder.images)} pictures have no class: {few(without)}",
            "Add them, or choose --missing-caption skip to leave these pictures out.",
        )
    notes = [f"{len(without)} pictures without a class, left out: {few(without)}"] if without else []
    return [_example(folder, n, None, labels[n]) for n in folder.images if n in labels], notes


def _without_masks(folder: Folder, masks: MaskFiles, metadata: Metadata | None) -> Folder:
    """The folder without the files that are masks; what the metadata list as a picture is one all the same."""
    no_pictures = masks.named | (set(masks.listed.values()) - set(metadata.rows if metadata else ()))
    return dataclasses.replace(
        folder, images=tuple(name for name in folder.images if name not in no_pictures)
    )


def _with_masks(examples: list[Example], files: MaskFiles, masks: Masks) -> tuple[list[Example], list[str]]:
    """The examples with their masks, and the notes that say where these come from."""
    notes, unused = [], "" if masks == "auto" else f", not used (--masks {masks})"
    if files.listed:
        notes.append(f"masks of {len(files.listed)} pictures in the metadata{unused}")
    if files.named:
        named = few(sorted(files.named))
        notes.append(f"{len(files.named)} files are masks of the pictures beside them{unused}: {named}")
    if masks == "none":
        return examples, notes
    if masks == "alpha":
        notes.append("masks from the alpha channels: what is transparent is to be repainted")
        return [dataclasses.replace(e, mask=e.path) for e in examples if isinstance(e, FileExample)], notes
    paths = files.paths()
    return [dataclasses.replace(e, mask=paths.get(e.name)) for e in examples], notes


def _example(folder: Folder, name: str, text: str | None, label: str | None) -> Example:
    return FileExample(name, text, label, path=folder.root / name)


def _refuse_contradiction(metadata: Metadata, sidecars: dict[str, str]) -> None:
    clash = [
        name for name, text in sidecars.items()
        if (row := metadata.rows.get(name)) and row.text and " ".join(row.text.split()) != text
    ]  # fmt: skip
    if clash:
        raise UserError(
            f"{metadata.path.name} and the .txt files differ on {len(clash)} pictures: {few(clash)}",
            "Keep one of the two (rename the other), or use --condition class|none.",
        )


def _nothing_here(folder: Folder) -> UserError:
    held = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in folder.others.items())
    what = f"there are no pictures in {folder.root} or below it"
    if folder.ignored:
        what += f" except {len(folder.ignored)} hidden or macOS resource files ({few(folder.ignored)})"
    what += f"; it holds {held} files" if held else "; it is empty"
    return UserError(what, f"Pictures end in {', '.join(SUFFIXES)}.")


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
        f"{folder.root} is one level too high: its pictures lie in {_counted(counts)} ({why})",
        f"Give one of them: {folder.root / best}",
    )


def _refuse_wrong_level(folder: Folder) -> None:
    """Refuses to take subfolders for classes where that is hardly meant."""
    _refuse_splits(folder)
    counts = folder.per_subfolder()
    if folder.direct:
        raise UserError(
            f"{len(folder.direct)} pictures lie in {folder.root} itself, others in {_counted(counts)}",
            "Move every picture into the subfolder of its class, or use --condition none for all of them.",
        )
    deep = not any(name.count("/") == 1 for name in folder.images)
    if len(counts) == 1 or deep:
        parents = Counter(name.rsplit("/", 1)[0] for name in folder.images)
        deepest = os.path.commonpath(list(parents))
        fix = "Give one of these folders, or use --condition class to take the first level as classes"
        if deepest:
            fix = f"Give the folder that holds the pictures or the class folders, {folder.root / deepest}"
        raise UserError(
            f"there are no pictures in {folder.root} itself; they were found in {_counted(parents)}",
            f"{fix}; or --condition none for all of them together.",
        )


def _refuse_unclassed(folder: Folder) -> None:
    if not folder.per_subfolder():
        raise UserError(
            f"there are no classes in {folder.root}: no subfolders, no metadata with a label column",
            "Put each picture in a subfolder named like its class, or add metadata.jsonl (file_name, label).",
        )


def _left_out(folder: Folder, metadata: Metadata | None) -> list[str]:
    notes = []
    strange = sorted(set(metadata.rows) - set(folder.images)) if metadata else []
    if strange:
        notes.append(f"metadata name {len(strange)} files that are not read as pictures: {few(strange)}")
    if folder.ignored:
        count = len(folder.ignored)
        notes.append(f"{count} hidden or macOS resource files passed over: {few(folder.ignored)}")
    foreign = {suffix: n for suffix, n in folder.others.items() if suffix in _FOREIGN}
    if foreign:
        counts = ", ".join(f"{n} {suffix}" for suffix, n in foreign.items())
        notes.append(f"{counts} files are not read: convert them to PNG or JPEG to use them")
    return notes


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _counted(counts: Mapping[str, int]) -> str:
    return few([f"{name}/ ({n})" for name, n in counts.items()])
