"""What ``latentflow check`` says of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentflow.errors import few, one_line

from .near import BITS, LEVELS
from .words import CaptionFacts

_CONDITIONED = {
    "text": "conditioned on captions",
    "class": "conditioned on classes",
    "unconditional": "unconditional",
    "unknown": "not usable",
}
NEAR = f"near duplicates: at most {BITS} of 64 bits of their hashes and {LEVELS:g} of 255 levels of thumbnails apart"


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
    caption_facts: CaptionFacts = CaptionFacts()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    aspects: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reach: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kept_by_square_crop: float = 1.0
    modes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    formats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misnamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    animated: tuple[str, ...] = ()
    rotated: int = 0
    profiles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unusable_profiles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    masks: int = 0
    unreadable_masks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    duplicates: tuple[tuple[str, ...], ...] = ()
    near_duplicates: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, strings and numbers."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The report for people, one screen."""
        lines = [self.headline, *self.notes]
        if self.classes:
            lines.append("pictures per class: " + most(self.classes, 12))
        if self.condition == "text" and self.captions:
            facts = self.caption_facts
            lines.append(f"{self.captions} different captions")
            lines.append(
                f"words in a caption: {facts.shortest} to {facts.longest}, median {facts.median:g}; "
                f"{facts.vocabulary} different words, {facts.once} of them once only"
            )
        if self.sizes:
            lines.append("sizes: " + most(self.sizes))
            lines.append("shapes: " + most(self.aspects, 12))
            lines.append(
                f"a square crop keeps {self.kept_by_square_crop:.0%} of the area; short sides of at least: "
                + ", ".join(f"{side} px ({count})" for side, count in self.reach.items() if count)
            )
            lines.append("modes: " + most(self.modes) + f"; {self.rotated} rotated by EXIF")
            lines.append("formats: " + most(self.formats))
        if self.profiles:
            lines.append(profile_line(self.profiles))
        if self.masks:
            lines.append(f"{self.masks} of {self.pictures} pictures have a mask of their own")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} cannot be read and are skipped: {listed(self.unreadable)}")
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"PROBLEM: {line}" for line in self.problems]
        return [one_line(line) for line in [*lines, self.verdict]]

    @property
    def headline(self) -> str:
        return f"{self.data}: {self.pictures} pictures, {_CONDITIONED[self.condition]}"

    @property
    def verdict(self) -> str:
        return "a training would stop at the problem" if self.problems else "ready to train"


def most(counts: Mapping[str, int], limit: int = 5) -> str:
    return few([f"{name} ({count})" for name, count in counts.items()], limit)


def profile_line(profiles: Mapping[str, int]) -> str:
    """Return a line on what becomes of the images that have these colour profiles."""
    count = sum(profiles.values())
    return f"{count} images have another colour profile than sRGB and are converted: {most(profiles)}"


def listed(unreadable: Mapping[str, str]) -> str:
    return few([f"{name} ({why})" for name, why in unreadable.items()])


def joined(groups: Iterable[tuple[str, ...]]) -> str:
    """Groups of names, the first few of each."""
    return few(
        " = ".join(names[:4]) + (f" = {len(names) - 4} more" if len(names) > 4 else "") for names in groups
    )
