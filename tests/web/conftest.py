"""A tiny caption checkpoint for the web page's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def formats_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server gives up all but a few formats, for as long as its process lives."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))


@pytest.fixture(scope="session")
def caption_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pixels, factor 2, a real network with random weights."""
    # Not above: the browser's test does without them.
    import torch
    from diffusers import AutoencoderKL

    from latentflow import LatentFlowPipeline
    from latentflow.models import DiT, small_text_encoder, train_tokenizer

    torch.manual_seed(0)
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
    network = DiT(in_channels=2, width=16, depth=1, heads=2, sample_size=4, text_dim=16)
    for parameter in network.parameters():  # the output layers of a fresh one are zero
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = train_tokenizer(["a red apple", "a small blue hat", "green tree"])
    text_encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2)
    folder = tmp_path_factory.mktemp("captions") / "pipeline"
    LatentFlowPipeline(vae, network, text_encoder=text_encoder, tokenizer=tokenizer).save_pretrained(folder)
    return folder
