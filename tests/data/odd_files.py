"""Broken and odd files, made on the spot: what each is, and what is to become of it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .images import STORED, png_header, turned_by_exif

RED, GREEN, BLUE, WHITE = (220, 30, 40), (30, 200, 60), (40, 60, 210), (255, 255, 255)
SIDE = 64


def quarters() -> Image.Image:
    """Red, green, blue and white: turned or mirrored in any way, it is another image."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    pixels[:half, :half], pixels[:half, half:] = RED, GREEN
    pixels[half:, :half], pixels[half:, half:] = BLUE, WHITE
    return Image.fromarray(pixels)


def grey_quarters() -> Image.Image:
    return quarters().convert("L")


def make_used(root: Path) -> dict[str, str]:
    """Files that hold the four quarters in some odd way; name -> "colour" or "grey"."""
    image, grey = quarters(), grey_quarters()
    levels = np.asarray(grey)
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[SIDE // 2 :, SIDE // 2 :] = 0  # white is what transparent images are put on
    clear = Image.fromarray(np.dstack([np.asarray(image) * (alpha[..., None] > 0), alpha]))
    image.convert("CMYK").save(root / "cmyk.tif")
    image.convert("CMYK").save(root / "cmyk.jpg", quality=100, subsampling=0)
    Image.fromarray(levels.astype(np.uint16) * 257).save(root / "16-bit.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(root / "16-bit.tif")
    Image.fromarray(levels.astype(np.float32) / 255).save(root / "float.tif")
    Image.fromarray(levels.astype(np.int32)).save(root / "32-bit.tif")
    clear.save(root / "rgba.png")
    _palette_with_alpha(root / "palette-alpha.png")
    clear.convert("LA").save(root / "la.png")
    clear.save(root / "rgba.webp", lossless=True)
    image.quantize(8).save(root / "palette.png")
    grey.save(root / "grey.jpg", quality=100)
    image.save(root / "progressive.jpg", quality=100, subsampling=0, progressive=True)
    for name in ("animated.gif", "animated.png", "animated.webp"):
        other = Image.new("RGB", (SIDE, SIDE), (9, 9, 9))
        image.save(root / name, save_all=True, append_images=[other], duration=50, lossless=True)
    image.save(root / "pages.tif", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    _as(image, "GIF", root / "gif-named.jpg")
    _as(image, "PNG", root / "png-named.webp")
    image.save(root / "UPPER.PNG")
    for orientation in STORED:
        turned, exif = turned_by_exif(np.asarray(image), orientation)
        turned.save(root / f"exif-{orientation}.jpg", quality=100, subsampling=0, exif=exif)
        turned.save(root / f"exif-{orientation}.tif", exif=exif)
    for name in (
        "ünïcödé 猫🐈.png",
        "new\nline.png",
        "tab\tand\x1b[31mred.png",
        " space .png",
        "-dash.png",
        "a'b\"c.png",
    ):
        image.save(root / name)
    image.save(root / os.fsdecode(b"latin-\xe9.png"))
    (root / "link.png").symlink_to("UPPER.PNG")
    grey_names = ("16-bit.png", "16-bit.tif", "float.tif", "32-bit.tif", "la.png", "grey.jpg")
    return {path.name: "grey" if path.name in grey_names else "colour" for path in root.iterdir()}


def make_reported(root: Path) -> dict[str, str]:
    """Files that cannot be used; name -> a part of the reason that is reported."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    for format, suffix in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("GIF", "gif"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
    ):
        held = io.BytesIO()
        noise.save(held, format)
        (root / f"truncated.{suffix}").write_bytes(held.getvalue()[: held.tell() // 2])
    held = io.BytesIO()
    noise.save(held, "PNG")
    broken = bytearray(held.getvalue())
    broken[len(broken) // 2] ^= 0xFF
    (root / "flipped-bit.png").write_bytes(bytes(broken))
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("this is no image")
    (root / "page.jpg").write_text("<!doctype html><html><body>404 not found</body></html>")
    (root / "zeros.png").write_bytes(bytes(1000))
    (root / "header-only.png").write_bytes(held.getvalue()[:33])
    (root / "bomb.png").write_bytes(png_header(60_000, 60_000))
    Image.fromarray(np.array([[0, 1], [np.nan, 1]], np.float32)).save(root / "undefined.tif")
    Image.fromarray(np.array([[0, 70000]], np.float32)).save(root / "beyond.tif")
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    reasons = {
        "empty.jpg": "empty", "text.png": "not an image", "page.jpg": "not an image", "zeros.png": "not an image",
        "bomb.png": "pixels", "undefined.tif": "undefined", "beyond.tif": "reach from 0 to 70000",
        "loop.png": "levels of symbolic links", "dangling.png": "no such file", "pipe.png": "not a regular file",
    }  # fmt: skip
    return {path.name: reasons.get(path.name, "") for path in root.iterdir()}


def make_extreme(root: Path) -> dict[str, tuple[int, int, int]]:
    """Readable images that hardly serve; name -> the colour of their centre."""
    Image.new("RGB", (1, 1), GREEN).save(root / "1x1.png")
    wide = Image.new("RGB", (30_000, 10), RED)
    wide.paste(BLUE, (14_900, 0, 15_100, 10))
    wide.save(root / "wide.png")
    return {"1x1.png": GREEN, "wide.png": BLUE}


def _as(image: Image.Image, format: str, path: Path) -> None:
    with path.open("wb") as file:
        image.save(file, format)


def _palette_with_alpha(path: Path) -> None:
    """A palette in which the colour of the last quarter, black, is transparent."""
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([*RED, *GREEN, *BLUE, 0, 0, 0])
    half = SIDE // 2
    for index, corner in enumerate([(0, 0), (half, 0), (0, half), (half, half)]):
        image.paste(index, (*corner, corner[0] + half, corner[1] + half))
    image.save(path, transparency=bytes([255, 255, 255, 0]))
