"""Tiny autoencoders of the TAESD family, as their author publishes them: encoder.safetensors and decoder.safetensors.

They make previews of the latents of large models in milliseconds. Some have a group norm in the blocks at the
smallest resolution, which diffusers' ``AutoencoderTiny`` lacks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from ..errors import UserError, few, reading
from ..utils.files import CONFIG, MEND

#: files of such an autoencoder
FILES = ("encoder.safetensors", "decoder.safetensors")


class _PooledBlock(AutoencoderTinyBlock):  # type: ignore[misc]
    """Residual block, before which a group norm over all pixels is added."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = super().forward(x + self.pool(x))
        return pooled


class AutoencoderTinyGroupNorm(AutoencoderTiny):  # type: ignore[misc]
    """``AutoencoderTiny`` with a group norm in the blocks at the smallest resolution, such as FLUX.2's (TAEF2).

    Its arguments are those of ``AutoencoderTiny``.
    """

    @functools.wraps(AutoencoderTiny.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for layers, count, last in (
            (self.encoder.layers, self.config.num_encoder_blocks[-1], True),
            (self.decoder.layers, self.config.num_decoder_blocks[0], False),
        ):
            blocks = [place for place, layer in enumerate(layers) if isinstance(layer, AutoencoderTinyBlock)]
            for place in blocks[-count:] if last else blocks[:count]:
                layers[place] = _PooledBlock(layers[place].conv[0].in_channels)


def is_tiny(folder: Path) -> bool:
    """Return True for a folder of such an autoencoder, or of a half of it."""
    return not (folder / CONFIG).is_file() and any((folder / name).is_file() for name in FILES)


def load_tiny(folder: Path, dtype: torch.dtype | None = None) -> AutoencoderTiny:
    """Load a tiny autoencoder as its author publishes it.

    Args:
        folder: with `FILES`.
        dtype: of the weights; None: as they are stored.

    Raises:
        UserError: a file is missing or cannot be read, or holds other weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    there = [name for name in FILES if (folder / name).is_file()]
    if len(there) == 1:
        [missing] = {*FILES} - {*there}
        raise UserError(
            f"{folder} has {there[0]} but no {missing}", "Download both: they are published together."
        )
    halves = []
    for name in FILES:
        with reading(folder / name, OSError, SafetensorError, fix=MEND):
            halves.append(load_file(folder / name))
    encoder, decoder = halves
    try:
        # The decoder's first layer limits its input, which diffusers does without a layer.
        weights = {f"encoder.layers.{name}": value for name, value in encoder.items()}
        weights |= {
            re.sub(r"^(\d+)", lambda found: f"decoder.layers.{int(found[1]) - 1}", name): value
            for name, value in decoder.items()
        }
        vae: Any = _built(encoder, decoder)
        vae.load_state_dict(weights, strict=False, assign=True)
        if differing := sorted(weights.keys() ^ vae.state_dict().keys()):
            raise ValueError(
                f"{few(differing, 3)} {'is' if len(differing) == 1 else 'are'} missing or unknown"
            )
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tiny autoencoder of the TAESD family: {str(error).splitlines()[-1].strip()}",
            f"{FILES[0]} has {few(sorted(encoder), 3)}.",
        ) from error
    # diffusers' own `to` warns of modules to be kept in float32, also where there are none.
    return vae.eval() if dtype is None else nn.Module.to(vae.eval(), dtype)


def _built(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> AutoencoderTiny:
    """Return the network for the weights, without values."""
    last = max(int(name.partition(".")[0]) for name in encoder)
    channels = encoder["0.weight"].shape[0]
    blocks = {
        "num_encoder_blocks": _blocks(encoder),
        "num_decoder_blocks": _blocks(decoder),
    }
    latent = encoder[f"{last}.weight"].shape[0]
    widths = {
        f"{part}_block_out_channels": (channels,) * len(blocks[f"num_{part}_blocks"])
        for part in ("encoder", "decoder")
    }
    kind = AutoencoderTinyGroupNorm if any(".pool." in name for name in encoder) else AutoencoderTiny
    with torch.device("meta"):
        return kind(latent_channels=latent, **widths, **blocks)


def _blocks(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return how many residual blocks lie between the convolutions of one half."""
    layers = sorted({int(name.partition(".")[0]) for name in weights})
    counts, count = [], 0
    for layer in layers[1:]:
        if f"{layer}.conv.0.weight" in weights:
            count += 1
        else:
            counts.append(count)
            count = 0
    return tuple(counts)
