"""WebDataset shards: tar files whose members of one name, up to its first dot, are one sample."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError, few, one_line, plural, shown
from ...utils.files import decode, parse_json
from ...utils.names import composed
from ..dataset import FileExample, Source
from .annotations import DataRequest, RowAnnotation, annotated_example, parse_row, source_of_rows
from .files import (
    CAPTION_BYTES,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Container,
    Member,
    common_folder,
    intact,
    many_paths,
    read_bytes,
    refuse_large,
)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CAPTIONS = tuple(suffix[1:] for suffix in CAPTION_SUFFIXES)
# What `tarfile` raises: it checks headers, but little of the extended ones.
_FAILURES = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, LookupError)
_TAIL = 1 << 20  # bytes looked at behind the end; writers pad with zeros to 10 KiB or so


@dataclass(frozen=True, slots=True)
class TarMember(Member):
    """A member of an uncompressed tar file, by its place in it."""

    tar: Container
    name: str
    offset: int
    size: int

    def _read(self, bound: int) -> bytes:
        refuse_large(str(self), self.size, bound)
        with self.tar.open() as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.tar.path}: {self.name}"


@dataclass(slots=True)
class _Sample:
    """The members of one sample; those with annotations by their ending.

    Attributes:
        key: their name up to the first dot, with its folder.
        others: images under longer endings, such as ``seg.png``, by them.
    """

    key: str
    image: TarMember | None = None
    mask: TarMember | None = None
    annotations: dict[str, TarMember] = field(default_factory=dict)
    others: dict[str, TarMember] = field(default_factory=dict)


def read_shards(data: str, request: DataRequest) -> Source:
    """Return the samples of all shards, named ``shard/key``.

    Only the headers and the short texts are read; images are read from their place when they are needed.

    Raises:
        UserError: a tar file is broken, compressed or missing; a sample has two images or two captions that differ,
            or a text that cannot be read; names hold further dots; captions or classes are missing.
    """
    if request.columns:
        raise UserError("tar files have no columns", "Leave --columns out.")
    request.refuse_control("tar files")
    folder = Path(data).expanduser()
    paths = sorted(folder.glob("*.tar")) if folder.is_dir() else many_paths(data)
    root, unread = common_folder(paths), dict[str, list[str]]()
    examples: list[FileExample] = []
    empty: list[str] = []
    lost, beside = dict[str, list[TarMember]](), set[str]()
    for path in paths:
        prefix = path.absolute().relative_to(root).with_suffix("").as_posix()
        for sample in _samples(path, unread):
            name = f"{prefix}/{sample.key}"
            if sample.image is None:
                empty.append(name)
                for ending, member in sample.others.items():
                    lost.setdefault(ending, []).append(member)
            else:
                beside |= sample.others.keys()
                annotation = _annotation(name, sample.annotations)
                examples.append(annotated_example(name, sample.image, sample.mask, annotation))
    if dotted := [member for ending, members in lost.items() if ending not in beside for member in members]:
        raise _dotted_names(data, dotted)
    if not examples:
        raise UserError(f"there are no images in {data}", f"Images end in {', '.join(IMAGE_SUFFIXES)}.")
    notes = [f"{plural(len(examples), 'sample')} in {plural(len(paths), 'tar file')}, read in place"]
    if empty:
        notes.append(f"{plural(len(empty), 'sample')} without an image, left out: {few(empty)}")
    if unread:
        endings = [f".{one_line(ending)} ({len(names)}): {few(names, 2)}" for ending, names in unread.items()]
        more = f"; and {len(endings) - 5} more endings" if len(endings) > 5 else ""
        notes.append(f"members not read: {'; '.join(endings[:5])}{more}")
        described = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES)
        if any("." in ending and _last_suffix(ending) in described for ending in unread):
            notes[-1] += "; the name of a sample ends at the first dot"
    lacks = "a .txt, .json or .cls member for each image"
    return source_of_rows(data, examples, request, lacks, notes, folder if folder.is_dir() else None)


def _dotted_names(data: str, members: list[TarMember]) -> UserError:
    """Return the error for images that are not read, since their names hold dots before the one of the ending."""
    folder, slash, name = members[0].name.rpartition("/")
    key, _, ending = name.partition(".")
    better = f"{name.rpartition('.')[0].replace('.', '_')}{_last_suffix(name)}"
    return UserError(
        f"{plural(len(members), 'image')} in {data} cannot be read: in WebDataset shards the name of a sample ends at "
        f"the first dot, so {folder}{slash}{name} is '{ending}' of a sample '{key}', not an image",
        f"Name images and captions without further dots, such as {better}, and write the shards again.",
    )


def _samples(path: Path, unread: dict[str, list[str]]) -> Iterable[_Sample]:
    """Return the samples of one shard in its order; add the names of other members to ``unread``, by their ending."""
    samples: dict[str, _Sample] = {}
    for member in _members(path, unread):
        folder, slash, name = member.name.removeprefix("./").lstrip("/").rpartition("/")
        if name.startswith(".") or "__MACOSX" in folder:
            continue
        stem, _, ending = name.partition(".")
        ending = ending.lower()
        key = folder + slash + stem
        sample = samples.get(composed(key), _Sample(key))
        if ending == "mask" or (ending.startswith("mask.") and ending[4:] in IMAGE_SUFFIXES):
            sample.mask = _only(sample.mask, member)
        elif f".{ending}" in IMAGE_SUFFIXES:
            sample.image = _only(sample.image, member)
        elif _is_caption(ending) or ending in ("cls", "json"):
            sample.annotations[ending] = _only(sample.annotations.get(ending), member)
        else:
            unread.setdefault(ending, []).append(member.name)
            if _last_suffix(ending) not in IMAGE_SUFFIXES:
                continue
            sample.others[ending] = member
        samples[composed(key)] = sample
    return samples.values()


def _last_suffix(ending: str) -> str:
    return f".{ending.rpartition('.')[2]}"


def _is_caption(ending: str) -> bool:
    """Return whether a member holds a caption: ``txt``, ``caption``, or one of them after an image's ending."""
    first, _, last = ending.partition(".")
    return ending in _CAPTIONS or (last in _CAPTIONS and f".{first}" in IMAGE_SUFFIXES)


def _only(first: TarMember | None, member: TarMember) -> TarMember:
    if first is not None:
        raise UserError(
            f"{member.tar.path} holds two members of one sample that mean the same: {first.name}, {member.name}",
            "Members whose names agree up to the first dot are one sample: rename them.",
        )
    return member


def _members(path: Path, unread: dict[str, list[str]]) -> Iterator[TarMember]:
    """Yield the regular files of a tar file; add its links, which hold nothing themselves, to ``unread``.

    Raises:
        UserError: it is compressed, broken or cut off.
    """
    if path.name.lower().endswith(COMPRESSED):
        raise UserError(
            f"{path} is compressed: no member can be read without all before it",
            "Unpack the compression only (`gunzip` and the like): images are compressed already.",
        )
    container = Container.of(path)
    with intact(path, "tar", *_FAILURES):
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    with tar:
        while True:
            with intact(path, "tar", *_FAILURES):
                info = tar.next()
            if info is None:
                break
            if info.isreg() and not info.issparse():
                yield TarMember(container, info.name, info.offset_data, info.size)
            elif not info.isdir():
                kind = info.name.rpartition(".")[2] + ", a link" * (info.issym() or info.islnk())
                unread.setdefault(kind, []).append(info.name)
            tar.members.clear()  # type: ignore[attr-defined]  # else it remembers them all
        end = tar.offset
    with path.open("rb") as file, intact(path, "tar", tarfile.ReadError):
        file.seek(end)
        if any(file.read(_TAIL)):  # tarfile stops silently at a header that it cannot read
            raise tarfile.ReadError(f"neither a member nor the end at byte {end}")


def _annotation(name: str, members: dict[str, TarMember]) -> RowAnnotation:
    """Return the annotation in the .json, caption and .cls members of a sample.

    Raises:
        UserError: one cannot be read, or they contradict each other.
    """
    texts = {
        ending: decode(read_bytes(member, CAPTION_BYTES), str(member)).strip()
        for ending, member in members.items()
    }
    row = RowAnnotation()
    if "json" in texts:
        row = parse_row(_json_object(texts["json"], str(members["json"])), str(members["json"]))
    captions = {ending: " ".join(text.split()) for ending, text in texts.items() if _is_caption(ending)}
    first = next(filter(None, captions.values()), "")
    known = {composed(" ".join(text.split())) for text in row.texts} or {composed(first)}
    for ending, caption in captions.items():
        if caption and composed(caption) not in known:
            raise _contradiction(name, ending, caption, "json" if row.texts else next(iter(captions)))
    # A number in .cls and a name in .json are one class said in two ways: the name is the better label.
    label = texts.get("cls")
    if (
        label
        and row.label
        and composed(label) != composed(row.label)
        and label.isdecimal() == row.label.isdecimal()
    ):
        raise _contradiction(name, "cls", label, "json")
    return dataclasses.replace(
        row, texts=row.texts or ((first,) if first else ()), label=row.label or label or None
    )


def _json_object(text: str, where: str) -> dict[str, object]:
    """Parse a .json member; ``caption``, which downloaders write, counts as ``text``."""
    row = parse_json(text, where, "Write the shard again.")
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object", 'Write {"text": ..., "label": ...}.')
    return row if "text" in row or "caption" not in row else {**row, "text": row["caption"]}


def _contradiction(name: str, ending: str, value: str, other: str) -> UserError:
    return UserError(
        f"the members of {name} contradict each other: .{ending} says {shown(value)}, .{other} something else",
        "Write the shard again with one of the two.",
    )
