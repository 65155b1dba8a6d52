"""The check of a data set: its images, and whether a training on it would break."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import UserError, few, one_line
from ..dataset import Example, FileExample, Source
from ..sources.kinds import MissingCaption, find_source
from .inspect_images import ImageInfo, inspect_images, near_duplicates
from .report import (
    NEAR,
    Report,
    aspect_histogram,
    caption_facts,
    kept_by_square_crop,
    list_counts,
    list_groups,
    list_reasons,
    profile_line,
    reach,
)

MOST_UNREADABLE = 0.05  # a larger share hints at a broken copy rather than a few bad files
_FEW = 1000  # below this a generator repeats its images rather than learning what they share
_EXTREME = 4  # times as long as wide: a square shows less than a quarter of it
_TINY = 32  # pixels
_UNBALANCED = 10  # times as many images in the largest class as in the smallest


def check_data(
    data: str, *, missing_caption: MissingCaption = "error", **request: Any
) -> tuple[Report, Source | None]:
    """Return the report on ``data``, and its images that can be used; None where they cannot be found.

    ``request`` are further settings of ``find_source``. Where captions or classes are missing, that is a problem, and
    the rest is checked all the same.
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
    return _report(source, problems[:1])


def check_source(data: str, **settings: Any) -> Report:
    """Open every image and mask of ``data`` and report; data that cannot be used are a report, not an error.

    The settings are those of ``check_data``.
    """
    return check_data(data, **settings)[0]


def readable(source: Source) -> Source:
    """Return the source without the images that cannot be decoded; its notes name them. Nothing is ever deleted.

    Raises:
        UserError: more than 5 % cannot be decoded, or none is left.
    """
    if source.precomputed:
        return source  # checked when it was made
    notable = {
        example.name: info
        for example, info in zip(source.examples, inspect_images(source), strict=True)
        if info.error is not None or info.profile
    }
    errors = {name: info.error for name, info in notable.items() if info.error is not None}
    profiles, unusable = _profiles(notable)
    notes = [profile_line(profiles)] if profiles else []
    if profiles and any(isinstance(e, FileExample) and e.colours == "stored" for e in source.examples):
        count = sum(profiles.values())
        notes = [f"{count} images have another colour profile than sRGB, not used (--colours stored)"]
    notes += _profile_warnings(unusable)
    if problems := _unreadable_problems(errors, len(source)):
        raise UserError(problems[0], "`latentflow check --json` lists them all: repair or move them.")
    if errors:
        all_names = "; `latentflow check --json` names all" if len(errors) > 5 else ""
        notes.append(
            f"{len(errors)} images cannot be read and are skipped: {list_reasons(errors)}{all_names}"
        )
        source = source.subset([row for row, e in enumerate(source.examples) if e.name not in errors])
    return source.noted(*map(one_line, notes)) if notes else source


def groups_of(source: Source) -> NDArray[np.int64]:
    """Return the number of the group of near duplicates (N,) of every image; what cannot be read stands alone."""
    if (stored := source.groups()) is not None:
        return stored
    infos = list(inspect_images(source, progress=False))
    rows = [row for row, info in enumerate(infos) if info.error is None]
    groups = np.arange(len(infos), 2 * len(infos))
    groups[rows] = _near_groups([infos[row] for row in rows])
    return groups


def _near_groups(infos: Sequence[ImageInfo]) -> NDArray[np.int64]:
    """Return the group of near duplicates (N,) of every image; all of them are readable."""
    if not infos:
        return np.zeros(0, dtype=np.int64)
    return near_duplicates(
        np.array([info.hash for info in infos], dtype=np.int64),
        np.frombuffer(b"".join(info.thumbnail for info in infos), dtype=np.uint8).reshape(len(infos), -1),
        np.array([info.size for info in infos], dtype=np.int64),
    )


def _report(source: Source, problems: list[str]) -> tuple[Report, Source]:
    infos = {
        example.name: info for example, info in zip(source.examples, inspect_images(source), strict=True)
    }
    unreadable = {name: info.error for name, info in infos.items() if info.error is not None}
    good = source.subset([row for row, e in enumerate(source.examples) if e.name not in unreadable])
    infos = {name: info for name, info in infos.items() if name not in unreadable}
    sizes = [info.size for info in infos.values()]
    classes = Counter(example.label or "" for example in good.examples) if source.classes else {}
    bad_masks = {name: info.mask_error for name, info in infos.items() if info.mask_error}
    profiles, unusable_profiles = _profiles(infos)
    near = _groups(infos, _near_groups(list(infos.values())).tolist())
    mask_problems = [f"{len(bad_masks)} masks cannot be used: {few(bad_masks.values())}"] if bad_masks else []
    report = Report(
        source.name,
        source.kind,
        images=len(good),
        classes=dict(sorted(classes.items())),
        captions=len({example.text for example in good.examples}) if source.kind == "text" else 0,
        caption_facts=caption_facts(good.examples if source.kind == "text" else []),
        sizes=_counted(f"{width}x{height}" for width, height in sizes),
        aspects=aspect_histogram(sizes) if sizes else {},
        reach=reach(sizes),
        kept_by_square_crop=kept_by_square_crop(sizes),
        modes=_counted(info.mode for info in infos.values()),
        formats=_counted(info.format or "drawn" for info in infos.values()),
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
        problems=(*problems, *_unreadable_problems(unreadable, len(source)), *mask_problems),
    )
    return dataclasses.replace(report, warnings=tuple(_warnings(report, good.examples, infos))), good


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


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


def _profiles(infos: Mapping[str, ImageInfo]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of images of each colour profile other than sRGB, and by image why one cannot be used."""
    profiles = _counted(info.profile for info in infos.values() if info.profile and not info.profile_problem)
    return profiles, {name: info.profile_problem for name, info in infos.items() if info.profile_problem}


def _profile_warnings(unusable: Mapping[str, str]) -> list[str]:
    what = f"{len(unusable)} images have a colour profile that cannot be used, and are read as sRGB"
    return [f"{what}: {list_reasons(unusable)}"] if unusable else []


def _unreadable_problems(unreadable: Mapping[str, str], images: int) -> list[str]:
    share = len(unreadable) / images
    if share <= MOST_UNREADABLE:
        return []
    what = f"{len(unreadable)} of {images} images cannot be read ({share:.0%}, at most 5 % may)"
    return [one_line(f"{what}: {list_reasons(unreadable)}")]


def _warnings(report: Report, examples: Sequence[Example], infos: Mapping[str, ImageInfo]) -> Iterator[str]:
    """Write what is worth knowing about readable images, and would not break a run."""
    texts = {example.name: (example.text, example.label) for example in examples}
    labels = {example.name: example.label for example in examples}
    if duplicates := report.duplicates:
        yield f"{len(duplicates)} images occur more than once: {list_groups(duplicates)}"
        if clash := [names for names in duplicates if len({texts[name] for name in names}) > 1]:
            yield f"{len(clash)} of them have different captions or classes: {list_groups(clash)}"
    if report.images < _FEW:
        yield f"{report.images} images are few: below {_FEW} a model mostly memorises them"
    if rare := [f"{name} ({count})" for name, count in report.classes.items() if count < 10]:
        yield f"classes of fewer than 10 images: {few(rare)}"
    if near := report.near_duplicates:
        yield (
            f"{sum(map(len, near))} images are {NEAR} ({len(near)} groups, the largest of {max(map(len, near))}); "
            f"a group is trained on or held out as a whole: {list_groups(near)}"
        )
        if clash := [names for names in near if len({labels[name] for name in names}) > 1]:
            yield f"{len(clash)} groups of near duplicates have different classes: {list_groups(clash)}"
    if missing := report.caption_facts.missing:
        yield f"{len(missing)} images have no caption: {few(missing)}"
    repeated = report.caption_facts.repeated.items()
    if common := {text: count for text, count in repeated if count > max(10, report.images / 20)}:
        yield f"captions that more than 5 % of the images share: {list_counts(common)}"
    if len(classes := report.classes) > 1:
        small, large = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
        if classes[large] >= _UNBALANCED * classes[small]:
            yield (
                f"classes are unbalanced: {large} has {classes[large]} images, {small} has {classes[small]}; "
                "`repeats` of a mix, or more images, even them out"
            )
    sized = {f"{name} ({info.width}x{info.height})": info.size for name, info in infos.items()}
    if extreme := [name for name, size in sized.items() if max(size) > _EXTREME * min(size)]:
        what = f"more than {_EXTREME} times as long as wide, and a square crop shows little of them"
        yield f"{len(extreme)} images are {what}: {few(extreme)}"
    if tiny := [name for name, size in sized.items() if min(size) < _TINY]:
        yield f"{len(tiny)} images have a side below {_TINY} pixels and are enlarged: {few(tiny)}"
    if report.misnamed:
        what = "files have another format than their names say, and are read all the same"
        yield f"{len(report.misnamed)} {what}: {list_reasons(report.misnamed)}"
    if report.animated:
        what = f"of {len(report.animated)} animated images only the first frame is used"
        yield f"{what}: {few(report.animated)}"
    yield from _profile_warnings(report.unusable_profiles)
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
            yield f"{len(names)} masks have {what} than their image and are resized to it: {few(names)}"
