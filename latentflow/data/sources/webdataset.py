"""WebDataset shards: tar files whose members of one name, up to its first dot, are one sample."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError, few, one_line, reason, shown
from ...utils.files import decode, parse_json
from ..dataset import FileExample, Source
from .annotations import Said, said
from .assemble import Wanted, decide, fields_of, masked, source_of
from .files import CAPTIONS, SUFFIXES
from .members import CAPTION_BYTES, Container, Member, read_bytes, refuse_large
from .paths import common_folder, many_paths

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CAPTIONS = tuple(ending[1:] for ending in CAPTIONS)
_TELLING = (*_CAPTIONS, "cls", "json")
# tarfile checks headers, and little of the extended ones.
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
    """The members of one sample."""

    image: TarMember | None = None
    mask: TarMember | None = None
    told: dict[str, TarMember] = field(default_factory=dict)  # by what follows the first dot


def is_shards(data: str) -> bool:
    """Whether DATA names tar files, or is a folder of them without images or subfolders."""
    path = Path(data).expanduser()
    if path.is_dir():
        entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return any(path.glob("*.tar")) and not any(
            e.is_dir() or e.suffix.lower() in SUFFIXES for e in entries
        )
    return data.lower().endswith((".tar", *_COMPRESSED))


def read_shards(data: str, wanted: Wanted) -> Source:
    """The samples of all shards; their names are ``shard/key``.

    Only the headers and the short texts are read; images are read from their place when they are needed.

    Raises:
        UserError: a tar file is broken, compressed or not there; a sample has two images or two captions that
            differ, or a text that cannot be read; captions or classes are missing.
    """
    if wanted.columns:
        raise UserError("tar files have no columns", "Leave --columns out.")
    folder = Path(data).expanduser()
    paths = sorted(folder.glob("*.tar")) if folder.is_dir() else many_paths(data)
    root, unread = common_folder(paths), dict[str, list[str]]()
    examples: list[FileExample] = []
    empty: list[str] = []
    for path in paths:
        prefix = path.absolute().relative_to(root).with_suffix("").as_posix()
        for key, sample in _samples(path, unread).items():
            name = f"{prefix}/{key}"
            if sample.image is None:
                empty.append(name)
                continue
            fields = fields_of(_said(name, sample))
            examples.append(FileExample(name, path=sample.image, mask=sample.mask, **fields))
    if not examples:
        raise UserError(f"there are no images in {data}", f"Images end in {', '.join(SUFFIXES)}.")
    kind, notes = decide(examples, wanted.condition, data, "a .txt, .json or .cls member for each image")
    notes.insert(0, f"{len(examples)} samples in {len(paths)} tar files, read in place")
    if empty:
        notes.append(f"{len(empty)} samples have no image and are left out: {few(empty)}")
    if unread:
        endings = [f".{one_line(ending)} ({len(names)}): {few(names, 2)}" for ending, names in unread.items()]
        more = f"; and {len(endings) - 5} more endings" if len(endings) > 5 else ""
        notes.append(f"members not read: {'; '.join(endings[:5])}{more}")
    examples, told = masked(examples, wanted.masks)
    return source_of(data, examples, kind, wanted, [*notes, *told], folder if folder.is_dir() else None)


def _samples(path: Path, unread: dict[str, list[str]]) -> dict[str, _Sample]:
    """The samples of one shard in its order; ``unread`` gets the names of other members, by their ending."""
    samples: dict[str, _Sample] = {}
    for member in _members(path, unread):
        folder, slash, name = member.name.removeprefix("./").lstrip("/").rpartition("/")
        if name.startswith(".") or "__MACOSX" in folder:
            continue
        stem, _, ending = name.partition(".")
        ending = ending.lower()
        is_mask = ending == "mask" or (ending.startswith("mask.") and ending[4:] in SUFFIXES)
        if not (is_mask or f".{ending}" in SUFFIXES or _meaning(ending) in _TELLING):
            unread.setdefault(ending, []).append(member.name)
            continue
        sample = samples.setdefault(folder + slash + stem, _Sample())
        if is_mask:
            sample.mask = _only(sample.mask, member)
        elif _meaning(ending) in _TELLING:
            sample.told[ending] = _only(sample.told.get(ending), member)
        else:
            sample.image = _only(sample.image, member)
    return samples


def _meaning(ending: str) -> str:
    """Return what an ending says: of ``png.txt`` and ``png.caption``, a caption as without the suffix of the image."""
    first, _, last = ending.partition(".")
    return last if last in _CAPTIONS and f".{first}" in SUFFIXES else ending


def _members(path: Path, unread: dict[str, list[str]]) -> Iterator[TarMember]:
    """The regular files of a tar file; ``unread`` gets its links, which hold nothing themselves.

    Raises:
        UserError: it is compressed, broken or cut off.
    """
    if path.name.lower().endswith(_COMPRESSED):
        raise UserError(
            f"{path} is compressed: no member can be read without all before it",
            "Unpack the compression only (`gunzip` and the like): images are compressed already.",
        )
    container = Container.of(path)
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    except _FAILURES as error:
        raise _broken(path, reason(error)) from None
    with tar:
        while (info := _next(path, tar)) is not None:
            if info.isreg() and not info.issparse():
                yield TarMember(container, info.name, info.offset_data, info.size)
            elif not info.isdir():
                kind = info.name.rpartition(".")[2] + ", a link" * (info.issym() or info.islnk())
                unread.setdefault(kind, []).append(info.name)
            tar.members.clear()  # type: ignore[attr-defined]  # else it remembers them all
        end = tar.offset
    with path.open("rb") as file:  # tarfile stops without a word at a header that it cannot read
        file.seek(end)
        if any(file.read(_TAIL)):
            raise _broken(path, f"neither a member nor the end at byte {end}")


def _next(path: Path, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member; None at the end.

    Raises:
        UserError: the file is broken or cut off.
    """
    try:
        return tar.next()
    except _FAILURES as error:
        raise _broken(path, reason(error)) from None


def _said(name: str, sample: _Sample) -> Said:
    """Return what the text members say: .json, .txt, .caption and .cls, which must not contradict each other."""
    told = {
        ending: decode(read_bytes(member, CAPTION_BYTES), str(member)).strip()
        for ending, member in sample.told.items()
    }
    row = Said()
    if "json" in told:
        member = sample.told["json"]
        row = said(_object(told["json"], member), str(member))
    label = told.get("cls")
    written = {ending: " ".join(one.split()) for ending, one in told.items() if _meaning(ending) in _CAPTIONS}
    text = next((one for one in written.values() if one), "")
    held = {" ".join(one.split()) for one in row.texts} or {text}
    for ending, one in written.items():
        if one and one not in held:
            raise _contradiction(name, ending, one, "json" if row.texts else next(iter(written)))
    # A number in .cls and a name in .json are one class said in two ways: the name is the better label.
    if label and row.label and label != row.label and label.isdecimal() == row.label.isdecimal():
        raise _contradiction(name, "cls", label, "json")
    return dataclasses.replace(
        row, texts=row.texts or ((text,) if text else ()), label=row.label or label or None
    )


def _object(text: str, member: TarMember) -> dict[str, object]:
    """A .json member; ``caption``, as downloaders call it, counts as ``text``."""
    row = parse_json(text, str(member), "Write the shard again.")
    if not isinstance(row, dict):
        raise UserError(f"{member} is not an object", 'Write {"text": ..., "label": ...}.')
    return row if "text" in row or "caption" not in row else {**row, "text": row["caption"]}


def _only(first: TarMember | None, member: TarMember) -> TarMember:
    if first is not None:
        raise UserError(
            f"{member.tar.path} holds two members of one sample that mean the same: {first.name}, {member.name}",
            "Members whose names agree up to the first dot are one sample: rename them.",
        )
    return member


def _contradiction(name: str, ending: str, value: str, other: str) -> UserError:
    return UserError(
        f"the members of {name} contradict each other: .{ending} says {shown(value)}, .{other} something else",
        "Write the shard again with one of the two.",
    )


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no intact tar file: {why}", "It may be cut off: copy or download it again.")
