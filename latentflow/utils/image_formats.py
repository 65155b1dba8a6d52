"""The only image formats that are read. Imports nothing of ours."""

from __future__ import annotations

from PIL import Image

#: Pillow's names. Some of its other formats are programs: PostScript, whatever the file's name, goes to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


def readable_formats() -> list[str]:
    """Return the ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_no_others() -> None:
    """Keep Pillow from opening any other format in this process, whoever asks.

    A server needs this: its framework opens the uploads of strangers before any code of ours sees them.
    """
    kept = readable_formats()
    for other in set(Image.OPEN) - set(kept):
        del Image.OPEN[other]
    Image.ID[:] = kept
