"""Scaling of every kind of checkpoint, statistics, and loading."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file

from latentflow import load_autoencoder
from latentflow.autoencoder import (
    decode,
    denormalise,
    downscale_factor,
    encode,
    latent_channels,
    measure_statistics,
    normalise,
    posterior,
)
from latentflow.errors import UserError


def _small(kind: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return kind(latent_channels=4, **config).eval()


def kl(**config: Any) -> AutoencoderKL:
    return _small(AutoencoderKL, **CONVOLUTIONS, **config)


def dc(**config: Any) -> AutoencoderDC:
    layers = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (
            ("block_out_channels", (8, 8)), ("layers_per_block", (0, 1)), ("qkv_multiscales", ((), ())),
        )
    }  # fmt: skip
    return _small(AutoencoderDC, **layers, **config)


def tiny() -> AutoencoderTiny:
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return _small(AutoencoderTiny, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks)


def vq() -> VQModel:
    return _small(VQModel, num_vq_embeddings=16, **CONVOLUTIONS)


CONVOLUTIONS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
KINDS = {"kl": kl, "dc": dc, "tiny": tiny, "vq": vq}
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_class_loads_encodes_decodes_and_keeps_its_measured_statistics(
    kind: str, tmp_path: Path
) -> None:
    vae = KINDS[kind]()
    measure_statistics(vae, IMAGES.split(4))
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(vae) and not loaded.training
    assert latent_channels(loaded) == 4 and downscale_factor(loaded) == 2
    latents = encode(loaded, IMAGES)
    assert latents.shape == (6, 4, 8, 8)
    assert torch.equal(latents, encode(vae, IMAGES))
    # The statistics are those of samples of the posterior: its means vary, and each has a variance of its own.
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    variance, (_, std) = latents.var((0, 2, 3), correction=0), posterior(vae, IMAGES)
    if std is not None:
        variance += (std / torch.tensor(loaded.config.latents_std).view(-1, 1, 1)).square().mean((0, 2, 3))
        assert latents.var() < 0.9
    torch.testing.assert_close(variance, torch.ones(4), rtol=0, atol=2e-3)
    raw = posterior(loaded, IMAGES)[0]
    torch.testing.assert_close(denormalise(loaded, normalise(loaded, raw)), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode(loaded, latents), loaded.decode(raw).sample, rtol=1e-3, atol=1e-4)


def test_loading_our_statistics_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = dc()
    measure_statistics(vae, [IMAGES])
    vae.save_pretrained(tmp_path)
    logging.getLogger("diffusers").propagate = True
    loaded = load_autoencoder(tmp_path)
    assert loaded.config.latents_mean == vae.config.latents_mean
    assert "latents_mean" not in caplog.text


@torch.no_grad()
def test_a_scaling_factor_alone_and_a_shift_are_understood() -> None:
    raw = posterior(kl(), IMAGES)[0]
    torch.testing.assert_close(encode(kl(scaling_factor=0.5), IMAGES), raw * 0.5)
    torch.testing.assert_close(encode(kl(scaling_factor=0.5, shift_factor=0.25), IMAGES), (raw - 0.25) * 0.5)
    mean, std = (1.0, 2.0, 3.0, 4.0), (2.0, 2.0, 4.0, 4.0)
    both = kl(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    expected = (raw - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(encode(both, IMAGES), expected)


@torch.no_grad()
def test_a_generator_samples_the_posterior_row_by_row() -> None:
    vae = kl(scaling_factor=1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    together = encode(vae, IMAGES, generator=generators)
    alone = encode(vae, IMAGES[2:3], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)
    mean, std = posterior(vae, IMAGES)
    assert std is not None
    noise = (together - mean) / std
    assert 0.9 < float(noise.std()) < 1.1 and abs(float(noise.mean())) < 0.1  # 1,536 normal numbers
    assert torch.equal(encode(vae, IMAGES), mean)


def test_statistics_refuse_nothing_and_nan() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        measure_statistics(kl(), [])
    with pytest.raises(ValueError, match="not finite"):
        measure_statistics(kl(), [IMAGES * float("nan")])


def test_a_pipeline_folder_gives_its_vae(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path / "vae")
    assert isinstance(load_autoencoder(tmp_path), AutoencoderKL)


def test_float16_weights_that_would_overflow_are_widened(tmp_path: Path) -> None:
    kl(force_upcast=True).half().save_pretrained(tmp_path / "a", variant="fp16")
    assert load_autoencoder(tmp_path / "a", variant="fp16", torch_dtype=torch.float16).dtype == torch.float32
    kl(force_upcast=False).half().save_pretrained(tmp_path / "b", variant="fp16")
    assert load_autoencoder(tmp_path / "b", variant="fp16", torch_dtype=torch.float16).dtype == torch.float16


def test_names_of_years_ago_are_read(tmp_path: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(encode(load_autoencoder(tmp_path), IMAGES), encode(vae, IMAGES))


def test_what_is_no_autoencoder_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no autoencoder at"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="UNet2DModel, which is not an autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=r"the autoencoder in .* has no file of weights"):
        load_autoencoder(tmp_path)
