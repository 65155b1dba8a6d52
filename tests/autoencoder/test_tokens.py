"""Autoencoders with a codebook as tokenizers: round trips, diffusers' own decoding, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor, nn

from latentflow.autoencoder import (
    codebook,
    codebook_use,
    count_tokens,
    decode,
    detokenize,
    downscale_factor,
    encode,
    latent_channels,
    load_autoencoder,
    measure_statistics,
    tokenize,
)
from latentflow.autoencoder.build import grid
from latentflow.errors import UserError
from latentflow.flow.discrete import Codebook

from .tiny import AUTOENCODERS

CONVOLUTIONS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 32), "norm_num_groups": 4, "num_vq_embeddings": 64,
}  # fmt: skip
#: pretrained tokenizers -> what their configs differ in
KINDS: dict[str, dict[str, Any]] = {
    "LDM": {"latent_channels": 3},
    "aMUSEd": {"latent_channels": 6, "lookup_from_codebook": True, "force_upcast": True},
    "Kandinsky 2": {"latent_channels": 4, "vq_embed_dim": 4, "norm_type": "spatial"},
    "narrow codes": {"latent_channels": 6, "vq_embed_dim": 2},
}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vq(kind: str = "LDM") -> VQModel:
    torch.manual_seed(0)
    vae = VQModel(**CONVOLUTIONS, **KINDS[kind]).eval().requires_grad_(False)
    vae.quantize.embedding.weight.normal_()
    return vae


class _Decoded(nn.Module):
    def forward(self, latents: Tensor, _: object) -> Tensor:
        return latents


def transparent(codes: Tensor) -> VQModel:
    """A tokenizer whose latents are the pixels of its images."""
    vae = VQModel(
        num_vq_embeddings=len(codes), norm_num_groups=4, block_out_channels=(8,), scaling_factor=1.0
    )
    vae.encoder, vae.quant_conv, vae.post_quant_conv = nn.Identity(), nn.Identity(), nn.Identity()
    vae.decoder = _Decoded()
    vae.quantize.embedding.weight = nn.Parameter(codes, requires_grad=False)
    return vae


# ---- closed forms ----


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 4, 2)])
def test_the_nearest_code_of_the_grid_is_the_rounded_clamped_latent(levels: tuple[int, ...]) -> None:
    latents = torch.randn(500, len(levels), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor(levels)
    rounded = ((latents.clamp(-1, 1) + 1) / 2 * (counts - 1)).round().long()
    places = torch.tensor([1, *levels[:-1]]).cumprod(0)
    codes = grid(levels)
    assert codes.shape == (math.prod(levels), len(levels)) and codes.abs().max() == 1
    assert torch.equal(Codebook(codes).nearest(latents), (rounded * places).sum(1))


@pytest.mark.parametrize("codes", [grid((5, 4, 3)), torch.randn(1000, 3)], ids=["fsq", "vq"])
def test_tokens_of_the_images_of_tokens_are_those_tokens(codes: Tensor) -> None:
    vae = transparent(codes)
    tokens = torch.randint(len(codes), (2, 4, 5))
    images = detokenize(vae, tokens)
    assert images.shape == (2, 3, 4, 5) and torch.equal(images.movedim(1, -1), codes[tokens])
    assert torch.equal(tokenize(vae, images), tokens)


def test_perplexity_counts_codes_used_alike() -> None:
    def use(counts: list[int], least: float = 0.0) -> tuple[float, float]:
        found = codebook_use(torch.tensor(counts), least)
        return float(found["codebook_used"]), float(found["perplexity"])

    assert use([3] * 8) == (1.0, pytest.approx(8.0))
    assert use([5, 0, 0, 0]) == (0.25, 1.0)
    assert use([4, 4, 0, 0]) == (0.5, pytest.approx(2.0))
    assert use([2, 1, 1]) == (1.0, pytest.approx(2**1.5))
    assert use([0, 0]) == (0.0, 1.0)
    assert use([96, 2, 1, 1], 0.05)[0] == 0.5  # 0.05 of an even share is 1.25
    assert count_tokens(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [1, 0, 3, 0]


# ---- pretrained ones ----


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_decode_as_diffusers_decodes_the_image(kind: str) -> None:
    vae = vq(kind)
    tokens, codes = tokenize(vae, IMAGES), codebook(vae)
    assert tokens.shape == (2, 8, 8) and tokens.dtype == torch.int64 and tokens.unique().numel() > 1
    assert (
        (latent_channels(vae), downscale_factor(vae))
        == (codes.shape[1], 2)
        == (encode(vae, IMAGES).shape[1], 2)
    )
    latents = vae.encode(IMAGES).latents
    assert torch.equal(tokens.flatten(), vae.quantize(latents)[2][2])
    torch.testing.assert_close(detokenize(vae, tokens), vae.decode(latents).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measured", [False, True])
def test_the_codebook_is_in_the_space_of_latents(measured: bool) -> None:
    vae = vq("narrow codes")
    if measured:
        measure_statistics(vae, [IMAGES])
    tokens, codes = tokenize(vae, IMAGES), Codebook(codebook(vae))
    assert (
        torch.equal(codes.nearest(encode(vae, IMAGES)), tokens) or measured
    )  # scaling alone keeps the nearest
    torch.testing.assert_close(
        decode(vae, codes.embed(tokens)), detokenize(vae, tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("part", ["", "vae", "vqvae", "movq"])
def test_folders_open_alone_and_within_pipelines(part: str, tmp_path: Path) -> None:
    vae = vq()
    vae.save_pretrained(tmp_path / part)
    assert torch.equal(tokenize(load_autoencoder(tmp_path), IMAGES), tokenize(vae, IMAGES))


# ---- what is refused ----


def test_another_codebook_than_the_config_says_is_refused(tmp_path: Path) -> None:
    vq().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_vq_embeddings": 65}))
    with pytest.raises(UserError, match=r"embedding\.weight is 64x3, not 65x3"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4, 4), 64), "token 64 of a codebook with 64 codes .* is the mask"),
        (torch.full((1, 4, 4), 70), "token 70 .* another tokenizer"),
        (torch.full((1, 4, 4), -1), "token -1 "),
        (torch.zeros(1, 4, 4), "type float32"),
        (torch.zeros(4, 4, dtype=torch.long), r"shape \(4, 4\)"),
    ],
)
def test_what_are_no_tokens_is_refused(tokens: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        detokenize(vq(), tokens)


def test_a_codebook_that_is_missing_or_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)AutoencoderKL has no codebook.*--autoencoder-class vq"):
        codebook(AUTOENCODERS["AutoencoderKL"][0]())
    vae = vq()
    vae.quantize.embedding = nn.Embedding(64, 5)
    with pytest.raises(UserError, match="codebook has 5 channels, the autoencoder's latents have 3"):
        tokenize(vae, IMAGES)
    vae = vq()
    vae.quantize.embedding.weight[3, 1] = math.nan
    with pytest.raises(UserError, match="not all finite"):
        codebook(vae)
