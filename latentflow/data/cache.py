"""Prepared pixels, latents and text embeddings, kept outside the data and keyed by content.

A table is one safetensors file. Its name is a hash of everything that its values depend on: the bytes of the
pictures (not their names or order), the transform, and the weights and config of the network that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentflow.errors import UserError

from .examples import Example, Source
from .parallel import map_threaded
from .read import parse_colour, pixels_to_images, read_image, read_own_mask, to_pixels
from .store import Tables, cache_root, load_or_build

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Resolution = int | tuple[int, int]


@dataclass(frozen=True)
class LatentTable:
    """Latents of N pictures as the autoencoder's posteriors, normalised by its own statistics.

    Attributes:
        mean: (N, F, C, h, w) float32; F = 1, or 2 where the second is the picture mirrored left to right.
        std: the same shape, or None where the autoencoder gives one latent for a picture.
    """

    mean: Tensor
    std: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class MaskTable:
    """The user's own masks of N pictures.

    Attributes:
        masks: (N, 1, H, W) uint8, 255 repaint and 0 keep; all 0 where there is none.
        has_mask: (N,) bool.
    """

    masks: Tensor
    has_mask: Tensor

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class TextTable:
    """Embeddings of the different captions among N, and which of them each of the N has.

    Attributes:
        embeds: (U, L, D).
        mask: (U, L) bool, True where there is a token.
        rows: (N,) long, the caption's row in the two.
    """

    embeds: Tensor
    mask: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and masks (B, L) of the captions at ``indices`` (B,)."""
        rows = self.rows[indices]
        return self.embeds[rows], self.mask[rows]


def cached_pixels(
    source: Source, resolution: Resolution, background: str = "white", progress: bool = True
) -> Tensor:
    """Every picture of ``source``, prepared by ``read_image``: uint8 (N, 3, H, W), in the source's order.

    Raises:
        UserError: a picture cannot be decoded (run the source through ``readable`` first), or the cache
            would lie inside the data.
    """
    unique, keys, rows = _unique(source.examples, source.content_keys())

    def build() -> Tables:
        return {"pixels": torch.stack(list(_read_all(unique, resolution, background, progress)))}

    pixels = load_or_build("pixels", keys, _transform(resolution, background), build, source.root)["pixels"]
    return _take(pixels, rows)


def cached_masks(source: Source, resolution: Resolution, progress: bool = True) -> MaskTable:
    """The user's own mask of every picture, registered with ``cached_pixels``; see ``MaskTable``.

    Raises:
        UserError: a file is no mask or cannot be read, or the cache would lie inside the data.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    places = [row for row, example in enumerate(source.examples) if example.mask is not None]
    table = MaskTable(
        torch.zeros(len(source), 1, height, width, dtype=torch.uint8),
        torch.zeros(len(source), dtype=torch.bool),
    )
    if not places:
        return table
    masked = [source.examples[row] for row in places]
    # The picture's size decides where its mask lies, so a table's row belongs to both.
    unique, keys, rows = _unique(masked, [f"{e.content_key()} {e.mask_key()}" for e in masked])

    def build() -> Tables:
        read = map_threaded(partial(_mask, resolution=(height, width)), unique)
        masks, found = zip(
            *tqdm(read, total=len(unique), desc="reading masks", disable=not progress), strict=True
        )
        return {"masks": torch.stack(masks), "found": torch.tensor(found)}

    description: dict[str, object] = {"size": [height, width], "resize": "fit-nearest"}
    tables = load_or_build("masks", keys, description, build, source.root)
    table.masks[places] = tables["masks"][rows]
    table.has_mask[places] = tables["found"][rows]
    return table


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
    """Every picture's latent under a frozen autoencoder, computed once; see ``LatentTable``.

    Raises:
        UserError: as for ``cached_pixels``.
    """
    unique, keys, rows = _unique(source.examples, source.content_keys())
    description = _transform(resolution, background) | {"flips": flips, "autoencoder": fingerprint(vae)}

    def build() -> Tables:
        vae.to(device)
        pixels = _read_all(unique, resolution, background, progress)
        encoded = [_posteriors(vae, batch, flips, device) for batch in _batches(pixels, batch_size)]
        tables = {"mean": torch.cat([mean for mean, _ in encoded])}
        stds = [std for _, std in encoded if std is not None]
        return tables | {"std": torch.cat(stds)} if stds else tables

    tables = load_or_build("latents", keys, description, build, source.root)
    std = tables.get("std")
    return LatentTable(_take(tables["mean"], rows), None if std is None else _take(std, rows))


def cached_text(
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TextTable:
    """Embeddings of captions under a frozen text encoder, each different caption computed once."""
    from latentflow.models.text import encode_text

    unique = sorted(set(captions))
    described: dict[str, object] = {
        "encoder": fingerprint(encoder),
        "tokenizer": _tokenizer_state(tokenizer),
        "length": max_length,
    }

    def build() -> Tables:
        encoder.to(device)
        starts = tqdm(range(0, len(unique), batch_size), desc="encoding captions", disable=not progress)
        with torch.no_grad():
            parts = [
                encode_text(tokenizer, encoder, unique[start : start + batch_size], max_length)
                for start in starts
            ]
        length = max(mask.shape[1] for _, mask in parts)
        embeds = torch.cat([_pad(part.float().cpu(), length) for part, _ in parts])
        return {"embeds": embeds, "mask": torch.cat([_pad(mask.cpu(), length) for _, mask in parts])}

    tables = load_or_build("text", unique, described, build)
    order = {text: row for row, text in enumerate(unique)}
    return TextTable(tables["embeds"], tables["mask"], torch.tensor([order[text] for text in captions]))


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
    from latentflow.autoencoder import normalise, posterior

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


def _read_all(
    examples: list[Example], resolution: Resolution, background: str, progress: bool
) -> Iterator[Tensor]:
    parse_colour(background)
    read = map_threaded(partial(_pixels, resolution=resolution, background=background), examples)
    yield from tqdm(read, total=len(examples), desc="reading pictures", disable=not progress)


def _batches(items: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    while batch := list(islice(items, size)):
        yield torch.stack(batch)


def _take(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]``, without a copy where that is the whole table in order."""
    same = len(rows) == len(table) and bool((rows == torch.arange(len(rows))).all())
    return table if same else table[rows]


def _pad(table: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros up to ``length`` in the second dimension."""
    padding = table.new_zeros((table.shape[0], length - table.shape[1], *table.shape[2:]))
    return torch.cat([table, padding], 1)


def _pixels(example: Example, resolution: Resolution, background: str) -> Tensor:
    try:
        return to_pixels(read_image(example, resolution, background))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise _unreadable(example, error) from error


def _mask(example: Example, resolution: tuple[int, int]) -> tuple[Tensor, bool]:
    """(1, H, W) uint8, and whether there is a mask."""
    try:
        mask = read_own_mask(example, resolution)
    except UserError:
        raise
    except Exception as error:  # the picture, opened for its size
        raise _unreadable(example, error) from error
    if mask is None:
        return torch.zeros(1, *resolution, dtype=torch.uint8), False
    return torch.from_numpy(np.array(mask))[None], True


def _unreadable(example: Example, error: Exception) -> UserError:
    return UserError(
        f"cannot read {example.name}: {error}", "`latentflow check` lists every file that cannot be read."
    )


def _transform(resolution: Resolution, background: str) -> dict[str, object]:
    size = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    return {"size": size, "background": parse_colour(background), "resize": "fit-lanczos"}


def _unique(examples: Sequence[Example], keys: list[str]) -> tuple[list[Example], list[str], Tensor]:
    """One example of each key, ordered by key; these keys; and for every example its row."""
    first = dict(zip(reversed(keys), reversed(examples), strict=True))
    order = {key: row for row, key in enumerate(sorted(first))}
    return [first[key] for key in order], list(order), torch.tensor([order[key] for key in keys])
