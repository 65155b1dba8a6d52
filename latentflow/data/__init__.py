"""Finding, checking, reading and caching images and their annotations."""

from __future__ import annotations

from .cache.tensors import (
    LatentTable,
    LazyTable,
    cached_latents,
    cached_masks,
    cached_pixels,
    cached_text,
    fingerprint,
)
from .checking.inspect_images import readable
from .checking.report import Report, check_source
from .crops import Cropping, crop, one_size
from .dataset import Example, FileExample, Source, caption_of_class, read_image
from .images import decode_image, pixels_to_images, to_pil, to_tensor
from .masks import read_mask
from .sources.kinds import find_source
from .sources.latent_folder import LatentFolder
from .splits import split

__all__ = [
    "Cropping",
    "Example",
    "FileExample",
    "LatentFolder",
    "LatentTable",
    "LazyTable",
    "Report",
    "Source",
    "cached_latents",
    "cached_masks",
    "cached_pixels",
    "cached_text",
    "caption_of_class",
    "check_source",
    "crop",
    "decode_image",
    "find_source",
    "fingerprint",
    "one_size",
    "pixels_to_images",
    "read_image",
    "read_mask",
    "readable",
    "split",
    "to_pil",
    "to_tensor",
]
