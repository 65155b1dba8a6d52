"""Reading and writing the image files of programs: formats, names that overwrite nothing, grids."""

from __future__ import annotations

import errno
import logging
import math
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError, UserError, plural, printable, reason
from ..utils.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families import FlowModel


def enlarge(image: Image, scale: int) -> Image:
    """Return the image ``scale`` times as wide and high."""
    from PIL.Image import Resampling

    from ..utils.memory import memory_phase

    with memory_phase("draw"):
        return image.resize((image.width * scale, image.height * scale), Resampling.LANCZOS)


def image_grid(images: list[Image], columns: int) -> Image:
    """Return one image with all these, which have one size, row by row on white."""
    from PIL import Image

    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        corner = (i % columns * width, i // columns * height)
        grid.paste(image, corner, image if image.mode == "RGBA" else None)
    return grid


_TRANSPARENT = ("PNG", "WEBP", "TIFF", "AVIF")  # formats that keep the alpha channel exactly
log = logging.getLogger(__name__)


def check_format(output: str) -> None:
    """Refuse a file name whose ending is no image format.

    Raises:
        UserError: names the ending, and formats that can be written.
    """
    from PIL import Image

    suffix = Path(output).suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise UserError(f"-o {output}: no image format '{suffix}'", "Use .png, .jpg or .webp.")


def check_writable(output: str) -> None:
    """Refuse a path that cannot be written, before long work.

    Raises:
        UserError: no file can be created in its folder, or in the nearest one that exists; or its name is invalid.
    """
    path, fix = Path(output), "Give a file in a folder that you may write to."
    try:
        folder = next(folder for folder in path.parents if folder.exists())
        if not folder.is_dir():
            raise UserError(f"-o {output} cannot be written: {folder} is no folder", fix)
        if folder == path.parent:
            path.is_file()  # a name that is too long fails here
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"-o {output} cannot be written: {_why(error)}", fix) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of ``path`` once it is written; see `replacing`.

    Raises:
        RunError: it cannot be written.
    """
    path = path.resolve()  # the target of a link is replaced, not the link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.suffix) as partial:
            yield partial
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "Free some space, or give another -o" if full else "Give another -o"
        raise RunError(f"{path} cannot be written: {_why(error)}", f"{fix}.") from error


def _why(error: OSError) -> str:
    return error.strerror or reason(error)


def save_images(images: list[Image], output: str, overwrite: bool = False) -> None:
    """Write the images under free names, each whole or not at all, and print the names.

    Where the format has no transparency they are written on white.

    Raises:
        RunError: an image cannot be written; those before it are.
        UserError: the format does not take images of this size.
    """
    images = _as_format(images, output)
    for image, path in zip(images, free_paths(Path(output), len(images), overwrite), strict=True):
        with whole_file(path) as partial:
            try:
                image.save(partial)
            except (ValueError, struct.error, OverflowError) as error:  # what Pillow's encoders raise
                raise UserError(
                    f"{path}: an image of {image.width} x {image.height} cannot be written in this format: "
                    f"{reason(error)}",
                    "Use .png, or a smaller --scale.",
                ) from error
        print(path)


def _as_format(images: list[Image], output: str) -> list[Image]:
    """Return the images on white where the format has no alpha, with a warning if anything is transparent."""
    from PIL import Image

    suffix = Path(output).suffix.lower()
    if Image.registered_extensions().get(suffix) in _TRANSPARENT or all(i.mode != "RGBA" for i in images):
        return images
    from ..data.images import to_rgb

    if any(map(is_transparent, images)):
        print(
            f"{suffix} has no transparency: transparent parts become white; .png keeps them.", file=sys.stderr
        )
    return [to_rgb(image) for image in images]


def free_paths(output: Path, count: int, overwrite: bool = False) -> list[Path]:
    """Return free names for ``count`` images: the name itself for a single one, else numbered ones."""

    def numbered(i: int) -> Path:
        return output.with_stem(f"{output.stem}-{i}")

    if count == 1 and (overwrite or not output.exists()):
        return [output]
    first = 1
    while not overwrite and any(numbered(first + i).exists() for i in range(count)):
        first += 1
    if count == 1 or first > 1:
        print("Images of this name exist and are kept; --overwrite replaces them.", file=sys.stderr)
    return [numbered(first + i) for i in range(count)]


def read_image(path: str) -> Image:
    """Read an image, upright and in sRGB: RGB, or RGBA where it has transparency.

    Raises:
        UserError: the file is missing, no image, damaged, or too large.
    """
    from ..data.images import decode_image, profile_of, upright

    image = decode_image(path)
    profile, name = profile_of(image), printable(path)
    if profile is not None and profile.problem:
        log.warning("%s is read as sRGB: its colour profile cannot be used (%s)", name, profile.problem)
    elif profile is not None:
        log.warning("%s is converted to sRGB from its colour profile, %s", name, profile.name)
    return upright(image)


def read_opaque(path: str) -> Image:
    """Read an image as upright RGB, on white, with a warning if anything is transparent.

    Raises:
        UserError: see ``read_image``.
    """
    from ..data.images import to_rgb

    image = read_image(path)
    if is_transparent(image):
        log.warning(
            "%s has transparent parts: they become white, and all of the result is opaque", printable(path)
        )
    return to_rgb(image)


def control_files(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the kind ("" where none is named) and the file of each word, FILE or KIND=FILE; refuse what is no image.

    Raises:
        UserError: see ``read_image``.
    """
    found = []
    for word in words:
        kind, _, path = word.partition("=")
        named = kind in ("image", "labels") and bool(path)
        found.append((kind, path) if named else ("", word))
        read_image(found[-1][1])
    return found


def control_scales(text: str) -> float | dict[str, float]:
    """Return the scale of control images, a number, or that of each kind, such as image=2,labels=0.5.

    Raises:
        UserError: it is neither.
    """
    parts = {kind: value for kind, _, value in (part.rpartition("=") for part in text.split(","))}
    try:
        scales = {kind.strip(): float(value) for kind, value in parts.items()}
    except ValueError:
        scales = {}
    if not scales or len(parts) < text.count(",") + 1 or ("" in scales and len(scales) > 1):
        raise UserError(f"--control-scale {text}", "Give a number, or one for a kind: image=2,labels=0.5.")
    return scales.get("", scales)


def read_controls(files: Sequence[tuple[str, str]], model: FlowModel) -> list[Any]:
    """Read control images as a model takes them: label maps in their own mode, others upright on white.

    Args:
        files: kind, or "", and path of each.

    Returns:
        Images, or where kinds are named one dictionary of an image for each kind.

    Raises:
        UserError: see ``read_image``; some files name a kind and others do not, or two the same.
    """
    from ..data.images import decode_image

    kinds = [kind for kind, _ in files]
    if any(kinds) and ("" in kinds or len({*kinds}) < len(kinds)):
        raise UserError(
            f"--control: {plural(len(files), 'file')} of the kinds {', '.join(kind or 'none' for kind in kinds)}",
            "Name the kind of each, one file for a kind: --control image=sketch.png labels=layout.png",
        )
    own = model.control_kinds[0] if len(model.control_kinds) == 1 else ""
    images = [decode_image(path) if (kind or own) == "labels" else read_opaque(path) for kind, path in files]
    return [dict(zip(kinds, images, strict=True))] if any(kinds) else images


def is_transparent(image: Image) -> bool:
    """Return whether any pixel of an RGB or RGBA image is less than opaque."""
    return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255])


def read_mask_of(path: str, image: Image, threshold: float | None = None) -> Image:
    """Read a mask (mode "L", 255 = repaint) at the image's size.

    Args:
        threshold: brightness, from 0 to 1, from which an image's pixels are repainted; None: it must be a mask.

    Raises:
        UserError: see ``read_image``; or it is in colour and there is no threshold.
    """
    from ..data.images import decode_image
    from ..data.masks import read_mask

    mask = decode_image(path)
    mask.filename = path  # type: ignore[attr-defined]  # named in errors
    try:
        return read_mask(mask, image.size, threshold=threshold)
    except UserError as error:
        if threshold is None and "threshold" in error.fix:
            raise UserError(
                error.what, f"{error.fix}\nThe threshold is --mask-threshold, such as 0.5."
            ) from None
        raise


def box_mask(image: Image, box: tuple[int, int, int, int]) -> Image:
    """Return a mask of the image's size that is white in the box.

    Raises:
        UserError: the box is empty or not within the image.
    """
    from PIL import Image

    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UserError(
            f"--box {left} {top} {right} {bottom} is no rectangle in an image of {image.width} x {image.height} pixels",
            "Give LEFT TOP RIGHT BOTTOM, the last two larger than the first two.",
        )
    mask = Image.new("L", image.size)
    mask.paste(255, box)
    return mask
