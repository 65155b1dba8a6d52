"""Annotations of images: the columns of a table and their meaning, and the way from them to a source for all kinds of
data. Nothing is dropped without a note or an error."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from ...config import CONTROLS, Control
from ...errors import UserError, did_you_mean, few, nearest, plural, shown
from ...utils.files import refuse_no_text
from ...utils.names import Listings, as_spelled, composed, find_path
from ..dataset import Colours, Example, FileExample, Kind, Source, caption_of_class
from .files import File, Member

Condition = Literal["auto", "none", "class", "text"]
MissingCaption = Literal["error", "empty", "skip"]
Masks = Literal["auto", "none", "alpha"]

HEAVIEST = 1e6  # weight of an image's loss: more only ends in updates that are not finite
CONTROL_COLUMNS = ("control", *(f"control_{kind}" for kind in CONTROLS))
COLUMNS = ("image", "file_name", "text", "label", "mask", *CONTROL_COLUMNS, "weight")
IMAGE_COLUMNS = ("image", "mask", *CONTROL_COLUMNS)  # that may hold the bytes of images
# Other words for our columns. Our own are among them, since a table may have them in upper case.
_IMAGE_SYNONYMS = (
    "file_name", "image", "path", "image_path", "file", "filename", "img", "picture", "image_file", "images",
)  # fmt: skip
_SYNONYMS = {
    "text": ("text", "caption", "captions", "prompt", "description", "texts"),
    "label": ("label", "class", "classes", "category", "labels", "class_name"),
    "mask": ("mask", "masks", "mask_file", "mask_file_name", "mask_path", "mask_image"),
    "weight": ("weight", "weights", "loss_weight", "sample_weight"),
}
_NUMBERED = re.compile(r"text_([0-9]{1,9})")
_QUOTE = "Write it in quotes."


@dataclass(frozen=True, slots=True)
class RowAnnotation:
    """The captions of an image (none, one or several), its class or None, and the factor on its loss."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    weight: float = 1.0


def parse_row(row: Mapping[str, object], where: str) -> RowAnnotation:
    """Return the annotation in a row's ``text`` (a string or a list), ``text_1``, ..., ``label`` and ``weight``.

    ``where`` begins error messages: the file and the line.

    Raises:
        UserError: a value is of the wrong type.
    """
    numbered = sorted((int(match[1]), name) for name in row if (match := _NUMBERED.fullmatch(name)))
    texts: list[str] = []
    for name in ("text", *(name for _, name in numbered)):
        texts += _texts(row.get(name), f"{where}: {name}")
    return RowAnnotation(tuple(texts), _label(row.get("label"), where), _weight(row.get("weight"), where))


def _texts(value: object, where: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} is {shown(value)}, not a string or a list of strings", _QUOTE)
    for text in texts:
        refuse_no_text(text, where)
    return [text.strip() for text in texts if text.strip()]


def _label(value: object, where: str) -> str | None:
    if isinstance(value, str):
        refuse_no_text(value, f"{where}: label")
        return value.strip() or None
    if value is None or isinstance(value, int):
        return None if value is None else str(value)
    raise UserError(f"{where}: label is {shown(value)}, neither a string nor a whole number", _QUOTE)


def _weight(value: object, where: str) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight <= HEAVIEST:
        raise UserError(
            f"{where}: weight is {shown(value)}",
            f"Give a number above 0, at most {HEAVIEST:,.0f} (1 is usual), with a decimal point; to leave an image "
            "out, leave its row out.",
        )
    return weight


def text_in(row: Mapping[str, object], column: str, where: str) -> str | None:
    """Return the text in a column, stripped; None where it is empty or absent.

    Raises:
        UserError: it is not text.
    """
    value = row.get(column)
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise UserError(f"{where}: {column} is {shown(value)}, not a string", _QUOTE)


def class_name(names: Sequence[str], label: object, where: str) -> object:
    """Return the name of a class that `datasets` writes as a number; None for -1, its way to write "not known".

    Raises:
        UserError: no class has that number.
    """
    if not isinstance(label, int) or label == -1:
        return None if label == -1 else label
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label is {label}, of {len(names)} classes", "Write the table again.")
    return names[label]


def holds_captions(column: str) -> bool:
    """Return whether a column is ``text`` or one of ``text_1``, ``text_2``, ..."""
    return column == "text" or _NUMBERED.fullmatch(column) is not None


def rename(columns: Iterable[str], renamed: Mapping[str, str], where: str) -> dict[str, str]:
    """Return our name of every column of a table, by its own; ``renamed`` maps ours to theirs (``--columns``).

    Raises:
        UserError: a name of ``renamed`` is unknown; two columns have or get the same name.
    """
    own = list(columns)
    renamed = {ours: as_spelled(theirs, own) for ours, theirs in renamed.items()}
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        raise UserError(f"{where} has two columns named '{twice[0]}'", "Rename one of them.")
    for ours, theirs in renamed.items():
        if ours not in COLUMNS:
            raise UserError(
                f"--columns: '{ours}' is not one of {', '.join(COLUMNS)}",
                did_you_mean(nearest(ours, COLUMNS)),
            )
        if theirs not in own:
            raise UserError(
                f"{where} has no column '{theirs}' (--columns {ours} {theirs})",
                f"{did_you_mean(nearest(theirs, own))}Its columns: {', '.join(own)}",
            )
        if ours != theirs and ours in own and ours not in renamed.values():
            raise UserError(
                f"{where} has both '{ours}' and '{theirs}', which --columns names '{ours}'",
                "Rename or drop one of the two.",
            )
    ours_of = {theirs: ours for ours, theirs in renamed.items()}
    return {name: ours_of.get(name, name) for name in own}


def unused(column: str) -> str:
    """Return the name that a column of ours has where it is not read."""
    return f"{column}, not used"


def unused_columns(ours: Mapping[str, str], image: str) -> list[str]:
    """Return a table's own names of the columns that are not read; ``image`` is our name of the images' column."""
    read = {image, *COLUMNS} - ({"image", "file_name"} - {image})
    return [theirs for theirs, name in ours.items() if name not in read and not holds_captions(name)]


def our_columns(
    columns: Iterable[str], renamed: Mapping[str, str], where: str, image: str = "image"
) -> dict[str, str]:
    """Return our name of every column, as `rename` does; ``image`` is our name of the one that names the images.

    Raises:
        UserError: also where images, captions, classes, masks or weights would go unread, being called by another
            word.
    """
    found = rename(columns, renamed, where)
    names = set(found.values())
    words = {lower_case(name): name for name in sorted(names)}  # of two spellings the one in lower case
    others: dict[str, str] = {}  # words of the table by our names
    if not names & {"image", "file_name"} and (word := next((w for w in _IMAGE_SYNONYMS if w in words), "")):
        others[image] = words[word]
    for column, synonyms in _SYNONYMS.items():
        missing = ["text", "label"] if column in ("text", "label") else [column]
        if any(name in missing or ("text" in missing and holds_captions(name)) for name in names):
            continue
        if synonym := next((synonym for synonym in synonyms if synonym in words), ""):
            others[column] = words[synonym]
            names.add(column)  # else a class would be asked for beside the caption
    if others:
        what = f"{' or '.join(others)}, but {' and '.join(map(repr, others.values()))}"
        flags = " ".join(f"{column} {shlex.quote(word)}" for column, word in {**renamed, **others}.items())
        raise UserError(
            f"{where} has no column {what}",
            f"Rename {'it' if len(others) == 1 else 'them'}, or add --columns {flags}",
        )
    return found


def is_known_column(name: str) -> bool:
    """Return whether a column has one of our names or another word for it, in lower or upper case."""
    known = (*COLUMNS, *_IMAGE_SYNONYMS, *itertools.chain(*_SYNONYMS.values()))
    return lower_case(name) in known


def lower_case(column: str) -> str:
    """Return a column's name in lower case, with _ for spaces and hyphens."""
    return re.sub(r"[ -]+", "_", column.strip().casefold())


# ---------------------------------------------------------------- from annotations to a source


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """The settings of ``find_source``, as the reader of every kind gets them."""

    condition: Condition = "auto"
    missing_caption: MissingCaption = "error"
    masks: Masks = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    colours: Colours = "srgb"
    control: tuple[Control, ...] = ()
    control_folder: str | None = None

    @property
    def unused_masks(self) -> str:
        """The end of a note on masks that were found: empty where they are used."""
        return "" if self.masks == "auto" else f", not used (--masks {self.masks})"

    def refuse_control(self, what: str) -> None:
        """Refuse to look for control images where ``what`` the data are has none.

        Raises:
            UserError: some are asked for.
        """
        if self.control:
            raise UserError(
                f"--control {' '.join(self.control)}: control images are not read from {what}",
                "Give a folder with cat-control.png beside cat.png, or a table with a column control.",
            )

    def used_columns(self, ours: Mapping[str, str]) -> dict[str, str]:
        """Return our names of a table's columns without those of control images that are not asked for: they may hold
        anything."""
        left = {*CONTROL_COLUMNS} - self.control_columns.keys()
        return {theirs: unused(name) if name in left else name for theirs, name in ours.items()}

    @property
    def control_columns(self) -> dict[str, Control]:
        """Columns of control images, and the kind of each: of a single kind ``control`` as well, whose values give way
        to those of the column that names the kind."""
        alone: dict[str, Control] = {"control": self.control[0]} if len(self.control) == 1 else {}
        return alone | {f"control_{kind}": kind for kind in self.control}


def annotated_example(
    name: str,
    image: File,
    mask: File | None,
    annotation: RowAnnotation,
    controls: Mapping[Control, File] = MappingProxyType({}),
) -> FileExample:
    """Return the example of an image file with its annotation."""
    first, *more = annotation.texts or (None,)
    return FileExample(
        name,
        first,
        annotation.label,
        path=image,
        mask=mask,
        controls=tuple((kind, controls[kind]) for kind in CONTROLS if kind in controls),
        texts=tuple(more),
        weight=annotation.weight,
    )


def table_examples(
    rows: Iterable[tuple[str, Mapping[str, object], Mapping[str, Member | None]]],
    ours: Mapping[str, str],
    image: str = "image",
    folder: Path = Path(),
    class_names: Sequence[str] | None = None,
    controls: Mapping[str, Control] = MappingProxyType({}),
) -> Iterable[FileExample]:
    """Yield the example of every row of a table of any kind (CSV, parquet, saved data set, hub).

    Args:
        rows: for each row its name in error messages, its values by the table's own column names, and the members
            that hold its image and mask by our names.
        ours: our names of the columns by their own.
        image: our name of the column with the images; those that are no members are paths.
        folder: the folder that relative paths start from.
        class_names: names of the classes where the table has numbers.
        controls: see `DataRequest.control_columns`.

    Raises:
        UserError: a value is of the wrong type; a row has no image; a path leads out of the folder.
    """
    listings: Listings = {}
    for number, (where, values, members) in enumerate(rows):
        row = {ours[name]: value for name, value in values.items()}
        if class_names is not None:
            row["label"] = class_name(class_names, row.get("label"), where)
        files = {
            name: members[name] if name in members else _path_in(row, name, folder, where, listings)
            for name in (image, "mask", *controls)
        }
        if (file := files[image]) is None:
            raise UserError(f"{where} holds no image", "Give its image, or leave the row out.")
        name = f"row {number:08d}" if image in members else str(row[image])
        led = {kind: given for column, kind in controls.items() if (given := files[column]) is not None}
        yield annotated_example(name, file, files["mask"], parse_row(row, where), led)


def _path_in(
    row: Mapping[str, object], column: str, folder: Path, where: str, listings: Listings
) -> Path | None:
    """Return the file that a column names, as it is spelled on disk: an absolute path as it is, any other below
    ``folder``. ``\\`` stands for ``/``, as on Windows, where no file has one in its name."""
    name = text_in(row, column, where)
    if name is None:
        return None
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        if ".." in Path(written).parts:
            raise UserError(
                f"{where}: {name} leads out of the folder", "Write the absolute path if that is meant."
            )
        path = find_path(folder / written, listings)
        if os.path.lexists(path):
            return path
    return folder / name


class Found(NamedTuple):
    """Annotations that a set of images has: their ``kind``, what they are called, and where they were found."""

    kind: Kind
    what: str
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.what} from {self.origin}" if self.origin else self.what


def choose_condition(
    found: Sequence[Found], request: DataRequest, where: str, lacks: str
) -> tuple[Kind, list[str]]:
    """Choose what to condition on, of ``found`` the first that is asked for; and write notes on it.

    Where captions are asked for and there are classes alone, the names of the classes are the captions.

    Args:
        where: the data, for messages.
        lacks: what captions and classes are read from, for the user.

    Raises:
        UserError: captions or classes are asked for, and there are none.
    """
    asked = request.condition
    if asked == "none":
        return "unconditional", ["unconditional, as asked: captions and classes are not used"]
    wanted = [condition for condition in found if asked in ("auto", condition.kind)]
    if not wanted and asked == "text" and found:
        return "text", [f"captions: the names of the {found[0]}"]
    if not wanted and asked != "auto":
        what = "captions" if asked == "text" else "classes"
        raise UserError(f"there are no {what} in {where}", f"Add them ({lacks}), or use --condition none.")
    if not wanted:
        return "unconditional", [f"unconditional, since no captions or classes were found ({lacks})"]
    notes = [str(wanted[0])] if wanted[0].origin else []
    for condition in found:
        if condition != wanted[0]:
            notes.append(f"{condition} found as well, not used (--condition decides)")
    return wanted[0].kind, notes


def source_of_rows(
    data: str,
    examples: Sequence[FileExample],
    request: DataRequest,
    lacks: str,
    notes: Sequence[str] = (),
    root: Path | None = None,
) -> Source:
    """Return the source of examples with all their annotations; captions win over classes.

    Raises:
        UserError: there are none; and as for ``choose_condition`` and ``build_source``.
    """
    if not examples:
        raise UserError(f"there are no rows in {data}", "Write one row for each image.")
    found = [Found("text", "captions")] if any(example.text for example in examples) else []
    found += [Found("class", "classes")] if any(example.label for example in examples) else []
    kind, kind_notes = choose_condition(found, request, data, lacks)
    masks = sum(example.mask is not None for example in examples)
    mask_notes = [f"masks of {plural(masks, 'image')}{request.unused_masks}"] if masks else []
    mask_notes += counted_controls(kind for example in examples for kind in example.control_kinds)
    return build_source(data, examples, kind, request, [*notes, *kind_notes, *mask_notes], root)


def counted_controls(kinds: Iterable[Control]) -> list[str]:
    """Return a line on the control images of a set, whose kinds these are; none where there are none."""
    counts = Counter(kinds)
    parts = [f"{plural(counts[kind], 'image')}" + f" ({kind})" * (len(counts) > 1) for kind in sorted(counts)]
    return [f"control images of {' and '.join(parts)}"] if parts else []


def build_source(
    data: str,
    examples: Sequence[Example],
    kind: Kind,
    request: DataRequest,
    notes: Sequence[str],
    root: Path | None = None,
    *,
    caption_hint: str = "",
) -> Source:
    """Return the source of these examples as requested, in the order of their names.

    Args:
        caption_hint: a sentence for the user on where a missing caption may be.

    Raises:
        UserError: captions or classes are missing and the request does not say what to do; two examples have one name.
    """
    _refuse_equal_names(examples)
    if kind == "text" and not any(example.text for example in examples):
        examples = [_captioned_by_class(example) for example in examples]
    kept, missing_notes = _complete(
        sorted(examples, key=lambda example: example.name), kind, request.missing_caption, caption_hint
    )
    notes = [*notes, *missing_notes]
    if kind == "class":
        kept, spelling_notes = _in_one_spelling(kept)
        notes += spelling_notes
    if request.masks == "alpha":
        notes.append("masks from the alpha channels: what is transparent is to be repainted")
    if request.masks != "auto" or request.colours != "srgb":
        kept = [_as_requested(example, request) for example in kept]
    classes = tuple(sorted({e.label for e in kept if e.label}, key=_numbers_first)) if kind == "class" else ()
    if classes:
        notes.append(f"{plural(len(classes), 'class')}: {few(classes, 12)}")
    if several := sum(bool(example.texts) for example in kept):
        notes.append(f"{plural(several, 'image')} with several captions: each use draws one of them")
    if weighted := sum(example.weight != 1 for example in kept):
        notes.append(f"{plural(weighted, 'image')} with a weight other than 1, which multiplies the loss")
    return Source(data, tuple(kept), kind, classes, tuple(notes), root, request.control)


def _refuse_equal_names(examples: Iterable[Example]) -> None:
    spelled: dict[str, str] = {}
    for example in examples:
        name = composed(example.name)
        if name in spelled:
            how = "" if spelled[name] == example.name else ", in two spellings of Unicode (NFC and NFD)"
            raise UserError(f"two images are named {example.name}{how}", "Rename one of them.")
        spelled[name] = example.name


def _captioned_by_class(example: Example) -> Example:
    """Return an example whose caption is the name of its class."""
    return dataclasses.replace(example, text=example.label and caption_of_class(example.label), label=None)


def _in_one_spelling(examples: list[Example]) -> tuple[list[Example], list[str]]:
    """Return the examples with the classes that they spell in several ways in NFC, and a note on these.

    A class of one spelling keeps it: runs that were begun with it go on.
    """
    spelled = Counter(map(composed, {example.label for example in examples if example.label}))
    several = sorted(name for name, count in spelled.items() if count > 1)
    if not several:
        return examples, []
    respelled = [
        dataclasses.replace(example, label=label) if label in several else example
        for example in examples
        for label in [composed(example.label or "")]  # "" is never among several
    ]
    return respelled, [f"classes in two spellings of Unicode (NFC and NFD) are one each: {few(several)}"]


def _complete(
    examples: list[Example], kind: Kind, missing: MissingCaption, hint: str
) -> tuple[list[Example], list[str]]:
    """Return the examples with the annotations of ``kind`` alone, and a note on those that lacked them."""
    if kind == "unconditional":
        return [dataclasses.replace(example, text=None, texts=(), label=None) for example in examples], []
    what = "caption" if kind == "text" else "class"
    complete = [example for example in examples if (example.text if kind == "text" else example.label)]
    without = [e.name for e in examples if not (e.text if kind == "text" else e.label)]
    if without and missing == "error":
        raise UserError(
            f"no {what} for {len(without)} of {plural(len(examples), 'image')}: {few(without)}",
            f"{hint}Add them, or choose --missing-caption empty (train these images without a {what}) or skip (leave "
            "them out).",
        )
    if not complete:
        raise UserError(f"no image has a {what}", "Use --condition none for an unconditional model.")
    empty = "given the empty caption" if kind == "text" else "trained on without a condition"
    fate = "left out" if missing == "skip" else empty
    notes = [f"{plural(len(without), 'image')} without a {what}, {fate}: {few(without)}"] if without else []
    kept = complete if missing == "skip" else examples
    if kind == "class":
        return [dataclasses.replace(example, text=None, texts=()) for example in kept], notes
    return [example if example.text else dataclasses.replace(example, text="") for example in kept], notes


def _as_requested(example: Example, request: DataRequest) -> Example:
    """Return an example with the masks and colours of the request."""
    assert isinstance(example, FileExample), "what is drawn, and mixes, are as requested already"
    mask = {"auto": example.mask, "none": None, "alpha": example.path}[request.masks]
    return dataclasses.replace(example, mask=mask, colours=request.colours)


def _numbers_first(label: str) -> tuple[int, int, str]:
    """Return a key that sorts whole numbers by value (2 before 10), before words."""
    return (0, int(label), label) if label.isdecimal() and len(label) < 100 else (1, 0, label)
