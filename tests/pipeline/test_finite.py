"""What is not finite never becomes an image: it is made again in float32 where that helps, and refused elsewhere."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentflow.autoencoder import decode, encode
from latentflow.errors import UserError
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline
from latentflow.pipeline.inpaint_batch import composite

from .conftest import NAMES, GaussianFlow, quiet, tiny_vae

IMAGE = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(4)).float() / 255.0
HOLE = torch.zeros(1, 1, 8, 8)
HOLE[:, :, 2:6, 2:5] = 1.0
KINDS = {
    "generate": LatentFlowPipeline,
    "image-to-image": LatentFlowImg2ImgPipeline,
    "inpaint": LatentFlowInpaintPipeline,
    "edit": LatentFlowEditPipeline,
}


def vae_that_overflows_in_float16() -> Any:
    """Its first layers multiply by 200,000, which the normalisation behind them takes away again."""
    vae = tiny_vae(force_upcast=False)  # else it would be in float32 from the start
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            half.conv_in.weight.mul_(2e5)
    return vae.half()


def pipeline(way: str, vae: Any) -> Any:
    network = GaussianFlow(num_classes=3, condition_channels=6)
    return quiet(KINDS[way](vae, network, id2label=NAMES))


def drawn(way: str, vae: Any) -> Tensor:
    """(1, 3, 8, 8): a hat, drawn or put into the image."""
    call = {"class_labels": 1, "num_inference_steps": 2, "output_type": "pt"}
    call["generator"] = torch.Generator().manual_seed(0)
    if way != "generate":
        call["image"] = IMAGE
    if way == "inpaint":
        call["mask_image"] = HOLE
    images: Tensor = pipeline(way, vae)(**call).images
    return images


@pytest.mark.parametrize("way", KINDS)
def test_an_autoencoder_that_overflows_in_float16_is_used_in_float32_and_that_is_said(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae = vae_that_overflows_in_float16()
    with torch.no_grad():
        raw = vae.decode(torch.ones(1, 2, 4, 4).half()).sample
    assert raw.isnan().all()  # else the test would show nothing
    with caplog.at_level(logging.WARNING):
        images = drawn(way, vae)
        again = drawn(way, vae)
    assert vae.dtype == torch.float16
    assert [record.message[:38] for record in caplog.records] == ["the autoencoder overflows in float16: "]
    assert torch.equal(images, again)
    expected = drawn(way, vae_that_overflows_in_float16().float())
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    assert images.std() > 0.01
    if way == "inpaint":
        assert torch.equal(images * (1 - HOLE), IMAGE * (1 - HOLE))


@torch.no_grad()
def test_only_the_rows_that_overflow_are_made_again() -> None:
    """What stands beside an image in the batch changes nothing of it."""
    vae = tiny_vae(latents_mean=None, latents_std=None).half()
    vae.decoder.conv_in.weight.mul_(100.0)
    vae.encoder.conv_in.weight.mul_(100.0)
    latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    latents[2] *= 3000.0
    images = decode(vae, latents)
    assert images.isfinite().all()
    assert torch.equal(images[[0, 1, 3]], decode(vae, latents[[0, 1, 3]]))
    torch.testing.assert_close(
        images[2:3], decode(vae.float(), latents[2:3].half().float()), rtol=1e-3, atol=1e-3
    )
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    pixels[1] *= 2000.0
    vae.half()
    encoded = encode(vae, pixels)
    assert encoded.isfinite().all()
    assert torch.equal(encoded[[0, 2]], encode(vae, pixels[[0, 2]]))
    torch.testing.assert_close(
        encoded[1:2], encode(vae.float(), pixels[1:2].half().float()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_an_autoencoder_that_is_damaged_is_refused(way: str, bad: float) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(bad)
    with pytest.raises(
        UserError, match="1 of 1 images of the autoencoder is not finite, in float32 too"
    ) as caught:
        drawn(way, vae)
    assert ("its weight decoder.conv_out.weight is not" in caught.value.what) == (bad != bad)


@pytest.mark.parametrize("way", ["image-to-image", "inpaint", "edit"])
def test_so_is_one_that_cannot_encode(way: str) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_out.bias.fill_(float("inf"))
    named = r"1 of 1 latents of the autoencoder is not .*: its weight encoder\.conv_out\.bias is not"
    with pytest.raises(UserError, match=named):
        drawn(way, vae)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("way", [*KINDS, "scheduler"])
def test_a_damaged_network_is_named_with_the_step(way: str, output_type: str) -> None:
    pipe = pipeline("generate" if way == "scheduler" else way, tiny_vae())
    if way == "scheduler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with torch.no_grad():
        pipe.transformer.means[1] = float("nan")
    call = {"image": IMAGE} if way not in ("generate", "scheduler") else {}
    if way == "inpaint":
        call |= {"mask_image": HOLE}
    with pytest.raises(
        UserError, match=r"velocity at t = 0(\.\d+)? in step 1 of \d is not finite: \d+ of 32"
    ):
        pipe(class_labels=1, num_inference_steps=2, output_type=output_type, **call)


def test_a_scheduler_that_leaves_the_finite_is_named(class_pipe: LatentFlowPipeline) -> None:
    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler()

    def step(*_: Any, **__: Any) -> tuple[Tensor]:
        return (torch.full((1, 2, 4, 4), torch.inf),)

    class_pipe.scheduler.step = step
    with pytest.raises(UserError, match=r"x in step 1 of 2 of the scheduler FlowMatchEuler.* is not finite"):
        class_pipe(class_labels=0, num_inference_steps=2, output_type="latent")


def test_a_text_encoder_that_overflows_is_named(text_pipe: LatentFlowPipeline) -> None:
    with torch.no_grad():
        text_pipe.text_encoder.encoder.final_layer_norm.weight.fill_(torch.inf)
    for call in ({"prompt": "a red apple"}, {"prompt": "", "negative_prompt": "a red apple"}):
        with pytest.raises(UserError, match=r"what the text encoder makes of the prompts is not finite"):
            text_pipe(**call, num_inference_steps=1)


def test_latents_that_are_not_finite_are_not_blamed_on_the_autoencoder(
    class_pipe: LatentFlowPipeline,
) -> None:
    latents = torch.zeros(1, 2, 4, 4)
    latents[0, 1, 2, 3] = torch.nan
    for output_type in ("pil", "np", "pt"):
        with pytest.raises(UserError, match="latents is not finite: 1 of 32"):
            class_pipe.to_images(latents, output_type)


def test_latents_become_images_of_a_known_kind_only(class_pipe: LatentFlowPipeline) -> None:
    with pytest.raises(UserError, match="unknown output_type 'jpeg'"):
        class_pipe.to_images(torch.zeros(1, 2, 4, 4), "jpeg")


def test_a_composite_selects_and_blends_only_between() -> None:
    drawn = torch.full((1, 3, 1, 3), torch.nan)
    image = torch.tensor([0.25, 0.5, 0.75]).expand(1, 3, 1, 3)
    mask = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 1, 3)
    assert torch.equal(composite(mask, drawn, image)[..., 0], image[..., 0])
    blended = composite(mask, torch.full_like(image, 1.0), image)
    assert blended[0, 0, 0].tolist() == [0.25, 0.75, 1.0]
    assert torch.equal(composite(mask, image, torch.full_like(image, torch.nan))[..., 2], image[..., 2])
