"""Input channels for masks in pretrained networks: the base to the last bit at first, then a wider first layer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentflow.autoencoder import masked_condition
from latentflow.errors import UserError
from latentflow.families import FAMILIES

from .tiny import TINY, checkpoint

NAMES = ("StableDiffusion3Pipeline", "FluxPipeline-dev")
pytestmark = pytest.mark.parametrize("name", NAMES)


def opened(name: str) -> Any:
    return FAMILIES[name.partition("-")[0]](deepcopy(checkpoint(name)), **TINY[name].call)


def half_hidden(side: int, count: int = 2) -> tuple[Tensor, Tensor]:
    """Random images (count, 3, side, side), and masks of their right halves."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    masks = torch.zeros(count, 1, side, side)
    masks[..., side // 2 :] = 1.0
    return images, masks


@torch.no_grad()
def test_the_base_to_the_last_bit_before_training(name: str) -> None:
    model, side = opened(name), TINY[name].side
    rows = model.encode_prompt(["a red apple", "a pear"])
    x = model.noise(2, side, side, torch.Generator().manual_seed(2))
    t = torch.tensor(0.4)
    before = model.velocity(rows, 2.0)(x, t)
    assert not model.takes_masks
    model.add_mask_input()
    assert model.takes_masks
    known = rows.with_known(*half_hidden(side))
    assert torch.equal(model.velocity(rows, 2.0)(x, t), before)
    assert torch.equal(model.velocity(known, 2.0)(x, t), before)
    nn.init.normal_(model.mask_input.weight, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.velocity(rows, 2.0)(x, t), before)  # nothing is known
    assert not torch.allclose(model.velocity(known, 2.0)(x, t), before, atol=1e-3)
    model.remove_mask_input()
    assert torch.equal(model.velocity(rows, 2.0)(x, t), before)
    assert not model.takes_masks and not [key for key in model.network.state_dict() if "mask" in key]


@torch.no_grad()
def test_equals_a_network_with_a_wider_first_layer(name: str) -> None:
    """diffusers' own network with as many input channels, the two weights side by side in its first layer."""
    model, side = opened(name), TINY[name].side
    model.add_mask_input()
    nn.init.normal_(model.mask_input.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    rows = model.encode_prompt(["a red apple", "a pear"]).with_known(*half_hidden(side))
    x = model.noise(2, side, side, torch.Generator().manual_seed(2))
    ours = model.velocity(rows, 1.0)(x, torch.tensor(0.4))

    weight, network = model.mask_input.weight.clone(), model.network
    first = f"{model.first_layer}.weight"
    model.remove_mask_input()
    state = network.state_dict()
    state[first] = torch.cat([state[first], weight], 1)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    channels = config["in_channels"]
    cells = weight.shape[1] * channels // (state[first].shape[1] - weight.shape[1])
    out = config.get("out_channels") or channels
    wide = type(network)(**{**config, "in_channels": channels + cells, "out_channels": out}).eval()
    wide.load_state_dict(state)
    model.pipeline.transformer = wide
    torch.testing.assert_close(model.velocity(rows, 1.0)(x, torch.tensor(0.4)), ours)


@torch.no_grad()
def test_what_is_known_is_that_of_networks_of_our_own(name: str) -> None:
    model, side = opened(name), TINY[name].side
    model.add_mask_input()
    images, masks = half_hidden(side)
    masks[1] = 1.0  # nothing is known
    rows = model.encode_prompt(["a red apple", "a pear"]).with_known(images, masks)
    torch.testing.assert_close(rows.kept["channels"], masked_condition(model.vae, images, masks))
    assert not rows.kept["channels"][1].any()
    channels = model.latent_shape(side, side)[0]
    assert torch.equal(model.known_latents(rows), rows.kept["channels"][:, -channels:])


def test_refusals(name: str) -> None:
    model, side = opened(name), TINY[name].side
    images, masks = half_hidden(side)
    rows = model.encode_prompt(["a red apple"])
    with pytest.raises(UserError, match="not trained with masks"):
        rows.with_known(images[:1], masks[:1])
    with pytest.raises(UserError, match="shape"):
        model.add_mask_input(torch.zeros(3, 5))
    assert not model.takes_masks
    model.add_mask_input()
    with pytest.raises(UserError, match="already"):
        model.add_mask_input()
    with pytest.raises(UserError, match="masks have shape"):
        rows.with_known(images[:1], masks)
