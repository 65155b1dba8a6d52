"""Every autoencoder of diffusers that images use: its layout, and that latents become the images it makes alone."""

from __future__ import annotations

import diffusers
import pytest
import torch

from latentflow.autoencoder import decode, downscale_factor, encode, latent_channels

from .tiny import AUTOENCODERS, SIDE

pytestmark = pytest.mark.usefixtures("no_grad")

#: the other autoencoders of diffusers, and what they are for
LEFT_OUT = {
    "videos": (
        "KLAllegro", "KLCogVideoX", "KLCosmos", "KLHunyuanImageRefiner", "KLHunyuanVideo", "KLHunyuanVideo15",
        "KLKVAEVideo", "KLLTX2Video", "KLLTXVideo", "KLMagvit", "KLMiniMaxH3", "KLMochi", "KLTemporalDecoder", "VidTok",
    ),
    "sound": ("KLKVAEAudio", "KLLTX2Audio", "KLMiniMaxH3Audio", "Oobleck", "SAME"),
    "transparent images, of one family": ("KLQwenImage21",),
}  # fmt: skip


def test_none_is_forgotten() -> None:
    """A new version of diffusers that brings an autoencoder fails here: add it to the table, or say what it is for."""
    there = {name for name in dir(diffusers) if name.startswith(("Autoencoder", "Asymmetric", "VQModel"))}
    left_out = {f"Autoencoder{name}" for names in LEFT_OUT.values() for name in names}
    tested = {name.partition(" ")[0] for name in AUTOENCODERS}
    assert there == left_out | tested and not left_out & tested


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_layout_and_round_trip(name: str) -> None:
    build, channels, factor = AUTOENCODERS[name]
    torch.manual_seed(0)
    vae = build().eval()
    assert (latent_channels(vae), downscale_factor(vae)) == (channels, factor)
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    latents = encode(vae, images)
    assert latents.shape == (2, channels, SIDE // factor, SIDE // factor)
    # The autoencoder alone, in its own layout and range
    video, unit = hasattr(vae.config, "z_dim"), name == "AutoencoderRAE"
    given = images.unsqueeze(2) if video else images / 2 + 0.5 if unit else images
    encoded = vae.encode(given)
    if hasattr(encoded, "latent_dist"):
        raw = encoded.latent_dist.mode()
    else:
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    alone = vae.decode(raw, return_dict=False)[0]
    alone = alone.squeeze(2) if video else 2 * alone - 1 if unit else alone
    torch.testing.assert_close(decode(vae, latents), alone, rtol=1e-4, atol=1e-5)
    assert alone.std() > 1e-4
