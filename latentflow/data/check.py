"""What is in a data set, and whether a training on it would break."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from latentflow.errors import UserError

from .examples import Example, Source
from .find import Condition, MissingCaption, few, find_source
from .latent_folder import LatentFolder
from .mask_finding import Masks
from .parallel import map_threaded
from .read import to_rgb

MOST_UNREADABLE = 0.05  # a larger share hints at a broken copy rather than a few bad files
_FEW = 1000  # below this a generator repeats its pictures rather than learning what they share
_ORIENTATION = 0x0112  # the EXIF tag
_CONDITIONED = {
    "text": "conditioned on captions",
    "class": "conditioned on classes",
    "unconditional": "unconditional",
    "unknown": "not usable",
}


@dataclass(frozen=True)
class Seen:
    """One picture, opened: its size after EXIF rotation and its mode, or why it cannot be read; so for its mask."""

    size: tuple[int, int] = (0, 0)
    mode: str = ""
    rotated: bool = False
    error: str | None = None
    mask_size: tuple[int, int] | None = None
    mask_error: str | None = None


@dataclass(frozen=True)
class Report:
    """What ``latentflow check`` prints.

    ``problems`` would break a run, ``warnings`` would not but are worth knowing.
    """

    data: str
    condition: str
    pictures: int = 0
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    captions: int = 0
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    modes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rotated: int = 0
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    masks: int = 0
    unreadable_masks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    duplicates: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and numbers."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one screen."""
        lines = [f"{self.data}: {self.pictures} pictures, {_CONDITIONED[self.condition]}", *self.notes]
        if self.classes:
            lines.append("pictures per class: " + _most(self.classes, 12))
        if self.condition == "text":
            lines.append(f"{self.captions} different captions")
        if self.sizes:
            lines.append("sizes: " + _most(self.sizes))
            lines.append("modes: " + _most(self.modes) + f"; {self.rotated} rotated by EXIF")
        if self.masks:
            lines.append(f"{self.masks} of {self.pictures} pictures have a mask of their own")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} cannot be read and are skipped: {_listed(self.unreadable)}")
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"PROBLEM: {line}" for line in self.problems]
        return [*lines, "a training would stop at the problem" if self.problems else "ready to train"]


def check_source(
    data: str,
    *,
    condition: Condition = "auto",
    missing_caption: MissingCaption = "error",
    masks: Masks = "auto",
    progress: bool = True,
) -> Report:
    """Opens every picture and mask of ``data`` and reports; a folder that cannot be used is a report, not an error."""
    try:
        source = find_source(data, condition=condition, missing_caption=missing_caption, masks=masks)
    except UserError as error:
        return Report(data, "unknown", problems=(str(error),))
    seen = _look(source, progress)
    good = [example for example in source.examples if seen[example.name].error is None]
    unreadable = _errors(seen)
    duplicates = _duplicates(good)
    looks = [seen[example.name] for example in good]
    bad_masks = {e.name: why for e in good if (why := seen[e.name].mask_error) is not None}
    classes = Counter(example.label or "" for example in good) if source.classes else {}
    return Report(
        data,
        source.kind,
        pictures=len(good),
        classes=dict(sorted(classes.items())),
        captions=len({example.text for example in good}) if source.kind == "text" else 0,
        sizes=dict(Counter(f"{look.size[0]}x{look.size[1]}" for look in looks).most_common()),
        modes=dict(Counter(look.mode for look in looks).most_common()),
        rotated=sum(look.rotated for look in looks),
        unreadable=unreadable,
        masks=sum(look.mask_size is not None for look in looks),
        unreadable_masks=bad_masks,
        duplicates=tuple(duplicates),
        notes=source.notes,
        problems=(*_problems(source, unreadable), *_mask_problems(bad_masks)),
        warnings=(
            *_warnings(source, good, duplicates),
            *_mask_warnings({e.name: seen[e.name] for e in good}),
        ),
    )


def readable(source: Source, progress: bool = True) -> Source:
    """The source without the pictures that cannot be decoded; its notes name them. Nothing is ever deleted.

    Raises:
        UserError: more than 5 % cannot be decoded, or none is left.
    """
    if isinstance(source, LatentFolder):
        return source  # checked when it was made
    errors = _errors(_look(source, progress))
    if not errors:
        return source
    problems = _problems(source, errors)
    if problems:
        raise UserError(problems[0], "`latentflow check --json` lists them all: repair or move them.")
    kept = [index for index, example in enumerate(source.examples) if example.name not in errors]
    note = f"{len(errors)} pictures cannot be read and are skipped: {_listed(errors)}"
    return source.subset(kept).noted(note)


def _look(source: Source, progress: bool) -> dict[str, Seen]:
    looks = map_threaded(_see, source.examples)
    bar = tqdm(looks, total=len(source), desc="checking pictures", disable=not progress)
    return {example.name: look for example, look in zip(source.examples, bar, strict=True)}


def _see(example: Example) -> Seen:
    try:
        with example.open() as image:
            image.load()
            look = Seen(to_rgb(image).size, image.mode, image.getexif().get(_ORIENTATION, 1) != 1)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        return Seen(error=reason or type(error).__name__)
    try:
        mask = example.open_mask()
    except UserError as error:
        return dataclasses.replace(look, mask_error=error.what)
    return look if mask is None else dataclasses.replace(look, mask_size=mask.size)


def _errors(seen: Mapping[str, Seen]) -> dict[str, str]:
    return {name: look.error for name, look in seen.items() if look.error is not None}


def _listed(unreadable: Mapping[str, str]) -> str:
    return few([f"{name} ({why})" for name, why in unreadable.items()])


def _duplicates(examples: list[Example]) -> list[tuple[str, ...]]:
    """Groups of names that hold the same file."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example.content_key(), []).append(example.name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _problems(source: Source, unreadable: Mapping[str, str]) -> list[str]:
    share = len(unreadable) / len(source)
    if share <= MOST_UNREADABLE:
        return []
    told = f"{len(unreadable)} of {len(source)} pictures cannot be read ({share:.0%}, at most 5 % may)"
    return [f"{told}: {_listed(unreadable)}"]


def _mask_problems(unreadable: Mapping[str, str]) -> list[str]:
    told = few(unreadable.values())
    return [f"{len(unreadable)} masks cannot be used: {told}"] if unreadable else []


def _mask_warnings(seen: Mapping[str, Seen]) -> list[str]:
    resized: list[str] = []
    distorted: list[str] = []
    for name, look in seen.items():
        if look.mask_size is None or look.mask_size == look.size:
            continue
        (width, height), (mask_width, mask_height) = look.size, look.mask_size
        off = abs(mask_height - mask_width * height / width)  # sizes are rounded when a picture is shrunk
        other = off > max(1, 0.02 * mask_height)
        told = f"{name} ({width}x{height}, its mask {mask_width}x{mask_height})"
        (distorted if other else resized).append(told)
    kinds = {"another size": resized, "another aspect ratio": distorted}
    return [
        f"{len(names)} masks have {what} than their picture and are resized to it: {few(names)}"
        for what, names in kinds.items()
        if names
    ]


def _warnings(source: Source, good: list[Example], duplicates: list[tuple[str, ...]]) -> list[str]:
    lines = []
    if duplicates:
        listed = few([" = ".join(names) for names in duplicates])
        lines.append(f"{len(duplicates)} pictures are there more than once: {listed}")
    told = {example.name: (example.text, example.label) for example in good}
    clash = [" = ".join(names) for names in duplicates if len({told[name] for name in names}) > 1]
    if clash:
        lines.append(f"{len(clash)} of them have different captions or classes: {few(clash)}")
    if len(good) < _FEW:
        lines.append(f"{len(good)} pictures are few: below {_FEW} a model mostly memorises them")
    counts = Counter(example.label or "" for example in good) if source.classes else {}
    rare = [f"{name} ({count})" for name, count in sorted(counts.items()) if count < 10]
    if rare:
        lines.append(f"classes of fewer than 10 pictures: {few(rare)}")
    return lines


def _most(counts: Mapping[str, int], limit: int = 5) -> str:
    return few([f"{name} ({count})" for name, count in counts.items()], limit)
