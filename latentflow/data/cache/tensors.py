"""Prepared pixels, latents and text embeddings, kept outside the data and keyed by content.

Each row is looked up by a hash of what it was made of (an image's bytes, a caption), in the set of shards of a hash of
everything else that its values depend on: the transform, and the weights and config of the network. So equal images
share a row, data sets share rows, and an edited image is the only one that is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import methodcaller
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import UserError
from ..dataset import Example, Source
from ..images import ImageFileError
from ..pixels import parse_colour, pixels_to_images, read_image, read_own_mask, to_pixels
from ..sources.latent_folder import LatentFolder
from .eviction import cache_root
from .parallel import map_threaded
from .rows import Located, Rows
from .store import Array, ShardSet, Tables, digests, open_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = [
    "LatentTable",
    "MaskTable",
    "TextTable",
    "cache_root",
    "cached_latents",
    "cached_masks",
    "cached_pixels",
    "cached_text",
]


Resolution = int | tuple[int, int]
Settings = dict[str, object]
T = TypeVar("T")


@dataclass(frozen=True)
class LatentTable:
    """Latents of N images as the autoencoder's posteriors, normalised by its own statistics.

    Attributes:
        mean: (N, F, C, h, w) float32; F = 1, or 2 where the second is the image mirrored left to right.
        std: the same shape, or None where the autoencoder gives one latent for an image.
    """

    mean: Tensor | Rows
    std: Tensor | Rows | None

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: list[int], versions: list[int]) -> tuple[Tensor, Tensor | None]:
        """Mean and std, each (B, C, h, w), of the images at ``indices`` in the given ``versions`` (1: mirrored)."""
        return _pick(self.mean, indices, versions), (
            None if self.std is None else _pick(self.std, indices, versions)
        )


@dataclass(frozen=True)
class MaskTable:
    """The user's own masks of N images.

    Attributes:
        masks: (N, 1, H, W) uint8, 255 repaint and 0 keep; all 0 where there is none.
        has_mask: (N,) bool.
    """

    masks: Tensor | Rows
    has_mask: Tensor

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class TextTable:
    """Embeddings of N captions. Equal captions share theirs."""

    located: Located

    def __len__(self) -> int:
        return len(self.located)

    def batch(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and masks (B, L), True where there is a token, of the captions at ``indices`` (B,).

        L is the length of the longest of them; what is beyond a caption's end is zero.
        """
        rows = [int(index) for index in indices]
        parts = [(self.located.row("embeds", row), self.located.row("mask", row)) for row in rows]
        held = [(embeds, mask) for embeds, mask in parts if embeds is not None and mask is not None]
        lengths = [int(mask.nonzero()[0].max(initial=0)) + 1 for _, mask in held]
        embeds, masks = (
            pad_sequence(
                [torch.tensor(part[:length]) for part, length in zip(one, lengths, strict=True)], True
            )
            for one in zip(*held, strict=True)
        )
        return embeds, masks


def cached_pixels(
    source: Source, resolution: Resolution, background: str = "white", progress: bool = True
) -> Rows:
    """Every image of ``source``, prepared by ``read_image``: uint8 (N, 3, H, W), in the source's order.

    Rows are read from the disk when they are indexed; ``[:]`` is all of them as a tensor.

    Raises:
        UserError: an image cannot be decoded (run the source through ``readable`` first), or the cache
            would lie inside the data.
    """
    shards = _shards("pixels", pixel_settings(resolution, background), source)
    rows = located_pixels(source, resolution, background, shards, progress=progress).table("pixels")
    assert rows is not None
    return rows


def cached_masks(source: Source, resolution: Resolution, progress: bool = True) -> MaskTable:
    """The user's own mask of every image, registered with ``cached_pixels``; see ``MaskTable``.

    Raises:
        UserError: a file is no mask or cannot be read, or the cache would lie inside the data.
    """
    height, width = _size(resolution)
    if not source.has_masks:
        return _no_masks(len(source), height, width)
    return mask_table(
        source, resolution, _shards("masks", mask_settings(resolution), source), progress=progress
    )


def cached_latents(
    source: Source,
    vae: Any,
    resolution: Resolution,
    *,
    background: str = "white",
    flips: bool = True,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LatentTable:
    """Every image's latent under a frozen autoencoder, computed once; see ``LatentTable``.

    Raises:
        UserError: as for ``cached_pixels``.
    """
    if isinstance(source, LatentFolder):
        flips = flips or source.has_flips
    settings = latent_settings(vae, resolution, background, flips)
    return latent_table(
        source, vae, resolution, _shards("latents", settings, source),
        background=background, flips=flips, batch_size=batch_size, device=device, progress=progress,
    )  # fmt: skip


def cached_text(
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TextTable:
    """Embeddings of captions under a frozen text encoder, each different caption computed once."""
    from ...models.text import encode_text

    settings: Settings = {
        "encoder": fingerprint(encoder),
        "tokenizer": _tokenizer_state(tokenizer),
        "length": max_length,
    }

    @torch.no_grad()
    def encode(texts: list[str]) -> Iterator[Tables]:
        encoder.to(device)
        for batch in _batches(iter(texts), batch_size):
            embeds, mask = encode_text(tokenizer, encoder, batch, max_length)
            embeds = embeds.float() * mask[..., None]
            yield {"embeds": embeds.cpu(), "mask": mask.cpu()}

    width = int(getattr(encoder.config, "hidden_size", 1024))
    row_bytes = 4 * width * min(512, max_length or tokenizer.model_max_length)
    shards = open_cache("text", settings)
    return TextTable(
        located(
            shards, captions, lambda: captions, str, encode, row_bytes, _told("encoding captions", progress)
        )
    )


# ---- the same, in a given set of shards ----


def located(
    shards: ShardSet,
    items: Sequence[T],
    keys: Callable[[], Iterable[str]],
    key: Callable[[T], str],
    encode: Callable[[list[T]], Iterator[Tables]],
    row_bytes: int,
    progress: str | None,
) -> Located:
    """Where the rows of ``items`` lie in ``shards``, after the missing ones were made.

    Args:
        keys, key: the keys of all items, and that of one as it is now. Items of equal keys share a row.
        encode: yields the tables of batches of the items that it is given, in their order.
        row_bytes: about how large a row is.
        progress: the name of the progress bar, None for none.
    """

    def find() -> Array:
        wanted = digests(keys())
        first = np.sort(np.unique(wanted, return_index=True)[1])
        unique = wanted[first]  # in the order of the items: files that hold many are read from front to back

        def build(chunk: Array) -> Iterator[Tables]:
            chosen = [items[int(row)] for row in first[chunk]]
            yield from encode(chosen)
            if (digests(map(key, chosen)) != unique[chunk]).any():
                raise UserError("a file was changed while it was read", "Start again when all are in place.")

        shards.fill(unique, build, row_bytes, progress)
        return shards.find(wanted)

    return Located(shards, find)


def located_pixels(
    source: Source, resolution: Resolution, background: str, shards: ShardSet, *, progress: bool
) -> Located:
    """``cached_pixels`` in a given set of shards, as the table ``pixels``."""
    height, width = _size(resolution)

    def encode(examples: list[Example]) -> Iterator[Tables]:
        for batch in _batches(read_pixels(examples, resolution, background), 64):
            yield {"pixels": torch.stack(batch)}

    told = _told("reading images", progress)
    return located(
        shards,
        source.examples,
        source.pixel_keys,
        methodcaller("pixel_key"),
        encode,
        3 * height * width,
        told,
    )


def mask_table(source: Source, resolution: Resolution, shards: ShardSet, *, progress: bool) -> MaskTable:
    """``cached_masks`` in a given set of shards, of a source of which some image has a mask."""
    height, width = _size(resolution)
    places = [row for row, example in enumerate(source.examples) if example.mask is not None]
    if not places:
        return _no_masks(len(source), height, width)
    masked = [source.examples[row] for row in places]

    def encode(examples: list[Example]) -> Iterator[Tables]:
        for batch in _batches(map_threaded(partial(_mask, resolution=(height, width)), examples), 64):
            masks, found = zip(*batch, strict=True)
            yield {"masks": torch.stack(masks), "found": torch.tensor(found)}

    def key(example: Example) -> str:  # the image's size decides where its mask lies: a row belongs to both
        return f"{example.content_key()} {example.mask_key()}"

    some = located(
        shards,
        masked,
        lambda: map(key, masked),
        key,
        encode,
        height * width,
        _told("reading masks", progress),
    )
    spread = some.spread(places, len(source))
    masks = spread.table("masks")
    assert masks is not None
    return MaskTable(masks, spread.column("found"))


def _no_masks(size: int, height: int, width: int) -> MaskTable:
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(size, 1, height, width)
    return MaskTable(nothing, torch.zeros(size, dtype=torch.bool))


def latent_table(
    source: Source,
    vae: Any,
    resolution: Resolution,
    shards: ShardSet,
    *,
    background: str,
    flips: bool,
    batch_size: int,
    device: str | torch.device,
    progress: bool,
) -> LatentTable:
    """``cached_latents`` in a given set of shards."""

    def encode(examples: list[Example]) -> Iterator[Tables]:
        return encode_latents(examples, vae, resolution, background, flips, batch_size, device)

    found = located(
        shards, source.examples, source.pixel_keys, methodcaller("pixel_key"), encode,
        latent_bytes(vae, resolution, flips), _told("encoding images", progress),
    )  # fmt: skip
    mean = found.table("mean")
    assert mean is not None
    return LatentTable(mean, found.table("std"))


def encode_latents(
    examples: Iterable[Example],
    vae: Any,
    resolution: Resolution,
    background: str,
    flips: bool,
    batch_size: int,
    device: str | torch.device,
) -> Iterator[Tables]:
    """``mean`` and, where the autoencoder has them, ``std`` of batches of images; several threads decode."""
    vae.to(device)
    for batch in _batches(read_pixels(examples, resolution, background), batch_size):
        mean, std = _posteriors(vae, torch.stack(batch), flips, device)
        yield {"mean": mean} if std is None else {"mean": mean, "std": std}


def latent_settings(vae: Any, resolution: Resolution, background: str, flips: bool) -> Settings:
    """What latents depend on, beside the image."""
    return pixel_settings(resolution, background) | {"flips": flips, "autoencoder": fingerprint(vae)}


def latent_bytes(vae: Any, resolution: Resolution, flips: bool) -> int:
    """Size of an image's row: means and deviations, of its mirror image as well."""
    from ...autoencoder import downscale_factor, latent_channels

    height, width = _size(resolution)
    cells = (height // downscale_factor(vae)) * (width // downscale_factor(vae))
    return 4 * 2 * (1 + flips) * latent_channels(vae) * cells


def mask_settings(resolution: Resolution) -> Settings:
    """What masks depend on, beside the image and its mask."""
    return {"size": list(_size(resolution)), "resize": "fit-nearest"}


def pixel_settings(resolution: Resolution, background: str) -> Settings:
    """What pixels depend on, beside the image."""
    return {
        "size": list(_size(resolution)), "background": parse_colour(background), "resize": "fit-lanczos"
    }  # fmt: skip


def read_pixels(
    examples: Iterable[Example], resolution: Resolution, background: str = "white"
) -> Iterator[Tensor]:
    """Each image as uint8 (3, H, W), decoded in several threads.

    Raises:
        UserError: an image cannot be decoded, or was changed while it was read.
    """
    parse_colour(background)
    return map_threaded(partial(_pixels, resolution=resolution, background=background), examples)


def fingerprint(network: Any) -> str:
    """Hash of a network's config and of every bit of its weights."""
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    # Where it was loaded from and by which version is not what it computes.
    plain = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
    total = hashlib.sha256(json.dumps([type(network).__name__, plain], sort_keys=True, default=str).encode())
    for name, weight in sorted(network.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for last_call in ("padding", "truncation"):  # the last call's arguments are kept there
        state.pop(last_call, None)
    settings = f"{type(tokenizer).__name__} {tokenizer.model_max_length} {tokenizer.special_tokens_map}"
    return hashlib.sha256(f"{settings} {json.dumps(state, sort_keys=True)}".encode()).hexdigest()


@torch.no_grad()
def _posteriors(
    vae: Any, pixels: Tensor, flips: bool, device: str | torch.device
) -> tuple[Tensor, Tensor | None]:
    """Normalised mean and std, (B, F, C, h, w), of pixels (B, 3, H, W) uint8 and their mirror images."""
    from ...autoencoder import normalise, posterior

    images = pixels_to_images(pixels).to(device)
    means, stds = [], []
    for view in (images, images.flip(-1)) if flips else (images,):
        raw, std = posterior(vae, view)
        raw = raw.float()
        means.append(normalise(vae, raw).cpu())
        if std is not None and bool((std > 0).any()):
            zero = torch.zeros_like(raw)  # normalising is affine: its slope is what scales a deviation
            stds.append((normalise(vae, std.float()) - normalise(vae, zero)).cpu())
    return torch.stack(means, 1), torch.stack(stds, 1) if stds else None


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def _pick(table: Tensor | Rows, indices: list[int], versions: list[int]) -> Tensor:
    return table[indices, versions] if isinstance(table, Tensor) else table.pick(indices, versions)


def _shards(kind: str, settings: Settings, source: Source) -> ShardSet:
    if isinstance(source, LatentFolder):
        return source.store.shards(kind, settings)
    return open_cache(kind, settings, source.root)


def _told(what: str, progress: bool) -> str | None:
    return what if progress else None


def _size(resolution: Resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _pixels(example: Example, resolution: Resolution, background: str) -> Tensor:
    try:
        return to_pixels(read_image(example, resolution, background))
    except ImageFileError as error:
        fix = "`latentflow check` lists every file that cannot be read."
        raise UserError(f"cannot read {example.name}: {error.why}", fix) from error


def _mask(example: Example, resolution: tuple[int, int]) -> tuple[Tensor, bool]:
    """(1, H, W) uint8, and whether there is a mask."""
    mask = read_own_mask(example, resolution)
    if mask is None:  # the alpha channel was to be it, and there is none
        return torch.zeros(1, *resolution, dtype=torch.uint8), False
    return torch.from_numpy(np.array(mask))[None], True
