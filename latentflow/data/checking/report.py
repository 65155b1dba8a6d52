"""The report of `latentflow check`: numbers about a data set, and its text."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import few, one_line
from ..dataset import Example
from .inspect_images import BITS, LEVELS

SIDES = (32, 64, 128, 256, 512, 1024)
_ASPECTS = {  # width / height
    "1:2 or taller": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
    "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1 or wider": 2.0,
}  # fmt: skip
_CONDITIONED = {
    "text": "conditioned on captions",
    "class": "conditioned on classes",
    "unconditional": "unconditional",
    "unknown": "not usable",
}
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
NEAR = f"near duplicates: at most {BITS} of 64 bits of their hashes and {LEVELS:g} of 255 levels of thumbnails apart"


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
    texts = Counter(text for example in examples for text in set(example.captions) if text)
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
        lines = [self.headline, *self.notes]
        if self.classes:
            lines.append("images per class: " + list_counts(self.classes, 12))
        if self.condition == "text" and self.captions:
            facts = self.caption_facts
            lines.append(f"{self.captions} different captions")
            lines.append(
                f"words in a caption: {facts.shortest} to {facts.longest}, median {facts.median:g}; "
                f"{facts.vocabulary} different words, {facts.once} of them only once"
            )
        if self.sizes:
            sides = [f"{side} px ({count})" for side, count in self.reach.items() if count]
            lines += [
                "sizes: " + list_counts(self.sizes),
                "shapes: " + list_counts(self.aspects, 12),
                f"a square crop keeps {self.kept_by_square_crop:.0%} of the area",
                f"short sides of at least: {', '.join(sides) or f'none has {SIDES[0]} px'}",
                f"modes: {list_counts(self.modes)}; {self.rotated} rotated by EXIF",
                "formats: " + list_counts(self.formats),
            ]
        if self.profiles:
            lines.append(profile_line(self.profiles))
        if self.masks:
            lines.append(f"{self.masks} of {self.images} images have a mask of their own")
        if self.unreadable:
            reasons = list_reasons(self.unreadable)
            lines.append(f"{len(self.unreadable)} cannot be read and are skipped: {reasons}")
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"PROBLEM: {line}" for line in self.problems]
        return [one_line(line) for line in [*lines, self.verdict]]

    @property
    def headline(self) -> str:
        return f"{self.data}: {self.images} images, {_CONDITIONED[self.condition]}"

    @property
    def verdict(self) -> str:
        return "a training would stop at the problem" if self.problems else "ready to train"


def profile_line(profiles: Mapping[str, int]) -> str:
    """Return a line on the images whose colours are converted from these profiles."""
    count = sum(profiles.values())
    return f"{count} images have another colour profile than sRGB and are converted: {list_counts(profiles)}"


def list_counts(counts: Mapping[str, int], limit: int = 5) -> str:
    return few([f"{name} ({count})" for name, count in counts.items()], limit)


def list_reasons(reasons: Mapping[str, str]) -> str:
    return few([f"{name} ({why})" for name, why in reasons.items()])


def list_groups(groups: Iterable[tuple[str, ...]]) -> str:
    """List groups of names, the first few of each."""
    return few(
        " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "") for names in groups
    )
