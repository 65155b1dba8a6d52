"""Our pipelines over pretrained models against the stock pipelines beside text-to-image: image-to-image, and DDIM."""

from __future__ import annotations

from copy import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from latentflow import LatentFlowImg2ImgPipeline, LatentFlowPipeline
from latentflow.families import FAMILIES, SIBLINGS
from latentflow.families.diffusion import DiffusionModel
from latentflow.flow import integrate

from .test_pretrained import PROMPTS, seeded
from .tiny import CONSISTENCY, TINY, checkpoint

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 5
#: stock image-to-image pipelines of our families; those of consistency models are in test_consistency.py
IMAGE_TO_IMAGE = [
    name
    for name in SIBLINGS
    if name.endswith("Img2ImgPipeline")
    and not ("PAG" in name or "Control" in name or SIBLINGS[name] in CONSISTENCY)
]


def with_scheduler(name: str, **config: Any) -> Any:
    """Return a stock pipeline whose diffusion scheduler has other settings."""
    pipe = copy(checkpoint(name))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config)
    return pipe


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_image_to_image(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours begins at t = 1 - strength, the stock pipeline at a step of its grid: at the time of that step they agree.

    The stock pipeline draws a sample of the autoencoder's posterior, ours takes its mean.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    base = SIBLINGS[name]
    diffusion = "beta_start" in TINY[base].scheduler
    text_to_image = with_scheduler(base, set_alpha_to_one=True) if diffusion else checkpoint(base)
    pipe = getattr(diffusers, name)(**text_to_image.components)
    pipe.set_progress_bar_config(disable=True)
    tiny, family = TINY[base], FAMILIES[base]
    side = 16 if base == "StableDiffusion3Pipeline" else tiny.side
    image = torch.rand(1, 3, side, side, generator=seeded(5))
    model: Any = family(text_to_image, **tiny.call)
    guided = {model.guidance_argument: 3.0}
    if base == "QwenImagePipeline":
        guided["negative_prompt"] = ""
    sized = {} if diffusion else {"height": side, "width": side}
    theirs = pipe(
        prompt=PROMPTS[0], image=image, strength=strength, num_inference_steps=STEPS, generator=seeded(),
        output_type="pt", **sized, **guided, **tiny.call,
    ).images  # fmt: skip

    times = model.time_grid(STEPS, side, side)
    first = int(max(STEPS - STEPS * strength, 0))
    ours = LatentFlowImg2ImgPipeline(model)(
        PROMPTS[0], image=image, strength=1.0 - float(times[first]), num_inference_steps=STEPS,
        generator=seeded(), output_type="pt", guidance_scale=3.0,
    ).images  # fmt: skip
    assert theirs.std() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


def ddim(pipe: Any, **call: Any) -> Tensor:
    latents: Tensor = pipe(
        PROMPTS[0], height=16, width=16, num_inference_steps=STEPS, generator=seeded(), eta=0.0,
        output_type="latent", **call,
    ).images  # fmt: skip
    return latents


SPACINGS = ("leading", "trailing", "linspace")
EPSILON = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "zero_snr"),
    [
        *((name, "epsilon", False) for name in EPSILON),
        *(("StableDiffusionPipeline", "v_prediction", zero_snr) for zero_snr in (False, True)),
    ],
)
def test_ddim(name: str, kind: str, zero_snr: bool, to_one: bool, spacing: str) -> None:
    """Euler's method to DDIM's last alpha is DDIM, and so is the pipeline's own scheduler at our pipeline.

    With timesteps of "linspace" DDIM steps to other times than it evaluates next, which no grid does.
    """
    pipe = with_scheduler(
        name, prediction_type=kind, set_alpha_to_one=to_one, timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    call = TINY[name].call
    model: Any = FAMILIES[name](pipe, **call)
    expected = ddim(pipe, **call)
    scale = float(expected.abs().max())
    if spacing != "linspace":
        times = model.time_grid(STEPS, 16, 16)
        if not to_one:
            times = torch.cat([times[:-1], model.time_of(torch.zeros(1))]).unique_consecutive()
        noise = model.begin(model.noise(1, 16, 16, seeded()), times)
        x1 = integrate(model.velocity(model.encode_prompt(PROMPTS[:1])), noise, times, "euler")
        assert isinstance(model, DiffusionModel)
        torch.testing.assert_close(x1 / model._norm(times[-1]), expected, rtol=0.0, atol=1e-5 * scale)
    own = LatentFlowPipeline(model)(
        PROMPTS[0], height=16, width=16, num_inference_steps=STEPS, generator=seeded(), solver="scheduler",
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(own, expected, rtol=0.0, atol=1e-5 * scale)


def test_image_to_image_is_tested_for_every_family_that_has_it() -> None:
    assert len(IMAGE_TO_IMAGE) == 8 and {SIBLINGS[name] for name in IMAGE_TO_IMAGE} <= TINY.keys()
