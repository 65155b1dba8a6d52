"""Decoding with another autoencoder than a model's own: previews, and whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from latentflow import LatentFlowPipeline, load_autoencoder
from latentflow.autoencoder import (
    check_latent_space,
    decode,
    decoded_by,
    encode,
    latent_channels,
    use_decoder,
)
from latentflow.autoencoder.latents import DECODERS
from latentflow.autoencoder.tiny import AutoencoderTinyGroupNorm
from latentflow.config import AdapterChoice, MemoryConfig
from latentflow.errors import UserError
from latentflow.inference.opening import open_pipeline

from ..families.test_pretrained import opened
from ..families.tiny import TINY, checkpoint
from .tiny import AUTOENCODERS

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "emoji-64"


def tiny(channels: int = 4, factor: int = 4, kind: Any = AutoencoderTiny) -> Any:
    """Return a random tiny autoencoder in the layout of the latents of another one."""
    levels = factor.bit_length()
    torch.manual_seed(1)
    ones, widths = (1,) * levels, (8,) * levels
    return kind(
        latent_channels=channels, num_encoder_blocks=ones, num_decoder_blocks=ones,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
    ).eval()  # fmt: skip


def stock(decoder: AutoencoderTiny, latents: Tensor) -> Tensor:
    return decoder.decode(latents, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [AutoencoderTiny, AutoencoderTinyGroupNorm])
@torch.no_grad()
def test_a_tiny_autoencoder_decodes_the_latents_that_the_flow_sees(kind: Any) -> None:
    """Shift and scale are not undone: TAESD was trained on latents after them."""
    vae, decoder = AUTOENCODERS["AutoencoderKL"][0]().eval(), tiny(kind=kind)
    latents = torch.randn(2, 4, 6, 5)
    own = decode(vae, latents)
    with decoded_by(vae, decoder):
        assert torch.equal(decode(vae, latents), stock(decoder, latents))
        assert torch.equal(encode(vae, own.clamp(-1, 1)), encode(vae, own.clamp(-1, 1)))
    assert torch.equal(decode(vae, latents), own)
    use_decoder(vae, decoder)
    with decoded_by(vae, vae):
        assert torch.equal(decode(vae, latents), own)
    assert torch.equal(decode(vae, latents), stock(decoder, latents))


@torch.no_grad()
def test_the_cells_of_flux2_are_taken_apart() -> None:
    vae, decoder = AUTOENCODERS["AutoencoderKLFlux2"][0]().eval(), tiny(4, 4, AutoencoderTinyGroupNorm)
    latents = torch.randn(2, 16, 3, 5)
    b, c, h, w = latents.shape
    # as FLUX.2's pipeline does
    cells = latents.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
    with decoded_by(vae, decoder):
        assert torch.equal(decode(vae, latents), stock(decoder, cells))


@torch.no_grad()
def test_another_full_autoencoder_undoes_its_own_scaling() -> None:
    """Two decoders of one latent space that write its scaling differently."""
    vae = AUTOENCODERS["AutoencoderKL"][0]().eval()
    other = AutoencoderKL.from_config({**vae.config, "scaling_factor": 1.0, "shift_factor": None}).eval()
    other.load_state_dict(vae.state_dict())
    other.register_to_config(latents_mean=[0.1] * 4, latents_std=[1 / 0.6] * 4)
    latents = torch.randn(1, 4, 4, 4)
    own = decode(vae, latents)
    with decoded_by(vae, other):
        torch.testing.assert_close(decode(vae, latents), own)


@pytest.mark.parametrize(("channels", "factor"), [(3, 4), (4, 2), (4, 8), (16, 4)])
def test_other_latents_are_refused(channels: int, factor: int) -> None:
    vae = AUTOENCODERS["AutoencoderKL"][0]()
    text = rf"{channels} channels and cells of {factor} x {factor} pixels.*4 channels and cells of 4 x 4"
    with pytest.raises(UserError, match=text), decoded_by(vae, tiny(channels, factor)):
        pass


def test_another_latent_space_of_the_same_layout_is_refused() -> None:
    vae, same, other = (load_autoencoder(SHIPPED) for _ in range(3))
    check_latent_space(vae, same)
    other.decoder.register_forward_pre_hook(lambda decoder, inputs: (inputs[0].roll(3, 1),))
    with pytest.raises(UserError, match=r"another latent space.* dB"):
        check_latent_space(vae, other)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("StableDiffusion3Pipeline", "Flux2KleinPipeline")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
        if name not in ("Ideogram4Pipeline", "GlmImagePipeline", "QwenImage21Pipeline", "BriaFibo2Pipeline")
    ],
)
@torch.no_grad()
def test_previews_in_a_callback(name: str) -> None:
    from latentflow.autoencoder import downscale_factor, latent_channels
    from latentflow.autoencoder.latents import _cells

    _, model, row = opened(name)
    pipe, cells = LatentFlowPipeline(model), _cells(model.vae)
    decoder = tiny(latent_channels(model.vae) // cells**2, downscale_factor(model.vae) // cells)
    pipe.set_progress_bar_config(disable=True)
    shown: list[tuple[Tensor, Tensor]] = []

    def preview(pipe: Any, i: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prediction = tensors["prediction"]
        shown.append((prediction, pipe.to_images(prediction, "pt", vae=decoder)))
        return {}

    call = {"prompt": "red apple"} if model.takes_text else {"class_labels": 1}
    call |= {"height": row.side, "width": row.side, "num_inference_steps": 2, "output_type": "pt"}
    seen = pipe(
        **call,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=preview,
        callback_on_step_end_tensor_inputs=["prediction"],
    ).images
    assert torch.equal(seen, pipe(**call, generator=torch.Generator().manual_seed(0)).images)
    for prediction, image in shown:
        assert image.shape == (1, 3, row.side, row.side)
        wanted = stock(decoder, torch.nn.functional.pixel_shuffle(prediction, cells)) / 2 + 0.5
        torch.testing.assert_close(image, wanted.clamp(0, 1))
    assert len(shown) == 2


def test_images_are_decoded_by_another_autoencoder(load_program: Any, tmp_path: Path) -> None:
    changed = load_autoencoder(SHIPPED)  # one that draws darker
    with torch.no_grad():
        changed.decoder.conv_out.bias -= 0.2
    changed.save_pretrained(tmp_path / "vae")
    line = ["red apple", "--checkpoint", str(SHIPPED), "--steps", "2", "-o"]
    load_program("generate").main([*line, str(tmp_path / "own.png")])
    load_program("generate").main([*line, str(tmp_path / "other.png"), "--vae", str(tmp_path / "vae")])
    own, other = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("own", "other"))
    inside = (own > 40) & (own < 250)
    assert np.abs((own - other)[inside].mean() - 25.5) < 2
    tiny(8, 8).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="8 channels and cells of 8 x 8 pixels"):
        load_program("generate").main([*line, str(tmp_path / "no.png"), "--vae", str(tmp_path / "tiny")])


def test_the_other_autoencoder_has_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint("StableDiffusion3Pipeline").save_pretrained(tmp_path / "sd3")
    vae = tiny(latent_channels(checkpoint("StableDiffusion3Pipeline").vae), 2)
    vae.save_pretrained(tmp_path / "tiny")
    for flag, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        pipe = open_pipeline(
            LatentFlowPipeline,
            str(tmp_path / "sd3"),
            "cpu",
            AdapterChoice(vae=str(tmp_path / "tiny")),
            MemoryConfig(dtype=flag),
        )
        assert DECODERS[pipe.vae].dtype == dtype
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe("red apple", num_inference_steps=1, height=16, width=16, output_type="pt").images
        assert drawn.shape == (1, 3, 16, 16) and torch.isfinite(drawn).all()


def test_another_autoencoder_that_is_missing_is_noticed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the checkpoint is loaded, which may take minutes."""
    monkeypatch.setattr(LatentFlowPipeline, "from_pretrained", Mock(side_effect=AssertionError("loaded")))
    with pytest.raises(UserError, match="no autoencoder at '/nowhere/taesd'"):
        open_pipeline(LatentFlowPipeline, None, "cpu", AdapterChoice(vae="/nowhere/taesd"))
