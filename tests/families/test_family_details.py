"""What single families do that no other does, beside the tests that all of them share."""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow import LatentFlowEditPipeline
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.flow import integrate

from .tiny import TINY, checkpoint


def opened(name: str, **options: Any) -> Any:
    return FAMILIES[name.partition("-")[0]](checkpoint(name), **{**TINY[name].call, **options})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def counted(model: Any, network: str, function: Any) -> int:
    """Return how often a network of the pipeline is evaluated while ``function`` runs."""
    calls: list[int] = []
    hook = getattr(model.pipeline, network).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        function()
    hook.remove()
    return len(calls)


@torch.no_grad()
def test_ideogram_s_latents_are_flux_2_s_in_another_order() -> None:
    """The statistics of the batch norm belong to places, whichever channel has them."""
    model = opened("Ideogram4Pipeline")
    images = torch.rand(1, 3, 16, 16, generator=seeded()) * 2 - 1
    raw = F.pixel_unshuffle(model.vae.encode(images).latent_dist.mode(), 2)
    ordered = raw.view(1, 4, 2, 2, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(1, 16, 4, 4)
    norm = model.vae.bn
    mean, variance = (part.view(1, -1, 1, 1) for part in (norm.running_mean, norm.running_var))
    expected = (ordered - mean) / (variance + model.vae.config.batch_norm_eps).sqrt()
    torch.testing.assert_close(model.encode(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stable_diffusion_reads_an_earlier_layer_of_its_text_encoder() -> None:
    """clip_skip, on which stock diffusers 0.42 fails with transformers 5: the last norm of the layer before."""
    model = opened("StableDiffusionPipeline", clip_skip=1)
    encoder, tokenizer = model.pipeline.text_encoder, model.pipeline.tokenizer
    ids = tokenizer(["a red apple"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    layers = encoder(ids, output_hidden_states=True).hidden_states
    expected = getattr(encoder, "text_model", encoder).final_layer_norm(layers[-2])
    embeds = model.encode_prompt(["a red apple"]).values["embeds"]
    torch.testing.assert_close(embeds, expected)
    assert not torch.allclose(
        embeds, opened("StableDiffusionPipeline").encode_prompt(["a red apple"]).values["embeds"]
    )


def test_ideogram_guides_by_its_schedule_on_any_number_of_steps() -> None:
    model = opened("Ideogram4Pipeline", guidance_schedule=(7.0, 7.0, 7.0, 1.0))
    rows = model.encode_prompt(["a red apple"])
    times = model.time_grid(8, 16, 16)
    noise = model.noise(1, 16, 16, seeded())
    velocity = model.velocity(rows, times=times)
    assert counted(model, "transformer", lambda: integrate(velocity, noise, times, "euler")) == 8
    guided = counted(model, "unconditional_transformer", lambda: integrate(velocity, noise, times, "euler"))
    assert guided == 6  # the last quarter is not guided
    assert model.usual_guidance == 7.0


@torch.no_grad()
def test_qwen_image_2_1_draws_opaque_images() -> None:
    """Its autoencoder takes and makes a channel for transparency, which is 1 and left out."""
    pipe = checkpoint("QwenImage21Pipeline")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage21.from_config(
        {**pipe.vae.config, "in_channels": 4, "out_channels": 4}
    ).eval()
    model = FAMILIES["QwenImage21Pipeline"](type(pipe)(**{**pipe.components, "vae": vae}))
    images = torch.rand(1, 3, 8, 8, generator=seeded()) * 2 - 1
    opaque = torch.cat([images, torch.ones(1, 1, 8, 8)], dim=1)
    raw = vae.encode(opaque.unsqueeze(2)).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = model.encode(images)
    torch.testing.assert_close(latents, (raw.squeeze(2) - mean) / std)
    decoded = model.decode(latents)
    assert decoded.shape == (1, 3, 8, 8)
    torch.testing.assert_close(decoded, vae.decode(raw, return_dict=False)[0][:, :3, 0])


@torch.no_grad()
def test_fibo_2_reads_captions_in_json() -> None:
    """Spaces and empty entries of a caption say nothing; its other entries do."""
    model = opened("BriaFibo2Pipeline")

    def embeds(text: str) -> Tensor:
        return model.encode_prompt([text]).values["embeds"]

    caption = {"short_description": "a red apple", "objects": [], "lighting": {}}
    short = embeds(json.dumps({"short_description": "a red apple"}))
    assert torch.equal(embeds(json.dumps(caption, indent=4)), short)
    other = embeds(json.dumps({"short_description": "a green tree"}))
    assert other.shape == short.shape and not torch.equal(other, short)


@torch.no_grad()
def test_glm_image_plans_an_image_of_one_size() -> None:
    model = opened("GlmImagePipeline")
    t = torch.tensor(0.5)
    small, wide = model.noise(1, 16, 16, seeded()), model.noise(1, 16, 32, seeded())
    velocity = model.velocity(model.encode_prompt(["a hat"]))
    assert velocity(small, t).shape == small.shape
    with pytest.raises(UserError, match="another size"):
        velocity(wide, t)
    assert model.velocity(model.encode_prompt(["a hat"], height=16, width=32))(wide, t).shape == wide.shape
    assert model.velocity(model.null(1), 1.0)(wide, t).shape == wide.shape


@torch.no_grad()
def test_hunyuan_image_reads_quoted_text_with_its_second_encoder() -> None:
    rows = opened("HunyuanImagePipeline").encode_prompt(['a hat of "red sun"', "a hat"])
    mask = rows.values["glyph_mask"]
    assert isinstance(mask, Tensor) and mask[0].any() and not mask[1].any()


@torch.no_grad()
def test_distilled_hunyuan_image_predicts_averages_to_the_end_of_the_step() -> None:
    model = opened("HunyuanImagePipeline-distilled")
    rows, x, t = model.encode_prompt(["a hat"]), model.noise(1, 16, 16, seeded()), torch.tensor(0.2)
    now = model.velocity(rows)(x, t)
    to = [model.velocity(rows, times=torch.tensor([0.2, end, 1.0]))(x, t) for end in (0.2001, 0.6)]
    torch.testing.assert_close(to[0], now, rtol=0.0, atol=2e-2)
    assert (to[1] - now).abs().max() > 5e-2


@pytest.mark.parametrize("name", ["DreamLiteMobilePipeline", "Flux2KleinPipeline"])
def test_distilled_models_are_not_guided(name: str) -> None:
    model = opened(name)
    if name == "Flux2KleinPipeline":
        pipe = model.pipeline
        model = type(model)(type(pipe)(**pipe.components, is_distilled=True), **model.options)
    rows = model.encode_prompt(["a hat"])
    x = model.noise(1, 16, 16, seeded())
    network = "unet" if name == "DreamLiteMobilePipeline" else "transformer"
    with torch.no_grad():
        assert torch.equal(
            model.velocity(rows, 5.0)(x, torch.tensor(0.5)), model.velocity(rows)(x, torch.tensor(0.5))
        )
    assert model.usual_guidance == 1.0
    assert counted(model, network, lambda: model.velocity(rows, 5.0)(x, torch.tensor(0.5))) == 1
    assert "step-distilled" in model.describe_guidance()


@pytest.mark.parametrize(
    ("name", "scales", "t"),
    [
        ("FluxPipeline-dev", (1.5, 5.5), 0.05),
        ("StableDiffusion3Pipeline", (3.5, 13.5), 0.15),
        ("ZImagePipeline", (0.0, 1.0), 0.1),
        ("QwenImagePipeline", (1.0, 2.0), 0.1),
    ],
)
def test_an_edit_uses_the_family_s_settings(
    name: str, scales: tuple[float, float], t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of an inversion, which much guidance leads astray."""
    model, seen, begun = opened(name), list[float](), list[float]()
    edit, drawn = LatentFlowEditPipeline(model), type(model).velocity
    edit.set_progress_bar_config(disable=True)

    def velocity(self: Any, rows: Any, scale: float, *others: Any) -> Any:
        seen.append(scale)
        return drawn(self, rows, scale, *others)

    def first(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        begun.append(1.0 - float(timestep) / 1000.0)
        pipe._interrupt = True
        return {}

    monkeypatch.setattr(type(model), "velocity", velocity)
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    words = {"prompt": "a hat", "source_prompt": "a tree", "image": image, "callback_on_step_end": first}
    edit(**words)
    assert {*seen} == {*scales} and begun == pytest.approx([t])
    seen.clear()
    edit(**words, method="direct")
    assert {*seen} <= {model.unguided, model.unguided + 1.0}


def test_sizes_that_families_were_trained_on() -> None:
    sizes = {
        "ErnieImagePipeline": 1024,
        "Ideogram4Pipeline": 2048,
        "Kandinsky5T2IPipeline": 1024,
        "SanaPipeline": 1024,
    }
    assert {name: opened(name).native_size for name in sizes} == {
        name: (side, side) for name, side in sizes.items()
    }


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "QwenImagePipeline", "Flux2KleinPipeline", "StableDiffusionPipeline"]
)
def test_a_dropped_text_encoder_is_named(name: str) -> None:
    """Rows that it has made serve all the same."""
    model = FAMILIES[name](copy(checkpoint(name)), **TINY[name].call)
    rows = model.encode_prompt(["a red apple"])
    model.pipeline.text_encoder = None
    with pytest.raises(UserError, match="no text_encoder"):
        model.encode_prompt(["a red apple"])
    side = TINY[name].side
    times = model.time_grid(2, side, side)
    noise = model.begin(model.noise(1, side, side, seeded()), times)
    with torch.no_grad():
        assert model.velocity(rows, 1.0)(noise, times[0]).isfinite().all()
