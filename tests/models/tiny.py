"""Tiny networks of every kind, with everything that a condition can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from latentflow.models import MODELS, Condition

SIZES: dict[str, dict[str, Any]] = {
    "dit": {"width": 16, "depth": 2, "heads": 2, "registers": 1},
    "unet": {"channels": (16, 32), "head_dim": 16, "layers_per_block": 1},
}
FULL = {"num_classes": 3, "text_dim": 6, "condition_channels": 2}


def build(name: str, *, perturbed: bool = True, seed: int = 0, **arguments: Any) -> Any:
    """A tiny network in evaluation mode; ``perturbed`` = none of its weights is zero any more."""
    torch.manual_seed(seed)
    model = MODELS[name](in_channels=4, **(SIZES[name] | arguments)).eval()
    if perturbed:
        perturb(model)
    return model


def save_dinov2(folder: Path, layers: int) -> Path:
    """Write a random vision model of transformers for images of 28 pixels in patches of 7, and return its folder."""
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        mlp_ratio=2,
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def latents(rows: int = 3, height: int = 6, width: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(seed))


def full_condition(rows: int = 3, height: int = 6, width: int = 4, seed: int = 2) -> Condition:
    """Every field set; texts of different lengths; nothing dropped."""
    g = torch.Generator().manual_seed(seed)
    return Condition(
        class_labels=torch.arange(rows) % 3,
        text=torch.randn(rows, 5, 6, generator=g),
        text_mask=torch.arange(5)[None] < torch.tensor([5, 2, 3, 1])[:rows, None],
        channels=torch.randn(rows, 2, height, width, generator=g),
        drop=torch.zeros(rows, dtype=torch.bool),
    )
