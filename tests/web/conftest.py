"""Tiny checkpoints for the web page's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def formats_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server gives up all but a few formats and sizes, for as long as its process lives."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.fixture(scope="session")
def caption_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pixels, factor 2, a real network with random weights."""
    # Not above: the browser's test does without them.
    import torch

    from latentflow.models import small_text_encoder, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red apple", "a small blue hat", "green tree"])
    text_encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2)
    folder = tmp_path_factory.mktemp("captions") / "pipeline"
    pipeline({"text_dim": 16}, text_encoder=text_encoder, tokenizer=tokenizer).save_pretrained(folder)
    return folder


#: A class whose name would be a program in the page.
MARKUP = "</script><script>alert(1)</script>"


@pytest.fixture(scope="session")
def class_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``caption_checkpoint``, of two classes."""
    folder = tmp_path_factory.mktemp("classes") / "pipeline"
    pipeline({"num_classes": 2}, id2label={0: "hat", 1: MARKUP}).save_pretrained(folder)
    return folder


def pipeline(network: dict[str, int], **more: Any) -> Any:
    """A tiny pipeline with random weights."""
    import torch
    from diffusers import AutoencoderKL

    from latentflow import LatentFlowPipeline
    from latentflow.models import DiT

    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
        latents_mean=[0.0, 0.0],
        latents_std=[1.0, 1.0],
        scaling_factor=1.0,
    )
    transformer = DiT(in_channels=2, width=16, depth=1, heads=2, sample_size=4, **network)
    for parameter in transformer.parameters():  # the output layers of a fresh one are zero
        torch.nn.init.normal_(parameter, std=0.2)
    return LatentFlowPipeline(vae, transformer, **more)
