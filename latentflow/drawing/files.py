"""Picture files: formats, and names that overwrite nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .pictures import is_transparent

if TYPE_CHECKING:
    from PIL.Image import Image


_TRANSPARENT = ("PNG", "WEBP", "TIFF", "AVIF")  # formats that keep every alpha


def check_format(output: str) -> None:
    """Refuse a file name whose ending is no picture format.

    Raises:
        UserError: names the ending and formats that will do.
    """
    from PIL import Image

    suffix = Path(output).suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise UserError(f"-o {output}: no picture format '{suffix}'", "Use .png, .jpg or .webp.")


def save(pictures: list[Image], output: str, overwrite: bool = False) -> None:
    """Write the pictures under free names, and print the names; on white where the format has no transparency."""
    pictures = _as_format(pictures, output)
    for picture, path in zip(pictures, free_paths(Path(output), len(pictures), overwrite), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        print(path)


def _as_format(pictures: list[Image], output: str) -> list[Image]:
    """Return the pictures without alpha where the format would lose it, which is said if anything is transparent."""
    from PIL import Image

    from ..data.read import to_rgb

    suffix = Path(output).suffix.lower()
    if Image.registered_extensions().get(suffix) in _TRANSPARENT or not any(
        one.mode == "RGBA" for one in pictures
    ):
        return pictures
    if any(map(is_transparent, pictures)):
        print(
            f"{suffix} has no transparency: what is transparent lies on white; .png keeps it.",
            file=sys.stderr,
        )
    return [to_rgb(one) for one in pictures]


def free_paths(output: Path, count: int, overwrite: bool = False) -> list[Path]:
    """Where ``count`` pictures go: the name itself for a single one, else numbered; free names only."""

    def numbered(i: int) -> Path:
        return output.with_stem(f"{output.stem}-{i}")

    if count == 1 and (overwrite or not output.exists()):
        return [output]
    first = 1
    while not overwrite and any(numbered(first + i).exists() for i in range(count)):
        first += 1
    if count == 1 or first > 1:
        print("Pictures of this name exist and are kept; --overwrite replaces them.", file=sys.stderr)
    return [numbered(first + i) for i in range(count)]
