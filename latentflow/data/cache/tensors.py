"""Prepared pixels, masks, latents and text embeddings, kept outside the data and keyed by content.

Each row is looked up by a hash of what it was made of (an image's bytes, a caption), in the set of shards of a hash of
everything else that its values depend on: the transform, and the weights and config of the network. So equal images
share a row, data sets share rows, and an edited image is the only one that is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from ...errors import UserError
from ..dataset import Example, Source, read_image, read_own_mask
from ..images import ImageFileError, parse_colour, pixels_to_images, to_pixels
from .store import NO_KEY, Array, DamagedShardError, ShardSet, Tables, digests, open_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Resolution = int | tuple[int, int]
Settings = dict[str, object]
T = TypeVar("T")
R = TypeVar("R")


class RowIndex:
    """The places of the rows of N samples: eight bytes for each, whatever the size of a row.

    Args:
        shards: the set that holds them.
        find: gives the places (N, 2) int32 of the samples (shard and row; -1: all zeros), after it made what is
            missing. Called again where a shard turns out to be damaged.
    """

    def __init__(self, shards: ShardSet, find: Callable[[], Array]) -> None:
        self._shards, self._find = shards, find
        self._places = find()

    def __len__(self) -> int:
        return len(self._places)

    def table(self, name: str) -> LazyTable | None:
        """Return one of the tables; None where no sample has a row, or rows have none of this name."""
        numbers = self._places[self._places[:, 0] >= 0, 0]
        like = self._shards.shard(numbers[0]).tables.get(name) if len(numbers) else None
        return None if like is None else LazyTable(self, name, like)

    def column(self, name: str) -> Tensor:
        """Return a table with one number for each sample, (N,), in memory; 0 where there is no row."""
        table = self.table(name)
        out = torch.zeros(len(self), dtype=None if table is None else table.dtype)
        for number in np.unique(self._places[:, 0]):
            if number >= 0:
                here = np.flatnonzero(self._places[:, 0] == number)
                out[here] = torch.tensor(self._shards.shard(number).tables[name][self._places[here, 1]])
        return out

    def row(self, name: str, index: int) -> Array | None:
        """Return a sample's row of a table, mapped: not to be written to. None: all zeros.

        Raises:
            UserError: it is damaged and cannot be made again here.
        """
        number, row = self._places[index].tolist()
        if number < 0:
            return None
        try:
            return self._shards.shard(number).row(name, row)
        except DamagedShardError as error:
            what = f"the {self._shards.kind} are damaged: {error}"
            if self._shards.read_only:
                fix = "Start the `latentflow precompute` line that made them again: it makes only the damaged part."
                raise UserError(what, fix) from error
            if get_worker_info() is not None:  # a loader's process: the network is not its to use
                raise UserError(what, "Start the same command again with --num-workers 0.") from error
            self._shards.discard(number, error)
        self._places = self._find()
        return self.row(name, index)


class LazyTable:
    """A table (N, ...) whose rows are read when they are indexed, as a tensor's are: ``table[3]``, ``table[[2, 0]]``.

    What comes back is a tensor in memory; ``table[:]`` is all of it.
    """

    def __init__(self, index: RowIndex, name: str, like: Array) -> None:
        self._index, self._name, self._type = index, name, like.dtype
        self.shape = torch.Size((len(index), *like.shape[1:]))
        self.dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Tensor:
        """Return ``tensor[index]``: the first part of a tuple picks rows, the rest what is wanted of each."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int):
            return self._pick([range(len(self))[first]])[0][tuple(rest)]
        rows: Sequence[int]
        if isinstance(first, slice):
            rows = range(len(self))[first]
        else:
            chosen = torch.as_tensor(first)
            rows = (chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen).tolist()
        if rest and isinstance(rest[0], list):  # an entry of each row: the others are not read
            return self._pick(rows, rest[0])[(slice(None), *rest[1:])]
        return self._pick(rows)[(slice(None), *rest)]

    def _pick(self, rows: Sequence[int], entries: list[int] | None = None) -> Tensor:
        out = np.empty((len(rows), *self.shape[1 if entries is None else 2 :]), dtype=self._type)
        for place, index in enumerate(rows):
            row = self._index.row(self._name, index)
            if row is None:
                out[place] = 0
            else:
                out[place] = row if entries is None else row[entries[place]]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class LatentTable:
    """Latents of N images as the autoencoder's posteriors, normalised by its own statistics.

    Attributes:
        mean: (N, F, C, h, w) float32; F = 1, or 2 where the second is the image mirrored left to right.
        std: the same shape, or None where the autoencoder gives one latent for an image.
    """

    mean: Tensor | LazyTable
    std: Tensor | LazyTable | None

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: list[int], versions: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return mean and std, each (B, C, h, w), of images in the given ``versions`` (1: mirrored)."""
        std = None if self.std is None else self.std[indices, versions]
        return self.mean[indices, versions], std


@dataclass(frozen=True)
class MaskTable:
    """The user's own masks of N images.

    Attributes:
        masks: (N, 1, H, W) uint8, 255 repaint and 0 keep; all 0 where there is none.
        has_mask: (N,) bool.
    """

    masks: Tensor | LazyTable
    has_mask: Tensor

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class TextTable:
    """Embeddings of N captions. Equal captions share theirs."""

    index: RowIndex

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, L, D) and masks (B, L), True where there is a token, of captions ``indices`` (B,).

        L is the length of the longest of them; what is beyond a caption's end is zero.
        """
        embeds, masks = [], []
        for row in map(int, indices):
            mask, values = self.index.row("mask", row), self.index.row("embeds", row)
            assert mask is not None and values is not None
            length = int(mask.nonzero()[0].max(initial=0)) + 1
            embeds.append(torch.tensor(values[:length]))
            masks.append(torch.tensor(mask[:length]))
        return pad_sequence(embeds, True), pad_sequence(masks, True)


def cached_pixels(
    source: Source, resolution: Resolution, background: str = "white", progress: bool = True
) -> LazyTable:
    """Return every image of ``source``, prepared by ``read_image``: uint8 (N, 3, H, W), in the source's order.

    Rows are read from the disk when they are indexed; ``[:]`` is all of them as a tensor.

    Raises:
        UserError: an image cannot be decoded (run the source through ``readable`` first), or the cache
            would lie inside the data.
    """
    transform = pixel_transform(size_of(resolution), background)
    pixels = index_images(source, transform, progress=progress).table("pixels")
    assert pixels is not None
    return pixels


def cached_masks(source: Source, resolution: Resolution) -> MaskTable:
    """Return the user's own mask of every image, registered with ``cached_pixels``; see ``MaskTable``.

    Raises:
        UserError: a file is no mask or cannot be read, or the cache would lie inside the data.
    """
    size = size_of(resolution)
    if source.has_masks:
        index = index_images(source, mask_transform(size))
        if (masks := index.table("masks")) is not None:
            return MaskTable(masks, index.column("found"))
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(len(source), 1, *size)
    return MaskTable(nothing, torch.zeros(len(source), dtype=torch.bool))


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
    own_encoding: Encoding | None = None,
) -> LatentTable:
    """Return every image's latent under a frozen autoencoder, computed once; see ``LatentTable``.

    Args:
        flips: whether mirror images are needed as well.
        own_encoding: encodes images, in the place of the autoencoder itself.

    Raises:
        UserError: as for ``cached_pixels``.
    """
    transform = latent_transform(
        size_of(resolution), background, vae, flips, batch_size, device, own_encoding
    )
    index = index_images(source, transform, progress=progress)
    mean = index.table("mean")
    assert mean is not None
    return LatentTable(mean, index.table("std"))


def cached_text(
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    *,
    batch_size: int = 64,
) -> TextTable:
    """Return embeddings of captions under a frozen text encoder, each different caption computed once."""
    from ...models.text import encode_text

    @torch.no_grad()
    def encode(texts: list[str]) -> Iterator[Tables]:
        encoder.to("cpu")
        for batch in batches(iter(texts), batch_size):
            embeds, mask = encode_text(tokenizer, encoder, batch)
            yield {"embeds": (embeds.float() * mask[..., None]).cpu(), "mask": mask.cpu()}

    settings: Settings = {
        "encoder": fingerprint(encoder),
        "tokenizer": _tokenizer_state(tokenizer),
        "length": None,  # that of the tokenizer
    }
    width = int(getattr(encoder.config, "hidden_size", 1024))
    row_bytes = 4 * width * min(512, tokenizer.model_max_length)
    transform = Transform("text", settings, row_bytes, str, encode, "encoding captions")
    return TextTable(_index_rows(open_cache("text", settings), transform, captions, lambda: captions))


class Encoding(NamedTuple):
    """A way to encode images.

    Attributes:
        name: tells it from others; rows in the cache depend on it.
        encode: images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of latents (B, C, h, w), normalised; the
            deviation is None where there is none.
    """

    name: str
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Transform(Generic[T]):
    """The making of the rows of a set of shards from items: images, or captions.

    Attributes:
        kind: what the rows are.
        settings: everything but the item that a row depends on.
        row_bytes: the size of a row, about.
        key: gives the hash of what an item's row is made of, as it is now; None: it has no row.
        encode: yields the tables of batches of items, in their order.
        title: of the progress bar.
    """

    kind: str
    settings: Settings
    row_bytes: int
    key: Callable[[T], str | None]
    encode: Callable[[list[T]], Iterator[Tables]]
    title: str


def pixel_transform(size: tuple[int, int], background: str) -> Transform[Example]:
    """Return the transform of images to ``pixels`` (3, H, W) uint8."""

    def encode(examples: list[Example]) -> Iterator[Tables]:
        for batch in batches(read_pixels(examples, size, background), 64):
            yield {"pixels": torch.stack(batch)}

    settings: Settings = {
        "size": list(size), "background": parse_colour(background), "resize": "fit-lanczos"
    }  # fmt: skip
    row_bytes = 3 * size[0] * size[1]
    return Transform("pixels", settings, row_bytes, methodcaller("pixel_key"), encode, "reading images")


def mask_transform(size: tuple[int, int]) -> Transform[Example]:
    """Return the transform of images to the user's own ``masks`` (1, H, W) uint8, and whether one was ``found``."""

    def encode(examples: list[Example]) -> Iterator[Tables]:
        for batch in batches(map_threaded(partial(_mask, size=size), examples), 64):
            masks, found = zip(*batch, strict=True)
            yield {"masks": torch.stack(masks), "found": torch.tensor(found)}

    settings: Settings = {"size": list(size), "resize": "fit-nearest"}
    row_bytes = size[0] * size[1]
    return Transform("masks", settings, row_bytes, methodcaller("masked_key"), encode, "reading masks")


def latent_transform(
    size: tuple[int, int],
    background: str,
    vae: Any,
    flips: bool,
    batch_size: int,
    device: str | torch.device,
    own_encoding: Encoding | None = None,
) -> Transform[Example]:
    """Return the transform of images to latents: ``mean`` and, where the autoencoder has it, ``std`` (F, C, h, w)."""
    from ...autoencoder import downscale_factor, latent_channels

    def encode(examples: list[Example]) -> Iterator[Tables]:
        vae.to(device)
        for batch in batches(read_pixels(examples, size, background), batch_size):  # several threads decode
            mean, std = _posteriors(vae, torch.stack(batch), flips, device, own_encoding)
            yield {"mean": mean} if std is None else {"mean": mean, "std": std}

    settings = pixel_transform(size, background).settings | {"flips": flips, "autoencoder": fingerprint(vae)}
    if own_encoding is not None:
        settings["encoding"] = own_encoding.name
    factor = downscale_factor(vae)
    values = 2 * (1 + flips) * latent_channels(vae) * (size[0] // factor) * (size[1] // factor)
    return Transform("latents", settings, 4 * values, methodcaller("pixel_key"), encode, "encoding images")


def index_images(
    source: Source, transform: Transform[Example], shards: ShardSet | None = None, *, progress: bool = True
) -> RowIndex:
    """Find the rows of a source's images, and make the missing ones.

    Args:
        shards: the set of shards; None: the source's own, or the cache's.
    """
    if shards is None:
        shards = source.shards(transform.kind, transform.settings)
    by_kind = {"masks": source.masked_keys, "layouts": source.layout_keys}
    keys: Callable[[], Iterable[str | None]] = by_kind.get(transform.kind, source.pixel_keys)
    return _index_rows(shards, transform, source.examples, keys, progress)


def _index_rows(
    shards: ShardSet,
    transform: Transform[T],
    items: Sequence[T],
    keys: Callable[[], Iterable[str | None]],
    progress: bool = True,
) -> RowIndex:
    """Find the rows of ``items``, and make the missing ones; ``keys`` gives the key of each. Equal keys share a row."""

    def find() -> Array:
        all_keys = digests(keys())
        different, first = np.unique(all_keys, return_index=True)
        # In the order of the items: files that hold many are read from front to back.
        first = np.sort(first[different != NO_KEY])
        unique = all_keys[first]

        def build(chunk: Array) -> Iterator[Tables]:
            chosen = [items[int(row)] for row in first[chunk]]
            yield from transform.encode(chosen)
            if (digests(map(transform.key, chosen)) != unique[chunk]).any():
                raise UserError("a file was changed while it was read", "Start again when all are in place.")

        shards.fill(unique, build, transform.row_bytes, transform.title if progress else None)
        return shards.find(all_keys)

    return RowIndex(shards, find)


def read_pixels(
    examples: Iterable[Example], resolution: Resolution, background: str = "white"
) -> Iterator[Tensor]:
    """Yield each image as uint8 (3, H, W), decoded in several threads.

    Raises:
        UserError: an image cannot be decoded, or was changed while it was read.
    """
    parse_colour(background)
    return map_threaded(partial(_pixels, resolution=resolution, background=background), examples)


def map_threaded(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what ``function`` returns of each item, in order, a bounded number of items ahead of the reader.

    A few threads compute it. Pillow decodes without the interpreter lock, so threads help.
    """
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fingerprint(network: Any) -> str:
    """Return the hash of a network's config and of every bit of its weights."""
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
    vae: Any,
    pixels: Tensor,
    flips: bool,
    device: str | torch.device,
    own_encoding: Encoding | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return normalised mean and std, (B, F, C, h, w), of pixels (B, 3, H, W) uint8 and their mirror images."""
    from ...autoencoder import normalised_posterior

    encode = own_encoding.encode if own_encoding else partial(normalised_posterior, vae)
    images = pixels_to_images(pixels).to(device)
    means, stds = [], []
    for view in (images, images.flip(-1)) if flips else (images,):
        mean, std = encode(view)
        means.append(mean.cpu())
        if std is not None and bool((std > 0).any()):
            stds.append(std.cpu())
    return torch.stack(means, 1), torch.stack(stds, 1) if stds else None


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield the items as lists of ``size``, the last of which may be shorter."""
    while batch := list(islice(items, size)):
        yield batch


def size_of(resolution: Resolution) -> tuple[int, int]:
    """Return (height, width)."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def _pixels(example: Example, resolution: Resolution, background: str) -> Tensor:
    try:
        return to_pixels(read_image(example, resolution, background))
    except ImageFileError as error:
        fix = "`latentflow check` lists every file that cannot be read."
        raise UserError(f"cannot read {example.name}: {error.why}", fix) from error


def _mask(example: Example, size: tuple[int, int]) -> tuple[Tensor, bool]:
    """Return a mask (1, H, W) uint8, and whether there is one."""
    mask = read_own_mask(example, size)
    if mask is None:  # the alpha channel was to be it, and there is none
        return torch.zeros(1, *size, dtype=torch.uint8), False
    return torch.from_numpy(np.array(mask))[None], True
