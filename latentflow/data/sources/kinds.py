"""The kinds of data that DATA on the command line can be: one line each in ``KINDS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from ...errors import UserError, lookup, nearest
from ..captions import with_tag_orders
from ..dataset import Colours, Source
from .assemble import Condition, DataRequest, Masks, MissingCaption
from .files import list_folder
from .folder import folder_source
from .hugging_face import is_hub, is_saved, read_hub, read_saved
from .latent_folder import is_latent_folder, read_latent_folder
from .mix import is_mix, read_mix
from .table import is_table, read_table
from .webdataset import is_shards, read_shards
from .zip_file import is_zip, read_zip

__all__ = ["KINDS", "Condition", "DataKind", "Masks", "MissingCaption", "find_source"]


@dataclass(frozen=True)
class DataKind:
    """A kind of data: its description, the test whether DATA is of it, and its reader."""

    meaning: str
    claims: Callable[[str], bool]
    read: Callable[[str, DataRequest], Source]


def find_source(
    data: str,
    *,
    condition: Condition = "auto",
    missing_caption: MissingCaption = "error",
    masks: Masks = "auto",
    columns: Mapping[str, str] | None = None,
    shuffle_tags: int = 0,
    keep_tags: int = 0,
    colours: Colours = "srgb",
) -> Source:
    """Find the images of ``data``, which is of one of ``KINDS``, with their annotations (docs/data.md).

    Args:
        data: as on the command line.
        condition: "auto" takes captions, else classes, else nothing; in a folder the first of ``metadata.jsonl`` or
            ``metadata.csv`` (file_name, text, label), texts beside the images (``cat.txt``), subfolders as classes,
            nothing. Any other value is obeyed.
        missing_caption: "error", "empty" (the empty caption) or "skip", for images without a caption.
        masks: "auto" takes the user's own masks (``mask`` columns and members; ``cat-mask.png`` beside ``cat.png``);
            "alpha" takes the alpha channel of every image (transparent is to be repainted; the image is then what its
            file holds beneath); "none" takes none. Files of masks are never images of the set.
        columns: our names (image, file_name, text, label, mask, weight) to those of a table's columns.
        shuffle_tags: the number of orders that each caption's tags are trained in; 0: as written.
        keep_tags: the number of tags that stay in front.
        colours: "srgb" converts by colour profiles, "stored" takes the numbers of all images as they are.

    Raises:
        UserError: the data are missing, empty, broken or of the wrong level; metadata cannot be understood or
            contradict texts beside the images; captions or classes are missing; an image has two different masks.
    """
    for name, choices, value in (
        ("condition", Condition, condition),
        ("missing-caption", MissingCaption, missing_caption),
        ("masks", Masks, masks),
        ("colours", Colours, colours),
    ):
        lookup(dict.fromkeys(get_args(choices)), value, name)
    request = DataRequest(
        condition=condition,
        missing_caption=missing_caption,
        masks=masks,
        columns=dict(columns or {}),
        colours=colours,
    )
    return with_tag_orders(_find(data, request), shuffle_tags, keep_tags)


def _find(data: str, request: DataRequest) -> Source:
    try:
        for kind in KINDS.values():
            if kind.claims(data):
                return kind.read(data, request)
        raise _not_found(data)
    except OSError as error:
        raise UserError(
            f"{data} cannot be read: {(error.strerror or str(error)).lower()} ({error.filename or data})",
            "Give yourself permission to read it, or give other data.",
        ) from error


def _read_folder(data: str, request: DataRequest) -> Source:
    return folder_source(data, list_folder(Path(data).expanduser()), request)


def _read_shapes(data: str, request: DataRequest) -> Source:
    from .shapes import train_source

    if request.masks == "alpha":
        raise UserError("the images of 'shapes' have no alpha channel", "Leave --masks alpha out.")
    if request.columns:
        raise UserError("'shapes' has no columns", "Leave --columns out.")
    if Path("shapes").is_dir():
        raise UserError(
            "'shapes' is both the procedural set and a folder here",
            "Write ./shapes for the folder, or run from another directory for the procedural set.",
        )
    return train_source(request.condition)


def _not_found(data: str) -> UserError:
    path = Path(data).expanduser()
    if path.exists():
        known = "; ".join(kind.meaning for kind in KINDS.values())
        return UserError(
            f"{data} is a file, not a folder of images, nor any other data that is read",
            f"Give the folder: {path.parent}. DATA may be: {known}.",
        )
    near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    hint = f"Did you mean {path.parent / near}?" if near else "Check the path (`shapes` needs no folder)."
    return UserError(f"there is no folder {data}", hint)


# The first that claims DATA reads it.
KINDS: dict[str, DataKind] = {
    "shapes": DataKind("the procedural set `shapes`", lambda data: data == "shapes", _read_shapes),
    "hub": DataKind("hub:owner/name, a data set of the Hugging Face hub", is_hub, read_hub),
    "mix": DataKind("a .yaml file that lists several of these", is_mix, partial(read_mix, find=_find)),
    "shards": DataKind("WebDataset shards (.tar)", is_shards, read_shards),
    "zip": DataKind("a .zip of a folder", is_zip, read_zip),
    "saved": DataKind("a folder that `datasets` saved", is_saved, read_saved),
    "table": DataKind("a .csv or .parquet table", is_table, read_table),
    "latents": DataKind("a folder of `latentflow precompute`", is_latent_folder, read_latent_folder),
    "folder": DataKind("a folder of images", lambda data: Path(data).expanduser().is_dir(), _read_folder),
}
