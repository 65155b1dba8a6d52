"""The kinds of data that DATA on the command line can be: one line each in ``KINDS``.

One of them, a YAML file, mixes others, with repeats and weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ...config import control_kinds
from ...errors import UserError, few, is_number, lookup, plural, shown, unknown, whole
from ...utils.files import read_yaml
from ...utils.names import composed, find_path, near_path
from ..cache.store import refuse_inside
from ..dataset import Colours, Example, Source, with_tag_orders
from .annotations import HEAVIEST, Condition, DataRequest, Masks, MissingCaption, build_source
from .files import IMAGE_SUFFIXES, parquet_files
from .folder import read_folder
from .hugging_face import read_hub, read_saved
from .latent_folder import DESCRIPTION, read_latent_folder
from .records import CSV_SUFFIXES
from .table import read_table
from .webdataset import COMPRESSED, read_shards
from .zip_file import read_zip

__all__ = ["KINDS", "Condition", "DataKind", "Masks", "MissingCaption", "find_source"]


MOST_REPEATS = 1_000_000  # every use of an image in an epoch takes some bytes
_FIX = "Write: sources: [{data: cats, repeats: 2}, {data: more, weight: 0.5}]"


@dataclass(frozen=True)
class DataKind:
    """A kind of data: its description, the test whether DATA is of it, and its reader."""

    meaning: str
    claims: Callable[[str, Path], bool]  # DATA as given, and as a path
    read: Callable[[str, DataRequest], Source]


def find_source(
    data: str,
    *,
    condition: Condition = "auto",
    missing_caption: MissingCaption = "error",
    masks: Masks = "auto",
    columns: Mapping[str, str] | None = None,
    shuffle_tags: int = 0,
    keep_tags: int = 0,
    colours: Colours = "srgb",
    caption: str | None = None,
    control: str | Sequence[str] = (),
    control_folder: str | None = None,
) -> Source:
    """Find the images of ``data``, which is of one of ``KINDS``, with their annotations (docs/reference/data.md).

    Args:
        data: as on the command line.
        condition: "auto" takes captions, else classes, else nothing; in a folder the first of ``metadata.jsonl`` or
            ``metadata.csv`` (file_name, text, label), texts beside the images (``cat.txt``), subfolders as classes,
            nothing. Any other value is obeyed.
        missing_caption: "error", "empty" (the empty caption, or no class) or "skip", for images without a caption, or
            without a class among others that have one.
        masks: "auto" takes the user's own masks (``mask`` columns and members; ``cat-mask.png`` beside ``cat.png``);
            "alpha" takes the alpha channel of every image (transparent is to be repainted; the image is then what its
            file holds beneath); "none" takes none. Files of masks are never images of the set.
        columns: our names (image, file_name, text, label, mask, control, weight) to those of a table's columns.
        shuffle_tags: the number of orders that each caption's tags are trained in; 0: as written.
        keep_tags: the number of tags that stay in front.
        colours: "srgb" converts by colour profiles, "stored" takes the numbers of all images as they are.
        caption: of the images that have none; then classes are not used.
        control: kinds of the control images that are read: "image", "labels" of label maps (``control`` columns;
            ``cat-control.png`` beside ``cat.png``), or both (``control_image`` and ``control_labels``;
            ``cat-control-image.png``). They are then never images of the set.
        control_folder: a folder with control images that are named like the images, in the place of those beside them;
            of both kinds in its folders ``image`` and ``labels``.

    Raises:
        UserError: the data are missing, empty, broken or of the wrong level; metadata cannot be understood or
            contradict texts beside the images; captions or classes are missing; an image has two different masks; a
            caption is given, but no captions are asked for.
    """
    for name, choices, value in (
        ("condition", Condition, condition),
        ("missing-caption", MissingCaption, missing_caption),
        ("masks", Masks, masks),
        ("colours", Colours, colours),
    ):
        lookup(dict.fromkeys(get_args(choices)), value, name)
    kinds = control_kinds(control)
    request = DataRequest(
        condition=condition,
        missing_caption=missing_caption,
        masks=masks,
        columns=dict(columns or {}),
        colours=colours,
        control=kinds,
        control_folder=control_folder,
    )
    if control_folder is not None and (not kinds or not Path(data).expanduser().is_dir()):
        raise UserError(
            f"--control-folder {control_folder}: {'no --control' if not kinds else data + ' is no folder'}",
            "Say what it holds: --control image or labels."
            if not kinds
            else "It goes with a folder of images; elsewhere name control images in a column control.",
        )
    if caption is not None:
        if condition not in ("auto", "text"):
            raise UserError(f"--caption with --condition {condition}", "Leave one of the two out.")
        if not caption.strip():
            raise UserError("--caption is empty", "Give a text, or use --missing-caption empty.")
        request = replace(request, condition="auto", missing_caption="empty")
    source = _find(data, request)
    if caption is not None:
        source = _captioned(source, caption)
    elif missing_caption == "empty" and source.kind != "unconditional":
        what = "caption" if source.kind == "text" else "class"
        if all((example.text if source.kind == "text" else example.label) for example in source.examples):
            source = source.noted(f"--missing-caption empty changes nothing: no image lacks a {what}")
    return with_tag_orders(source, shuffle_tags, keep_tags)


def _captioned(source: Source, caption: str) -> Source:
    """Return the source with this caption for the images that have none."""
    lacking = [source.kind != "text" or not any(example.captions) for example in source.examples]
    examples = tuple(
        replace(example, text=caption, texts=(), label=None) if lacks else example
        for example, lacks in zip(source.examples, lacking, strict=True)
    )
    note = f"{plural(sum(lacking), 'image')} without a caption, given this one: {caption}"
    # no longer true: that there are no captions, or that classes are the condition
    kept = tuple(line for line in source.notes if not line.startswith(("unconditional, ", "classes ")))
    return replace(source, examples=examples, kind="text", classes=(), notes=kept).noted(note)


def _find(data: str, request: DataRequest) -> Source:
    if (path := Path(data).expanduser()) != (spelled := find_path(path)):
        data = str(spelled)
    try:
        if kind := _kind_of(data):
            return KINDS[kind].read(data, request)
        raise _not_found(data)
    except OSError as error:
        raise UserError(
            f"{data} cannot be read: {(error.strerror or str(error)).lower()} ({error.filename or data})",
            "Give yourself permission to read it, or give other data.",
        ) from error


def _is_shards(data: str, path: Path) -> bool:
    """Return whether DATA names tar files, or is a folder of them without images or subfolders."""
    if not path.is_dir():
        return data.lower().endswith((".tar", *COMPRESSED))
    entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
    return any(path.glob("*.tar")) and not any(
        entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries
    )


def _is_saved(data: str, path: Path) -> bool:
    """Return whether DATA is a folder that `save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def _is_table(data: str, path: Path) -> bool:
    """Return whether DATA names CSV, TSV or parquet files, or a folder of parquet files and no images."""
    return bool(parquet_files(path)) if path.is_dir() else path.suffix.lower() in (*CSV_SUFFIXES, ".parquet")


def is_latent_folder(data: str) -> bool:
    """Return whether DATA is a folder of latents."""
    return (Path(data).expanduser() / DESCRIPTION).is_file()


def _read_shapes(data: str, request: DataRequest) -> Source:
    from .shapes import train_source

    if request.masks == "alpha":
        raise UserError("the images of 'shapes' have no alpha channel", "Leave --masks alpha out.")
    if request.columns:
        raise UserError("'shapes' has no columns", "Leave --columns out.")
    if Path("shapes").is_dir():
        raise UserError(
            "'shapes' is both the procedural set and a folder here",
            "Write ./shapes for the folder, or run from another directory for the procedural set.",
        )
    if "image" in request.control:
        raise UserError("'shapes' has label maps, and no other control images", "Use --control labels.")
    return train_source(request.condition, layouts=bool(request.control))


def _not_found(data: str) -> UserError:
    path = Path(data).expanduser()
    if path.exists():
        known = "; ".join(kind.meaning for kind in KINDS.values())
        return UserError(
            f"{data} is a file, not a folder of images",
            f"Give the folder, {path.absolute().parent}. Data may be: {known}.",
        )
    start = "" if path.is_absolute() else f"; it starts at {Path.cwd()}"
    return UserError(
        f"there is no folder or file {data}", near_path(str(path)).strip() or f"Check the path{start}."
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of the list; the names of its fields are the keys of the file."""

    data: str
    repeats: int | None = None
    weight: float = 1.0
    regularisation: bool = False


def read_mix(data: str, request: DataRequest) -> Source:
    """Return the sets that a YAML file lists as one. Relative paths start at the file's folder.

    ``repeats`` is how often an epoch uses each image of a set, ``weight`` a factor on their loss. Images of a set
    with ``regularisation: true`` (prior preservation) are used about as often as all others together.

    Raises:
        UserError: the file cannot be understood; the sets have different kinds of condition, or share images.
    """
    path = Path(data).expanduser()
    parts = _parts(path)
    places = [_place(path.parent, part.data) for part in parts]
    for place in places:
        if _kind_of(place) == "mix":
            raise UserError(f"{path} is a list of lists: {place}", "Name the sets themselves.")
        if is_latent_folder(place):
            raise UserError(f"{path} mixes in latents: {place}", "Mix the images, and precompute the mix.")
    sources = [_find(place, request) for place in places]
    kinds = [f"{part.data} ({source.kind})" for part, source in zip(parts, sources, strict=True)]
    if len({source.kind for source in sources}) > 1:
        raise UserError(
            f"{path} mixes sets with different conditions: {few(kinds)}",
            "Describe all images in one way, or use --condition none (or text, class) for all.",
        )
    for source in sources:
        refuse_inside(source.root)
    examples: list[Example] = []
    notes = [plural(len(parts), "set")]
    for part, source, repeats in zip(parts, sources, _repeats(parts, sources), strict=True):
        factor = f", their loss times {part.weight:g}" if part.weight != 1 else ""
        role = " (regularisation)" if part.regularisation else ""
        notes.append(
            f"{part.data}: {plural(len(source), 'image')}, each used {plural(repeats, 'time')} an epoch{factor}{role}"
        )
        notes += [f"  {note}" for note in source.notes]
        examples += [
            dataclasses.replace(
                example,
                name=f"{part.data}/{example.name}",
                repeats=example.repeats * repeats,
                weight=example.weight * part.weight,
            )
            for example in source.examples
        ]
    found = dataclasses.replace(request, masks="auto", colours="srgb")  # the sets are as requested already
    return build_source(data, examples, sources[0].kind, found, notes)


def _parts(path: Path) -> list[Part]:
    content = read_yaml(path, _FIX)
    entries = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no sources", _FIX)
    for key in content:
        if key != "sources":
            raise unknown(f"key in {path}", str(key), ["sources"])
    parts = [_part(f"{path}, source {number}", entry) for number, entry in enumerate(entries, start=1)]
    names = [composed(part.data) for part in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path} lists {twice[0]} twice", "Use `repeats: 2`.")
    if all(part.regularisation for part in parts):
        raise UserError(f"{path} lists nothing but regularisation", "Add the set that is to be learnt.")
    return parts


def _part(where: str, entry: Any) -> Part:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("data"), str):
        raise UserError(f"{where} has no data", _FIX)
    keys = [field.name for field in dataclasses.fields(Part)]
    for key in entry:
        if key not in keys:
            raise unknown(f"key in {where}:", str(key), keys)
    part = Part(**entry)
    if part.repeats is not None:
        whole(f"{where}: repeats", part.repeats, 1, MOST_REPEATS)
    if not is_number(part.weight) or not 0 < part.weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(part.weight)}", f"Give a number above 0, at most {HEAVIEST:,.0f}."
        )
    if not isinstance(part.regularisation, bool):
        raise UserError(f"{where}: regularisation is {shown(part.regularisation)}", "Write true or false.")
    return part


def _place(folder: Path, data: str) -> str:
    """Return DATA as seen from the YAML file."""
    return data if data == "shapes" or data.startswith("hub:") else str(folder / Path(data).expanduser())


def _repeats(parts: list[Part], sources: list[Source]) -> list[int]:
    """Return the repeats of every set; regularisation without any is balanced with the rest, in whole numbers."""
    uses = [len(s.uses()) * (p.repeats or 1) for p, s in zip(parts, sources, strict=True)]
    regularising = sum(n for n, part in zip(uses, parts, strict=True) if part.regularisation)
    balance = max(1, round((sum(uses) - regularising) / regularising)) if regularising else 1
    return [part.repeats or (balance if part.regularisation else 1) for part in parts]


# The first that claims DATA reads it.
KINDS: dict[str, DataKind] = {
    "shapes": DataKind("the procedural set `shapes`", lambda data, _: data == "shapes", _read_shapes),
    "hub": DataKind(
        "hub:owner/name, a data set of the Hugging Face hub",
        lambda data, _: data.startswith("hub:"),
        read_hub,
    ),
    "mix": DataKind(
        "a .yaml file that lists several of these",
        lambda _, path: path.suffix.lower() in (".yaml", ".yml") and path.is_file(),
        read_mix,
    ),
    "shards": DataKind("WebDataset shards (.tar)", _is_shards, read_shards),
    "zip": DataKind(
        "a .zip of a folder", lambda _, path: path.suffix.lower() == ".zip" and path.is_file(), read_zip
    ),
    "saved": DataKind("a folder that `datasets` saved", _is_saved, read_saved),
    "table": DataKind("a .csv, .tsv or .parquet table", _is_table, read_table),
    "latents": DataKind(
        "a folder of `latentflow precompute`", lambda data, _: is_latent_folder(data), read_latent_folder
    ),
    "folder": DataKind("a folder of images", lambda _, path: path.is_dir(), read_folder),
}


def _kind_of(data: str) -> str | None:
    """Return the kind of DATA, the first that claims it; None where none does."""
    path = Path(data).expanduser()
    return next((name for name, kind in KINDS.items() if kind.claims(data, path)), None)
