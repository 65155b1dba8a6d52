"""Layers with an adapter by default: those of attention and of feed-forward networks, in every pretrained network."""

from __future__ import annotations

import re

import pytest
from torch import nn

from latentflow.config import AdapterConfig
from latentflow.errors import UserError
from latentflow.training.fine_tune.adapters import chosen_layers

from .test_pretrained import each_family, opened

#: what is left out within blocks: norms and what modulates them, gates and routers, routed experts, other inputs
LEFT_OUT = re.compile(
    r"norm|modulation|_mod\.|adaLN|adaln|img_mlp\.gate$|ff_i\.experts|time_emb_proj|encoder_proj|embed|projector|"
    r"projection|final|all_x|linear_\d$|layers\.\d+\.linear"
)


@each_family
def test_the_default_layers(name: str) -> None:
    network = opened(name)[1].network
    chosen = chosen_layers(network, AdapterConfig().lora_layers)
    assert chosen and all(re.search(r"\.\d+\.", layer) for layer in chosen)
    blocks = re.compile(r"(blocks|layers|refiner|attentions)\.\d+\.")
    rest = [
        layer
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear) and blocks.search(layer) and layer not in chosen
    ]
    assert not [layer for layer in rest if not LEFT_OUT.search(layer)]


def test_a_group_that_is_asked_for_must_be_there() -> None:
    network = opened("SanaPipeline")[1].network
    assert chosen_layers(network, AdapterConfig().lora_layers)
    with pytest.raises(UserError, match="--lora-layers feed-forward: SanaTransformer2DModel has no such"):
        chosen_layers(network, ["feed-forward"])
