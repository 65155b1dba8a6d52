"""Large images in tiles: what diffusers' code for it can do is found out before, and the rest is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from latentflow.autoencoder import decode, downscale_factor, encode, use_tiles
from latentflow.config import MemoryConfig
from latentflow.errors import UserError
from latentflow.inference.memory import place

pytestmark = pytest.mark.usefixtures("no_grad")


def plain(size: int = 32) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=size,
    ).eval()  # fmt: skip


def tiny(levels: int) -> Any:
    torch.manual_seed(0)
    ones, widths = (1,) * levels, (4,) * levels
    return diffusers.AutoencoderTiny(
        num_encoder_blocks=ones, num_decoder_blocks=ones, encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
    ).eval()  # fmt: skip


def hunyuan() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("vae", "tile"), [(plain(), 32), (tiny(4), 512)])
def test_several_tiles(vae: Any, tile: int) -> None:
    """They are used, for images larger than one, and for those alone."""
    side, factor = tile * 3 // 2, downscale_factor(vae)
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    latents = encode(vae, images)
    decoded, small = decode(vae, latents), decode(vae, latents[..., :8, :8])
    use_tiles(vae)
    in_tiles = encode(vae, images)
    assert in_tiles.shape == latents.shape == (1, 4, side // factor, side // factor)
    assert not torch.equal(in_tiles, latents) and torch.isfinite(in_tiles).all()
    again = decode(vae, latents)
    assert again.shape == decoded.shape and not torch.equal(again, decoded)
    assert (again - decoded).abs().mean() < 0.5 * decoded.std()  # two unrelated images: 1.1
    assert torch.equal(decode(vae, latents[..., :8, :8]), small)


@pytest.mark.parametrize(("vae", "fails"), [(hunyuan(), "encode"), (tiny(2), "decode"), (tiny(3), "decode")])
def test_tiles_that_fail_are_refused(vae: Any, fails: str) -> None:
    """What is refused does fail in diffusers: where it no longer does, this test is out of date."""
    with pytest.raises(UserError, match=rf"\({type(vae).__name__}\) cannot {fails} in tiles"):
        use_tiles(vae)
    assert not vae.use_tiling
    vae.enable_tiling()
    factor, side = downscale_factor(vae), vae.tile_sample_min_size * 3 // 2
    with pytest.raises((ValueError, RuntimeError)):
        if fails == "encode":
            vae.encode(torch.zeros(1, 3, side, side))
        else:
            vae.decode(torch.zeros(1, 4, side // factor, side // factor))


def test_one_that_only_decodes_need_not_encode_in_tiles() -> None:
    vae = hunyuan()
    use_tiles(vae, encodes=False)
    assert decode(vae, torch.zeros(1, 4, 12, 12)).shape == (1, 3, 24, 24)


def test_an_autoencoder_without_tiles_is_refused() -> None:
    vae = diffusers.AsymmetricAutoencoderKL()
    pipe = diffusers.DiffusionPipeline()
    pipe.vae = vae
    with pytest.raises(UserError, match=r"the autoencoder \(AsymmetricAutoencoderKL\) has no tiles"):
        place(pipe, "cpu", MemoryConfig(vae_tiling=True))
