"""What is in a data set, and whether a training on it would break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import UserError, few, one_line
from ..dataset import Example, FileExample, Source
from ..sources.assemble import Condition, Masks, MissingCaption
from ..sources.kinds import find_source
from .duplicates import near_duplicates
from .inspect_images import Look, looks_at
from .report import (
    NEAR,
    Report,
    aspect_histogram,
    caption_facts,
    joined,
    kept_by_square_crop,
    listed,
    most,
    profile_line,
    reach,
)

MOST_UNREADABLE = 0.05  # a larger share hints at a broken copy rather than a few bad files
_FEW = 1000  # below this a generator repeats its images rather than learning what they share
_EXTREME = 4  # times as long as wide: a square shows less than a quarter of it
_TINY = 32  # pixels
_UNBALANCED = 10  # times as many images in the largest class as in the smallest


def look_through(
    data: str,
    *,
    condition: Condition = "auto",
    missing_caption: MissingCaption = "error",
    masks: Masks = "auto",
    columns: Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[Report, Source | None]:
    """The report, and the images of ``data`` that can be used; None where they cannot be found.

    Where captions or classes are missing, that is a problem, and the rest is looked at all the same.
    """
    wanted: dict[str, Any] = {"condition": condition, "masks": masks, "columns": columns}
    problems: list[str] = []
    source = None
    for missing in dict.fromkeys((missing_caption, "empty", "skip")):
        try:
            source = find_source(data, missing_caption=missing, **wanted)
            break
        except UserError as error:
            problems.append(one_line(f"{error.what}. {error.fix}".rstrip(". ")))
    if source is None:
        return Report(data, "unknown", problems=tuple(problems[:1])), None
    if source.precomputed:  # its images were checked when it was made
        problems = [*problems[:1], *source.damage()]
        report = Report(data, source.kind, images=len(source), notes=source.notes, problems=tuple(problems))
        return report, None
    return _report(source, problems[:1], progress)


def check_source(data: str, **settings: Any) -> Report:
    """Opens every image and mask of ``data`` and reports; a folder that cannot be used is a report, not an error.

    The settings are those of ``look_through``.
    """
    return look_through(data, **settings)[0]


def readable(source: Source, progress: bool = True) -> Source:
    """The source without the images that cannot be decoded; its notes name them. Nothing is ever deleted.

    Raises:
        UserError: more than 5 % cannot be decoded, or none is left.
    """
    if source.precomputed:
        return source  # checked when it was made
    notable = {
        example.name: look
        for example, look in zip(source.examples, looks_at(source, progress), strict=True)
        if look.error is not None or look.profile
    }
    errors = {name: look.error for name, look in notable.items() if look.error is not None}
    if notes := _profile_notes(source, notable):
        source = source.noted(*notes)
    if not errors:
        return source
    problems = _problems(source, errors)
    if problems:
        raise UserError(problems[0], "`latentflow check --json` lists them all: repair or move them.")
    kept = [index for index, example in enumerate(source.examples) if example.name not in errors]
    note = f"{len(errors)} images cannot be read and are skipped: {listed(errors)}"
    note += "; `latentflow check --json` names all" if len(errors) > 5 else ""
    return source.subset(kept).noted(one_line(note))


def _profile_notes(source: Source, looks: Mapping[str, Look]) -> list[str]:
    """Return the notes of a source on what becomes of colour profiles."""
    profiles, unusable = _profiles(looks)
    notes = [profile_line(profiles)] if profiles else []
    if profiles and any(isinstance(one, FileExample) and one.colours == "stored" for one in source.examples):
        count = sum(profiles.values())
        notes = [f"{count} images have another colour profile than sRGB, not used (--colours stored)"]
    return [one_line(note) for note in [*notes, *_profile_warnings(unusable)]]


def _profiles(looks: Mapping[str, Look]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of images of each colour profile other than sRGB, and by image why one cannot be used."""
    profiles = _counted(one.profile for one in looks.values() if one.profile and not one.profile_problem)
    return profiles, {name: one.profile_problem for name, one in looks.items() if one.profile_problem}


def _profile_warnings(unusable: Mapping[str, str]) -> list[str]:
    what = f"{len(unusable)} images have a colour profile that cannot be used, and are read as sRGB"
    return [f"{what}: {listed(unusable)}"] if unusable else []


def near_groups(looks: Sequence[Look]) -> NDArray[np.int64]:
    """(N,): which group of near duplicates each image belongs to; none of them may be unreadable."""
    if not looks:
        return np.zeros(0, dtype=np.int64)
    return near_duplicates(
        np.array([look.hash for look in looks], dtype=np.int64),
        np.frombuffer(b"".join(look.thumbnail for look in looks), dtype=np.uint8).reshape(len(looks), -1),
        np.array([look.size for look in looks], dtype=np.int64),
    )


def groups_of(source: Source) -> NDArray[np.int64]:
    """(N,): the number of the group of near duplicates that each image is in; what cannot be read stands alone."""
    if (stored := source.groups()) is not None:
        return stored
    looks = list(looks_at(source, progress=False))
    rows = [row for row, look in enumerate(looks) if look.error is None]
    groups = np.arange(len(looks), 2 * len(looks))
    groups[rows] = near_groups([looks[row] for row in rows])
    return groups


def _report(source: Source, problems: list[str], progress: bool) -> tuple[Report, Source]:
    looked = list(zip(source.examples, looks_at(source, progress), strict=True))
    unreadable = {example.name: look.error for example, look in looked if look.error is not None}
    rows = [row for row, (_, look) in enumerate(looked) if look.error is None]
    good, looks = [looked[row][0] for row in rows], [looked[row][1] for row in rows]
    names = [example.name for example in good]
    sizes = [look.size for look in looks]
    duplicates = _groups(names, [look.key for look in looks])
    near = _near(names, looks) if looks else []
    bad_masks = {name: look.mask_error for name, look in zip(names, looks, strict=True) if look.mask_error}
    classes = Counter(example.label or "" for example in good) if source.classes else {}
    misnamed = {
        name: look.format for name, look in zip(names, looks, strict=True) if _is_misnamed(name, look.format)
    }
    animated = tuple(name for name, look in zip(names, looks, strict=True) if look.animated)
    facts = caption_facts(good) if source.kind == "text" else caption_facts([])
    profiles, unusable_profiles = _profiles(dict(zip(names, looks, strict=True)))
    report = Report(
        source.name,
        source.kind,
        images=len(good),
        classes=dict(sorted(classes.items())),
        captions=len({example.text for example in good}) if source.kind == "text" else 0,
        caption_facts=facts,
        sizes=_counted(f"{width}x{height}" for width, height in sizes),
        aspects=aspect_histogram(sizes) if sizes else {},
        reach=reach(sizes),
        kept_by_square_crop=kept_by_square_crop(sizes),
        modes=_counted(look.mode for look in looks),
        formats=_counted(look.format or "drawn" for look in looks),
        misnamed=misnamed,
        animated=animated,
        rotated=sum(look.rotated for look in looks),
        profiles=profiles,
        unusable_profiles=unusable_profiles,
        unreadable=unreadable,
        masks=sum(look.mask_size is not None for look in looks),
        unreadable_masks=bad_masks,
        duplicates=tuple(duplicates),
        near_duplicates=tuple(near),
        notes=source.notes,
        problems=(*problems, *_problems(source, unreadable), *_mask_problems(bad_masks)),
        warnings=(
            *_warnings(source, good, duplicates),
            *_near_warnings(near, good),
            *_caption_warnings(facts.repeated, facts.missing, len(good)),
            *_class_warnings(classes),
            *_size_warnings(dict(zip(names, sizes, strict=True))),
            *_format_warnings(misnamed, animated),
            *_profile_warnings(unusable_profiles),
            *_mask_warnings(dict(zip(names, looks, strict=True))),
        ),
    )
    return report, source.subset(rows)


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _is_misnamed(name: str, format: str) -> bool:
    """Whether a name ends as those of another format do. MPO is what cameras call a JPEG of several images."""
    wanted = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    return bool(format and wanted) and {wanted, format} - {"JPEG", "MPO"} != set() and wanted != format


def _groups(names: list[str], keys: Sequence[Any]) -> list[tuple[str, ...]]:
    """Groups of names with equal keys."""
    groups: dict[Any, list[str]] = {}
    for name, key in zip(names, keys, strict=True):
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _near(names: list[str], looks: list[Look]) -> list[tuple[str, ...]]:
    """Groups of near duplicates, those left out that are equal files only."""
    keys = dict(zip(names, (look.key for look in looks), strict=True))
    groups = _groups(names, near_groups(looks).tolist())
    return [group for group in groups if len({keys[name] for name in group}) > 1]


def _problems(source: Source, unreadable: Mapping[str, str]) -> list[str]:
    share = len(unreadable) / len(source)
    if share <= MOST_UNREADABLE:
        return []
    told = f"{len(unreadable)} of {len(source)} images cannot be read ({share:.0%}, at most 5 % may)"
    return [one_line(f"{told}: {listed(unreadable)}")]


def _mask_problems(unreadable: Mapping[str, str]) -> list[str]:
    told = few(unreadable.values())
    return [f"{len(unreadable)} masks cannot be used: {told}"] if unreadable else []


def _mask_warnings(seen: Mapping[str, Look]) -> list[str]:
    resized: list[str] = []
    distorted: list[str] = []
    for name, look in seen.items():
        if look.mask_size is None or look.mask_size == look.size:
            continue
        (width, height), (mask_width, mask_height) = look.size, look.mask_size
        off = abs(mask_height - mask_width * height / width)  # sizes are rounded when an image is shrunk
        other = off > max(1, 0.02 * mask_height)
        told = f"{name} ({width}x{height}, its mask {mask_width}x{mask_height})"
        (distorted if other else resized).append(told)
    kinds = {"another size": resized, "another aspect ratio": distorted}
    return [
        f"{len(names)} masks have {what} than their image and are resized to it: {few(names)}"
        for what, names in kinds.items()
        if names
    ]


def _warnings(source: Source, good: list[Example], duplicates: list[tuple[str, ...]]) -> list[str]:
    lines = []
    if duplicates:
        lines.append(f"{len(duplicates)} images are there more than once: {joined(duplicates)}")
    told = {example.name: (example.text, example.label) for example in good}
    clash = [names for names in duplicates if len({told[name] for name in names}) > 1]
    if clash:
        lines.append(f"{len(clash)} of them have different captions or classes: {joined(clash)}")
    if len(good) < _FEW:
        lines.append(f"{len(good)} images are few: below {_FEW} a model mostly memorises them")
    counts = Counter(example.label or "" for example in good) if source.classes else {}
    rare = [f"{name} ({count})" for name, count in sorted(counts.items()) if count < 10]
    if rare:
        lines.append(f"classes of fewer than 10 images: {few(rare)}")
    return lines


def _near_warnings(near: list[tuple[str, ...]], good: list[Example]) -> list[str]:
    if not near:
        return []
    total, largest = sum(map(len, near)), max(map(len, near))
    lines = [
        f"{total} images are {NEAR} ({len(near)} groups, the largest of {largest}); "
        f"a group is trained on or held out as a whole: {joined(near)}"
    ]
    labels = {example.name: example.label for example in good}
    clash = [names for names in near if len({labels[name] for name in names}) > 1]
    if clash:
        lines.append(f"{len(clash)} groups of near duplicates have different classes: {joined(clash)}")
    return lines


def _caption_warnings(repeated: Mapping[str, int], missing: tuple[str, ...], images: int) -> list[str]:
    lines = []
    if missing:
        lines.append(f"{len(missing)} images have no caption: {few(missing)}")
    common = {text: count for text, count in repeated.items() if count > max(10, images / 20)}
    if common:
        lines.append(f"captions that more than 5 % of the images share: {most(common)}")
    return lines


def _class_warnings(classes: Mapping[str, int]) -> list[str]:
    if len(classes) < 2:
        return []
    small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    if classes[large] < _UNBALANCED * classes[small]:
        return []
    return [
        f"classes are unbalanced: {large} has {classes[large]} images, {small} has {classes[small]}; "
        "`repeats` of a mix, or more images, even them out"
    ]


def _size_warnings(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    told = {name: f"{name} ({width}x{height})" for name, (width, height) in sizes.items()}
    tiny = [told[name] for name, size in sizes.items() if min(size) < _TINY]
    extreme = [told[name] for name, size in sizes.items() if max(size) > _EXTREME * min(size)]
    lines = []
    if extreme:
        what = (
            f"images are more than {_EXTREME} times as long as wide, and a square crop shows little of them"
        )
        lines.append(f"{len(extreme)} {what}: {few(extreme)}")
    if tiny:
        lines.append(f"{len(tiny)} images have a side below {_TINY} pixels and are enlarged: {few(tiny)}")
    return lines


def _format_warnings(misnamed: Mapping[str, str], animated: tuple[str, ...]) -> list[str]:
    lines = []
    if misnamed:
        lines.append(
            f"{len(misnamed)} files are of another format than their names say, and are read all the same: "
            + listed(misnamed)
        )
    if animated:
        lines.append(f"of {len(animated)} animated images the first frame is used: {few(animated)}")
    return lines
