"""The image formats that are read, and no others. Imports nothing of ours."""

from __future__ import annotations

from PIL import Image

#: Pillow's names. Of the formats that it knows beside them some are programs: PostScript, in a file of any name, is
#: handed to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")


def readable_formats() -> list[str]:
    """Return those of ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [one for one in FORMATS if one in Image.OPEN]


def open_no_others() -> None:
    """Keep Pillow from opening any other format in this process, whoever asks.

    For a server: its framework opens what strangers upload before any code of ours sees it.
    """
    kept = readable_formats()
    for other in set(Image.OPEN) - set(kept):
        del Image.OPEN[other]
    Image.ID[:] = kept
