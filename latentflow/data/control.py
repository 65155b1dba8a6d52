"""Control images: a second image per example, of the same size, that leads what is drawn; their checks, and their rows
in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import Control
from ..errors import UserError, few, one_line, plural
from ..utils.progress import progress_bar
from .cache.tensors import LazyTable, Resolution, Transform, batches, index_images, map_threaded, size_of
from .checking.inspect_images import inspect_images
from .dataset import Example, Source, hash_text, read_image
from .labels import NO_LABEL, Labels, numbered, palette_of, read_label_ids, to_label_image
from .sources.beside import CONTROL_ENDING, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cache.store import Tables

_FIX = "`latentflow check DATA --control {}` lists all."


@dataclass(frozen=True)
class ControlReport:
    """The findings on all control images of a source.

    Attributes:
        problems: what would break a run, a line each.
        labels: of label maps.
    """

    problems: tuple[str, ...] = ()
    labels: Labels = ()


@dataclass(frozen=True)
class _ControlInfo:
    """The properties of one control image."""

    size: tuple[int, int]
    palette: tuple[str, ...] = ()
    most: int = -1  # its largest label


def inspect_controls(source: Source, labels: Labels = (), *, progress: bool = True) -> ControlReport:
    """Open every control image of a source, and report those that are missing, of another size than their image or
    cannot be read; of label maps also labels beyond the table, and palettes that differ.

    Args:
        labels: the table of label maps; empty: the source's own, else it is made from them.
    """
    reports = [_inspect_kind(source, kind, labels or source.labels, progress) for kind in source.control]
    problems = tuple(problem for report in reports for problem in report.problems)
    return ControlReport(problems, next((report.labels for report in reports if report.labels), ()))


def _inspect_kind(source: Source, kind: Control, labels: Labels, progress: bool) -> ControlReport:
    examples, problems = source.examples, list[str]()
    word = "control image" if len(source.control) == 1 else f"control image of kind {kind}"
    if without := [example.name for example in examples if kind not in example.control_kinds]:
        own = "" if len(source.control) == 1 else f" ({stem_of(without[0])}{CONTROL_ENDING}-{kind}.png, ...)"
        problems.append(
            f"{plural(len(without), 'image')} of {len(examples)} without a {word}{own}: {few(without)}"
        )
    given = [example for example in examples if kind in example.control_kinds]
    infos_by_name: dict[str, _ControlInfo] = {}
    unreadable, sized = [], []
    infos = zip(examples, inspect_images(source, progress=False), strict=True)  # which are known by now
    sizes = [info.size for example, info in infos if kind in example.control_kinds]
    found = map_threaded(partial(_inspect, kind=kind, labels=labels), given)
    bar = progress_bar(
        zip(given, sizes, found, strict=True),
        total=len(given),
        desc="checking control images",
        hidden=not progress,
    )
    for example, (width, height), info in bar:
        if isinstance(info, str):
            unreadable.append(one_line(info))
        elif info.size != (width, height):
            own = f"{info.size[0]}x{info.size[1]}"
            sized.append(f"{example.name} ({width}x{height}, its control image {own})")
        else:
            infos_by_name[example.name] = info
    if sized:
        problems.append(f"{plural(len(sized), word)} of another size than the image: {few(sized)}")
    if unreadable:
        problems.append(f"{plural(len(unreadable), word)} cannot be used: {few(unreadable)}")
    if kind != "labels":
        return ControlReport(tuple(problems))
    table, differing = _table(infos_by_name, labels)
    return ControlReport((*problems, *differing), table)


def _inspect(example: Example, kind: Control, labels: Labels) -> _ControlInfo | str:
    """Return the properties of an example's control image, or why it cannot be used."""
    try:
        control = example.open_control(kind)
        assert control is not None
        if kind != "labels":
            return _ControlInfo(control.size)
        ids = read_label_ids(control, labels).astype(np.int64)
        return _ControlInfo(control.size, palette_of(control), int(ids[ids != NO_LABEL].max(initial=-1)))
    except UserError as error:
        return error.what


def _table(infos_by_name: dict[str, _ControlInfo], labels: Labels) -> tuple[Labels, list[str]]:
    """Return the table of label maps, and a line where their palettes differ from it or from one another."""
    most = max((info.most for info in infos_by_name.values()), default=-1)
    colours = [colour for _, colour in labels]
    first = "the labels"
    differing = []
    for name, info in infos_by_name.items():
        palette = info.palette[: len(labels) or most + 1]
        if not palette:
            continue
        if not labels and len(palette) > len(colours):
            if colours != [*palette[: len(colours)]]:
                differing.append(name)
                continue
            colours, first = [*palette], name
        elif any(own and own != other for own, other in zip(colours, palette, strict=False)):
            differing.append(name)
    lines = []
    if differing:
        what = plural(len(differing), "label map")
        lines.append(f"{what} with another palette than {first}: {few(differing)}")
    return labels or numbered(most + 1, colours), lines


def with_control_checked(source: Source, labels: Labels = ()) -> Source:
    """Return the source with the table of its label maps, all of whose control images can be trained on.

    Args:
        labels: the table; empty: it is made from the label maps.

    Raises:
        UserError: control images are missing or cannot be used; the error counts them and gives the first names.
    """
    report = inspect_controls(source, labels)
    if report.problems:
        raise UserError("; ".join(report.problems), _FIX.format(" ".join(source.control)))
    if "labels" in source.control and not report.labels:
        raise UserError(f"the label maps of {source.name} hold no label", "Every pixel of them is 255.")
    return dataclasses.replace(source, labels=report.labels)


# ---------------------------------------------------------------- control images as rows of the cache


@dataclass(frozen=True)
class ControlImage(Example):
    """The control image of an example, of kind "image", as an image that is cut like it."""

    whole: Example = field(kw_only=True)

    @property
    def centering(self) -> tuple[float, float]:
        return self.whole.centering

    def open(self) -> Image.Image:
        control = self.whole.open_control("image")
        assert control is not None
        return control

    def content_key(self) -> str:
        return hash_text(f"control {self.whole.control_key('image')} at {self.centering}")


def control_images(source: Source) -> Source:
    """Return a source of the control images of ``source``, those of kind "image", in its order."""
    examples: Any = _Controls(source.examples)
    return dataclasses.replace(source, examples=examples)


@dataclass(frozen=True)
class _Controls(Sequence[Example]):
    """The control images of examples; each is made when it is asked for, as there may be many millions."""

    wholes: Sequence[Example]

    def __len__(self) -> int:
        return len(self.wholes)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        return ControlImage(self.wholes[place].name, whole=self.wholes[place])


def cut_control(example: Example, size: tuple[int, int], kind: Control, labels: Labels = ()) -> Image.Image:
    """Return an example's control image cut and resized to (height, width) as its image is.

    Raises:
        UserError: it cannot be read.
    """
    if kind == "labels":
        return to_label_image(_layout(example, size, labels)[0].numpy(), labels)
    return read_image(ControlImage(example.name, whole=example), size)


def cached_layouts(source: Source, resolution: Resolution) -> LazyTable:
    """Return the label map of every image, registered with its pixels: (N, 1, H, W) uint8, 255 = no label.

    Raises:
        UserError: a label map cannot be read, or the cache would lie inside the data.
    """
    layouts = index_images(source, layout_transform(size_of(resolution), source.labels)).table("layouts")
    assert layouts is not None
    return layouts


def layout_transform(size: tuple[int, int], labels: Labels) -> Transform[Example]:
    """Return the transform of images to their label maps, ``layouts`` (1, H, W) uint8."""

    def encode(examples: list[Example]) -> Iterator[Tables]:
        for batch in batches(map_threaded(partial(_layout, size=size, labels=labels), examples), 64):
            yield {"layouts": torch.stack(batch)}

    settings: dict[str, object] = {
        "size": list(size), "resize": "fit-nearest", "labels": [list(label) for label in labels]
    }  # fmt: skip
    row_bytes = size[0] * size[1]
    return Transform("layouts", settings, row_bytes, Example.layout_key, encode, "reading label maps")


def _layout(example: Example, size: tuple[int, int], labels: Labels) -> Tensor:
    control = example.open_control("labels", size[::-1])
    assert control is not None
    ids = Image.fromarray(read_label_ids(control, labels))
    fitted = ImageOps.fit(ids, size[::-1], method=Image.Resampling.NEAREST, centering=example.centering)
    return torch.from_numpy(np.array(fitted))[None]
