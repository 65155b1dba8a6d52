"""The report of `latentflow check` on a data set: its images, and whether a training on them would break."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, few, one_line, plural
from ...utils.names import composed
from ..control import inspect_controls
from ..dataset import Example, Source
from ..labels import Labels
from ..sources.kinds import MissingCaption, find_source
from ..splits import near_groups
from .inspect_images import (
    ImageInfo,
    counted,
    inspect_images,
    list_counts,
    list_reasons,
    profile_line,
    profile_warnings,
    profiles_of,
    unreadable_problems,
)

FEW = 1000  # images: of fewer a generator that is trained from scratch repeats them
_EXTREME = 4  # times as long as wide: a square shows less than a quarter of it
_TINY = 32  # pixels
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")  # Pillow's modes with an alpha channel
_UNBALANCED = 10  # times as many images in the largest class as in the smallest
SIDES = (32, 64, 128, 256, 512, 1024)
_ASPECTS = {  # width / height
    "1:2 or taller": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
    "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1 or wider": 2.0,
}  # fmt: skip
_CONDITIONED = {
    "text": "conditioned on captions",
    "class": "conditioned on classes",
    "unconditional": "unconditional",
    "unknown": "cannot be used",
}
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def aspect_histogram(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Count images by the nearest (in ratio) of the usual shapes, from tall to wide; shapes of none are left out."""
    values = np.log([width / height for width, height in sizes])
    nearest = np.abs(values[:, None] - np.log(list(_ASPECTS.values()))).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(_ASPECTS)).tolist()
    return {name: count for name, count in zip(_ASPECTS, counts, strict=True) if count}


def reach(sizes: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Count the images whose short side has at least 32, 64, ... pixels."""
    short = np.array([min(size) for size in sizes], dtype=np.int64)
    return {str(side): int((short >= side).sum()) for side in SIDES}


def kept_by_square_crop(sizes: Iterable[tuple[int, int]]) -> float:
    """Return the share of their area that images keep when a square is cut from their centre, on average."""
    shares = [min(size) / max(size) for size in sizes]
    return float(np.mean(shares)) if shares else 1.0


@dataclass(frozen=True)
class CaptionFacts:
    """Numbers about all captions of all images.

    Attributes:
        missing: names of images without one.
        different: number of different captions.
        repeated: captions of several images, the most frequent first, with the number of images.
        shortest, median, longest: in words.
        vocabulary: number of different words, whatever their case.
        once: number of words that occur only once, and so can hardly be learnt.
        common: the most frequent words, with their counts.
    """

    missing: tuple[str, ...] = ()
    different: int = 0
    repeated: Mapping[str, int] = field(default_factory=dict)
    shortest: int = 0
    median: float = 0
    longest: int = 0
    vocabulary: int = 0
    once: int = 0
    common: Mapping[str, int] = field(default_factory=dict)


def caption_facts(examples: Sequence[Example], most: int = 20) -> CaptionFacts:
    """Return the facts, with ``most`` repeated captions and common words."""
    texts = Counter(text for example in examples for text in {*map(composed, example.captions)} if text)
    words = {text: _WORD.findall(text.casefold()) for text in texts}
    lengths = [len(found) for found in words.values()]
    counts = Counter(word for text, times in texts.items() for word in words[text] * times)
    return CaptionFacts(
        missing=tuple(example.name for example in examples if not example.text),
        different=len(texts),
        repeated={text: times for text, times in _most_frequent(texts, most).items() if times > 1},
        shortest=min(lengths, default=0),
        median=statistics.median(lengths) if lengths else 0,
        longest=max(lengths, default=0),
        vocabulary=len(counts),
        once=sum(times == 1 for times in counts.values()),
        common=_most_frequent(counts, most),
    )


def _most_frequent(counts: Counter[str], most: int) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most])


@dataclass(frozen=True)
class Suggestion:
    """A first training: its title, a command line for the shell, and the reason for each choice in it."""

    title: str
    command: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Report:
    """The result of ``latentflow check``.

    ``problems`` would break a run, ``warnings`` would not but are worth knowing.
    """

    data: str
    condition: str
    images: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    captions: int = 0
    caption_facts: CaptionFacts = CaptionFacts()
    sizes: Mapping[str, int] = field(default_factory=dict)
    aspects: Mapping[str, int] = field(default_factory=dict)
    reach: Mapping[str, int] = field(default_factory=dict)
    kept_by_square_crop: float = 1.0
    modes: Mapping[str, int] = field(default_factory=dict)
    formats: Mapping[str, int] = field(default_factory=dict)
    misnamed: Mapping[str, str] = field(default_factory=dict)
    animated: tuple[str, ...] = ()
    rotated: int = 0
    profiles: Mapping[str, int] = field(default_factory=dict)
    unusable_profiles: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    masks: int = 0
    unreadable_masks: Mapping[str, str] = field(default_factory=dict)
    controls: int = 0
    labels: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, strings and numbers, under the keys that scripts read: `pictures` too."""
        values = dataclasses.asdict(self)
        return {"pictures" if name == "images" else name: value for name, value in values.items()}

    def lines(self) -> list[str]:
        """Return the report for people, one screen."""
        lines = [self.headline, *self.notes, *self.facts()]
        if self.unreadable:
            reasons = list_reasons(self.unreadable)
            lines.append(f"{plural(len(self.unreadable), 'file')} cannot be read, left out: {reasons}")
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"PROBLEM: {line}" for line in self.problems]
        return [one_line(line) for line in [*lines, self.verdict]]

    def facts(self) -> Iterator[str]:
        """Yield a sentence on each thing that was counted."""
        if self.classes:
            yield "images per class: " + list_counts(self.classes, 12)
        if self.condition == "text" and self.captions:
            facts = self.caption_facts
            yield plural(self.captions, "different caption")
            yield (
                f"words in a caption: {facts.shortest} to {facts.longest}, median {facts.median:g}; "
                f"{plural(facts.vocabulary, 'different word')}, {facts.once} of them used only once"
            )
        if self.sizes:
            yield "sizes (width x height): " + list_counts(self.sizes)
            if len(self.sizes) > 1:
                yield "width to height: " + list_counts(self.aspects, 12)
                yield f"images by their short side: {self._reached()}"
            if self.kept_by_square_crop < 1:
                yield f"a square crop keeps {self.kept_by_square_crop:.0%} of the area, on average"
            yield "formats: " + list_counts(self.formats)
            yield "colour modes: " + list_counts(self.modes)
        if transparent := sum(self.modes.get(mode, 0) for mode in _TRANSPARENT):
            yield f"{plural(transparent, 'image')} with an alpha channel, put on white (--background when training)"
        if self.rotated:
            yield f"{plural(self.rotated, 'image')} turned upright as EXIF says"
        if self.profiles:
            yield profile_line(self.profiles)
        if self.masks:
            yield f"images with a mask of their own: {self.masks} of {self.images}"
        if self.controls:
            yield f"images with a control image: {self.controls} of {self.images}"
        if self.labels:
            yield f"{plural(len(self.labels), 'label')} of the control images: {few(self.labels, 10)}"

    def _reached(self) -> str:
        reached = [f"{count} of at least {side} px" for side, count in self.reach.items() if count]
        return ", ".join(reached) or f"none of at least {SIDES[0]} px"

    @property
    def headline(self) -> str:
        if self.condition == "unknown":
            return f"{self.data}: {_CONDITIONED[self.condition]}"
        return f"{self.data}: {plural(self.images, 'image')}, {_CONDITIONED[self.condition]}"

    @property
    def verdict(self) -> str:
        return "not ready to train: mend the problem first" if self.problems else "ready to train"


def check_data(
    data: str, *, missing_caption: MissingCaption = "error", labels: Labels = (), **request: Any
) -> tuple[Report, Source | None]:
    """Return the report on ``data``, and its images that can be used; None where they cannot be found.

    ``labels`` are those of label maps, ``request`` further settings of ``find_source``. Where captions or classes are
    missing, that is a problem, and the rest is checked all the same.
    """
    problems: list[str] = []
    source = None
    for missing in dict.fromkeys((missing_caption, "empty", "skip")):
        try:
            source = find_source(data, missing_caption=missing, **request)
            break
        except UserError as error:
            problems.append(one_line(f"{error.what}. {error.fix}".rstrip(". ")))
    if source is None:
        return Report(data, "unknown", problems=tuple(problems[:1])), None
    if source.precomputed:  # its images were checked when it was made
        problems = [*problems[:1], *source.damage()]
        report = Report(data, source.kind, images=len(source), notes=source.notes, problems=tuple(problems))
        return report, None
    return _report(source, problems[:1], labels)


def check_source(data: str, **settings: Any) -> Report:
    """Open every image and mask of ``data`` and report; data that cannot be used are a report, not an error.

    The settings are those of ``check_data``.
    """
    return check_data(data, **settings)[0]


def _report(source: Source, problems: list[str], labels: Labels) -> tuple[Report, Source]:
    infos = {
        example.name: info for example, info in zip(source.examples, inspect_images(source), strict=True)
    }
    unreadable = {name: info.error for name, info in infos.items() if info.error is not None}
    good = source.subset([row for row, e in enumerate(source.examples) if e.name not in unreadable])
    infos = {name: info for name, info in infos.items() if name not in unreadable}
    sizes = [info.size for info in infos.values()]
    classes = Counter(example.label for example in good.examples if example.label) if source.classes else {}
    bad_masks = {name: info.mask_error for name, info in infos.items() if info.mask_error}
    profiles, unusable_profiles = profiles_of(infos)
    near = _groups(infos, near_groups(list(infos.values())).tolist())
    beside = []
    if bad_masks:
        beside = [f"{plural(len(bad_masks), 'mask')} cannot be used: {few(bad_masks.values())}"]
    controls = inspect_controls(good, labels)
    report = Report(
        source.name,
        source.kind,
        images=len(good),
        classes=dict(sorted(classes.items())),
        captions=len({composed(example.text or "") for example in good.examples})
        if source.kind == "text"
        else 0,
        caption_facts=caption_facts(good.examples if source.kind == "text" else []),
        sizes=counted(f"{width}x{height}" for width, height in sizes),
        aspects=aspect_histogram(sizes) if sizes else {},
        reach=reach(sizes),
        kept_by_square_crop=kept_by_square_crop(sizes),
        modes=counted(info.mode for info in infos.values()),
        formats=counted(info.format or "drawn" for info in infos.values()),
        misnamed={name: info.format for name, info in infos.items() if _is_misnamed(name, info.format)},
        animated=tuple(name for name, info in infos.items() if info.animated),
        rotated=sum(info.rotated for info in infos.values()),
        profiles=profiles,
        unusable_profiles=unusable_profiles,
        unreadable=unreadable,
        masks=sum(info.mask_size is not None for info in infos.values()),
        unreadable_masks=bad_masks,
        duplicates=tuple(_groups(infos, [info.key for info in infos.values()])),
        near_duplicates=tuple(group for group in near if len({infos[name].key for name in group}) > 1),
        notes=source.notes,
        problems=(*problems, *unreadable_problems(unreadable, len(source)), *beside, *controls.problems),
        controls=sum(bool(example.control_kinds) for example in good.examples),
        labels=tuple(name for name, _ in controls.labels),
    )
    good = dataclasses.replace(good, labels=controls.labels)
    return dataclasses.replace(report, warnings=tuple(_warnings(report, good.examples, infos))), good


def _groups(names: Iterable[str], keys: Iterable[Hashable]) -> list[tuple[str, ...]]:
    """Return the groups of names with equal keys."""
    groups: dict[Hashable, list[str]] = {}
    for name, key in zip(names, keys, strict=True):
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _is_misnamed(name: str, format: str) -> bool:
    """Return whether a name ends like those of another format. MPO is what cameras call a JPEG of several images."""
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    return bool(format and named) and named != format and {named, format} != {"JPEG", "MPO"}


def _contradict(annotations: Iterable[tuple[str | None, ...]]) -> bool:
    """Return whether images are annotated differently; one that has no caption, or no class, contradicts none."""
    return any(len({*column} - {None, ""}) > 1 for column in zip(*annotations, strict=True))


def _warnings(report: Report, examples: Sequence[Example], infos: Mapping[str, ImageInfo]) -> Iterator[str]:
    """Write what is worth knowing about readable images, and would not break a run."""
    texts = {example.name: (composed(example.text or ""), example.label) for example in examples}
    if duplicates := report.duplicates:
        yield f"{plural(len(duplicates), 'group')} of equal files: {list_groups(duplicates)}"
        if clash := [names for names in duplicates if _contradict(texts[name] for name in names)]:
            yield f"equal files with different captions or classes: {list_groups(clash)}"
    if report.images < FEW:
        yield (
            f"few images ({report.images}): trained on fewer than {FEW:,}, a model mostly memorises them, unless it "
            "starts from a checkpoint"
        )
    if rare := [f"{name} ({count})" for name, count in report.classes.items() if count < 10]:
        yield f"classes of fewer than 10 images: {few(rare)}"
    if near := report.near_duplicates:
        yield (
            f"{plural(len(near), 'group')} of near duplicates, {sum(map(len, near))} images in all; a group is trained "
            f"on or held out as a whole: {list_groups(near)}"
        )
        if clash := [names for names in near if _contradict((texts[name][1],) for name in names)]:
            yield f"near duplicates in different classes: {list_groups(clash)}"
    if missing := report.caption_facts.missing:
        yield f"{plural(len(missing), 'image')} without a caption: {few(missing)}"
    repeated = report.caption_facts.repeated.items()
    if common := {text: count for text, count in repeated if count > max(10, report.images / 20)}:
        yield f"captions that more than 5 % of the images share: {list_counts(common)}"
    if len(classes := report.classes) > 1:
        small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
        if classes[large] >= _UNBALANCED * classes[small]:
            yield (
                f"unbalanced classes: {large} has {plural(classes[large], 'image')}, {small} has {classes[small]}; add "
                "images, or train with --balance-classes"
            )
    sized = {f"{name} ({info.width}x{info.height})": info.size for name, info in infos.items()}
    if extreme := [name for name, size in sized.items() if max(size) > _EXTREME * min(size)]:
        what = f"more than {_EXTREME} times as long as wide, of which a square crop shows little"
        yield f"{plural(len(extreme), 'image')} {what}: {few(extreme)}"
    if tiny := [name for name, size in sized.items() if min(size) < _TINY]:
        yield f"{plural(len(tiny), 'image')} with a side below {_TINY} px, which training enlarges: {few(tiny)}"
    if report.misnamed:
        what = "in another format than the name says, read all the same"
        yield f"{plural(len(report.misnamed), 'file')} {what}: {list_reasons(report.misnamed)}"
    if report.animated:
        what = f"{plural(len(report.animated), 'animated image')}, of which only the first frame is used"
        yield f"{what}: {few(report.animated)}"
    yield from profile_warnings(report.unusable_profiles)
    yield from _mask_warnings(infos)


def _mask_warnings(infos: Mapping[str, ImageInfo]) -> Iterator[str]:
    resized: dict[str, list[str]] = {"another size": [], "another aspect ratio": []}
    for name, info in infos.items():
        if info.mask_size is None or info.mask_size == info.size:
            continue
        off = abs(info.mask_height - info.mask_width * info.height / info.width)
        rounded = off <= max(1, 0.02 * info.mask_height)  # as when an image is shrunk
        sizes = f"{info.width}x{info.height}, its mask {info.mask_width}x{info.mask_height}"
        resized["another size" if rounded else "another aspect ratio"].append(f"{name} ({sizes})")
    for what, names in resized.items():
        if names:
            yield f"{plural(len(names), 'mask')} of {what} than the image, resized to it: {few(names)}"


def list_groups(groups: Iterable[tuple[str, ...]]) -> str:
    """List groups of names, the first few of each."""
    return few(
        " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "") for names in groups
    )
