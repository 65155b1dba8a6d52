"""The condition of a network that inpaints holds all that is kept of an image, and nothing of what is masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from latentflow.autoencoder import encode, latent_mask, mask_channels, masked_condition, masked_latents

FACTOR, CHANNELS = 4, 3


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    widths, none = (6, 12, 12), ((),) * 3
    network = AutoencoderDC(
        latent_channels=CHANNELS, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1), encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none, scaling_factor=1.0,
    )  # fmt: skip
    network.register_to_config(latents_mean=[0.1, -0.2, 0.3], latents_std=[0.5, 1.5, 1.0])
    return network.eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def masks() -> Tensor:
    masks = torch.zeros(3, 1, 16, 24)
    masks[0, :, :, 5:7] = 1  # thin, within a column of cells
    masks[1] = 1
    return masks


def test_what_is_under_the_mask_never_matters(vae: AutoencoderDC, images: Tensor, masks: Tensor) -> None:
    other = torch.where(masks > 0, torch.rand(images.shape), images)
    for function in (masked_condition, masked_latents):
        assert torch.equal(function(vae, images, masks), function(vae, other, masks))
        moved = function(vae, images.roll(1, -1), masks)
        assert not torch.allclose(moved[0], function(vae, images, masks)[0], atol=1e-3)


def test_the_channels_are_the_kept_pixels_and_the_latent(
    vae: AutoencoderDC, images: Tensor, masks: Tensor
) -> None:
    channels = masked_condition(vae, images, masks)
    assert channels.shape == (3, mask_channels(vae), 4, 6)
    where, what = channels.split([FACTOR**2, CHANNELS], dim=1)
    assert torch.equal(F.pixel_shuffle(where, FACTOR), 1 - masks)  # not a pixel is lost
    torch.testing.assert_close(what[0], encode(vae, images * (1 - masks))[0])
    torch.testing.assert_close(what[2], encode(vae, images)[2])


def test_nothing_known_is_zero(vae: AutoencoderDC, images: Tensor, masks: Tensor) -> None:
    assert not masked_condition(vae, images, masks)[1].any()
    assert not masked_condition(vae, images, torch.ones_like(masks)).any()


def test_a_cell_is_repainted_if_any_pixel_is(masks: Tensor) -> None:
    cells = latent_mask(masks, FACTOR)
    expected = torch.zeros(4, 6)
    expected[:, 1] = 1
    assert torch.equal(cells[0, 0], expected)
    assert cells[1].all() and not cells[2].any()


def test_holes_are_filled_from_the_nearest_kept_pixel(
    vae: AutoencoderDC, images: Tensor, masks: Tensor
) -> None:
    found = masked_latents(vae, images, masks)
    filled = images[:1].clone()
    filled[..., 5], filled[..., 6] = images[0, :, :, 4], images[0, :, :, 7]
    torch.testing.assert_close(found[:1], encode(vae, filled))
    torch.testing.assert_close(found[1:2], encode(vae, torch.zeros(1, 3, 16, 24)))
    torch.testing.assert_close(found[2:], encode(vae, images[2:]))
