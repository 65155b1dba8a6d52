"""Finding, checking, reading and caching pictures and what is said of them."""

from __future__ import annotations

from .cache import cache_root, cached_pixels
from .examples import Example, FileExample, Source
from .find import find_source
from .read import pixels_to_images, read_image, to_pil, to_tensor
from .splits import split

__all__ = [
    "Example",
    "FileExample",
    "Source",
    "cache_root",
    "cached_pixels",
    "find_source",
    "pixels_to_images",
    "read_image",
    "split",
    "to_pil",
    "to_tensor",
]
