"""Tiny autoencoders of the TAESD family, in their author's layout: numbered layers of two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from latentflow.autoencoder import decode, encode, load_autoencoder
from latentflow.autoencoder.tiny import AutoencoderTinyGroupNorm
from latentflow.errors import UserError

SIZES = {
    "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1),
    "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
}  # fmt: skip


def published(vae: AutoencoderTiny, folder: Path) -> None:
    """Write the weights as the author does: numbered layers, the decoder's from 1, since its layer 0 has none."""
    for part, first in (("encoder", 0), ("decoder", 1)):
        weights = {}
        for name, value in getattr(vae, part).layers.state_dict().items():
            number, _, rest = name.partition(".")
            weights[f"{int(number) + first}.{rest}"] = value.half()
        save_file(weights, folder / f"{part}.safetensors")


@pytest.mark.parametrize("pooled", [True, False])
@torch.no_grad()
def test_the_published_layout_opens(pooled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = (AutoencoderTinyGroupNorm if pooled else AutoencoderTiny)(latent_channels=6, **SIZES)
    pools = [name for name, _ in made.named_parameters() if ".pool." in name]
    assert {name.rpartition(".pool.")[0] for name in pools} == (
        {"encoder.layers.3", "encoder.layers.4", "decoder.layers.2", "decoder.layers.3"} if pooled else set()
    )
    made = made.half().float().eval()
    published(made, tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(made)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode(loaded, images)
    assert torch.equal(latents, encode(made, images))
    assert torch.equal(decode(loaded, latents), decode(made, latents))
    assert latents.shape == (2, 6, 8, 8)
    # In diffusers' layout it is the same
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(encode(load_autoencoder(tmp_path / "saved"), images), latents)


@torch.no_grad()
def test_the_group_norm_is_seen() -> None:
    """It joins all pixels: without it, a pixel far away would change nothing."""
    torch.manual_seed(0)
    vae = AutoencoderTinyGroupNorm(latent_channels=4, **SIZES).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    changed = images.clone()
    changed[..., :8, :8] = 1.0
    difference = (encode(vae, images) - encode(vae, changed)).abs()
    assert difference[..., -4:, -4:].min() > 0.0


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("encoder", "decoder"):
        save_file({"layer.weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="no tiny autoencoder of the TAESD family"):
        load_autoencoder(tmp_path)


@pytest.mark.data
@torch.no_grad()
def test_the_tiny_autoencoder_of_flux2(data_folder: Path) -> None:
    """On photographs of 256 px, its images have at least 34 dB."""
    files = sorted(data_folder.glob("clothing/validation/*/*"))[::25]
    rows = [np.array(Image.open(file).convert("RGB").resize((256, 256))) for file in files]
    images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1.0
    vae = load_autoencoder(data_folder / "taef2")
    drawn = decode(vae, encode(vae, images)).clamp(-1, 1)
    error = ((drawn - images) / 2).square().mean((1, 2, 3))
    assert float((-10 * error.log10()).mean()) > 34.0
