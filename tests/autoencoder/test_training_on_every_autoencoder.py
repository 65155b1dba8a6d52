"""Small networks are trained on the latents of every autoencoder, and draw, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentflow.autoencoder import decode, encode, load_autoencoder

from ..training.command import TINY, call, opened, sampled, save_images
from .tiny import AUTOENCODERS, SIDE, flux2

#: the rest is marked slow: batch norm and 2 x 2 cells, videos, and statistics of its own
DEFAULT = ("AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderRAE")
FLAGS = [*TINY, "--resolution", SIDE, "--max-train-steps", 2, "--preview-steps", 2, "--condition", "none"]


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in AUTOENCODERS]
)
def test_latents_as_they_are(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, channels, factor = AUTOENCODERS[name]
    build().eval().save_pretrained(tmp_path / "family" / "vae")
    data = save_images(tmp_path / "data", *(f"{number}.png" for number in range(8)), size=(SIDE, SIDE))
    line = [data, "-o", tmp_path / "run", "--vae", tmp_path / "family", "--latents-as-is", *FLAGS]
    call(tmp_path / "cache", *line)

    pipe, own = opened(tmp_path / "run" / "pipeline"), load_autoencoder(tmp_path / "family")
    assert type(pipe.vae) is type(own)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = encode(own, images)
        assert torch.equal(encode(pipe.vae, images), latents)
        assert torch.equal(decode(pipe.vae, latents), decode(own, latents))
    drawn = sampled(pipe)
    assert drawn.shape == (1, channels, SIDE // factor, SIDE // factor) and drawn.isfinite().all()
    out = tmp_path / "out.png"
    call(
        tmp_path / "cache",
        *("--checkpoint", tmp_path / "run", "--steps", 2, "-o", out),
        file="../pipelines/generate",
    )
    assert Image.open(out).size == (SIDE, SIDE)


def test_statistics_are_measured_unless_the_latents_are_taken_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AUTOENCODERS["AutoencoderKL"][0]().eval().save_pretrained(tmp_path / "vae")
    data = save_images(tmp_path / "data", *(f"{number}.png" for number in range(8)), size=(SIDE, SIDE))
    line = [data, "--vae", tmp_path / "vae", *FLAGS]
    call(tmp_path / "cache", *line, "-o", tmp_path / "measured")
    call(tmp_path / "cache", *line, "-o", tmp_path / "as-is", "--latents-as-is")
    measured, kept = (opened(tmp_path / run / "pipeline").vae.config for run in ("measured", "as-is"))
    assert len(measured.latents_mean) == 4 and measured.scaling_factor == 1.0
    assert (kept.latents_mean, kept.scaling_factor, kept.shift_factor) == (None, 0.6, 0.1)
    # A run goes on as it was begun
    refused = call(tmp_path / "cache", *line, "-o", tmp_path / "as-is", "--max-train-steps", 3, expect=2)
    assert "latents_as_is" in refused
    refused = call(tmp_path / "cache", data, "-o", tmp_path / "none", "--latents-as-is", *FLAGS, expect=2)
    assert "--latents-as-is without --vae" in refused


@torch.no_grad()
def test_the_latents_of_flux2_are_patchified_and_normalised_by_its_batch_norm(tmp_path: Path) -> None:
    """As FLUX.2's own pipeline has it: 2 x 2 cells become channels, then (z - mean) / deviation."""
    vae = flux2().eval()
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    raw = vae.encode(images).latent_dist.mode()
    b, c, h, w = raw.shape
    cells = raw.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    normal = (cells - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    torch.testing.assert_close(encode(vae, images), normal)
