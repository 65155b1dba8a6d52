"""Arguments that edits share with the other pipelines: embeddings, a grid, latents and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.autoencoder import latent_mask
from latentflow.errors import UserError
from latentflow.flow import EDITING
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline

from .conftest import GaussianFlow, close, latents_of, quiet, seeds, tiny_text, tiny_vae
from .test_edit import APPLE, HAT, TREE, editor

Draw = Callable[..., Tensor]
FEW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
#: the right half of 8 x 8 pixels: cells 2 and 3 of 4
HALF = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1)


@pytest.fixture
def edit(text_pipe: LatentFlowPipeline) -> LatentFlowEditPipeline:
    return editor(text_pipe)


def encoded(pipe: Any, prompt: Any, name: str = "prompt") -> dict[str, Tensor]:
    """A prompt as the arguments of a call that take its embeddings."""
    embeds, _, mask, _ = pipe.encode_prompt(prompt)
    return {f"{name}_embeds": embeds, f"{name}_attention_mask": mask}


# ------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("method", EDITING)
def test_embeddings_are_the_prompts_that_they_encode(
    method: str, edit: LatentFlowEditPipeline, images: Draw
) -> None:
    call = {"image": images(2), "method": method, "source_guidance_scale": 1.5} | FEW
    texts = [TREE, HAT]
    by_text = edit(texts, source_prompt=APPLE, negative_prompt=[HAT, APPLE], generator=seeds(1, 2), **call)
    embeds = encoded(edit, texts) | encoded(edit, [HAT, APPLE], "negative_prompt")
    embeds |= encoded(edit, APPLE, "source_prompt")
    alone = quiet(LatentFlowEditPipeline(**edit.components | {"text_encoder": None, "tokenizer": None}))
    for pipe in (edit, alone):
        close(pipe(**embeds, generator=seeds(1, 2), **call).images, by_text.images, 1e-5)


def test_without_a_text_encoder_the_source_may_still_lack(edit: LatentFlowEditPipeline, images: Draw) -> None:
    alone = quiet(LatentFlowEditPipeline(**edit.components | {"text_encoder": None, "tokenizer": None}))
    target = encoded(edit, TREE)
    expected = edit(TREE, images(), generator=seeds(1)[0], **FEW).images
    close(alone(image=images(), **target, generator=seeds(1)[0], **FEW).images, expected, 1e-5)
    close(alone.invert(images()).latents, edit.invert(images()).latents, 1e-5)


def test_inversion_and_interpolation_take_embeddings(edit: LatentFlowEditPipeline, images: Draw) -> None:
    both, negative = encoded(edit, [APPLE, TREE]), encoded(edit, HAT, "negative_prompt")
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    by_text = edit.invert(images(2), [APPLE, TREE], negative_prompt=HAT, **settings).latents
    twice = {name: value.expand(2, *value.shape[1:]) for name, value in negative.items()}
    close(edit.invert(images(2), **both, **twice, **settings).latents, by_text, 1e-5)
    settings |= {"frames": 3, "output_type": "latent"}
    for call, drawn in (({"generator": 7}, {}), ({"generator": 7}, {"image": images(2)})):
        seed = torch.Generator().manual_seed(call["generator"])
        by_text = edit.interpolate([APPLE, TREE], negative_prompt=HAT, generator=seed, **drawn, **settings)
        seed = torch.Generator().manual_seed(call["generator"])
        by_embeds = edit.interpolate(**both, **negative, generator=seed, **drawn, **settings)
        close(by_embeds.images, by_text.images, 1e-5)
    one = edit.interpolate(**encoded(edit, APPLE), generator=seeds(1)[0], **settings).images
    close(one, edit.interpolate(APPLE, generator=seeds(1)[0], **settings).images, 1e-5)


# ------------------------------------------------------------------ a grid


@pytest.mark.parametrize("method", EDITING)
def test_sigmas_are_the_grid_of_an_edit(method: str, edit: LatentFlowEditPipeline, images: Draw) -> None:
    def times(**settings: Any) -> list[float]:
        edit.transformer.calls.clear()
        edit(TREE, images(), method=method, guidance_scale=1.0, solver="euler", **FEW | settings)
        return sorted({round(t, 4) for _, t, _ in edit.transformer.calls})

    ends = [] if method == "flowedit" else [1.0]
    assert times(sigmas=[1.0, 0.7, 0.25], strength=1.0) == [0.0, 0.3, 0.75, *ends]
    assert times(sigmas=[1.0, 0.7, 0.25], strength=0.5) == [0.5, 0.75, *ends]
    assert times(sigmas=[0.7, 0.25], strength=1.0) == [0.3, 0.75, *ends]
    equal = {"num_inference_steps": 4, "strength": 1.0}
    assert times(sigmas=[1.0, 0.75, 0.5, 0.25], strength=1.0) == times(**equal)


def test_sigmas_of_inversion_and_interpolation(edit: LatentFlowEditPipeline, images: Draw) -> None:
    grid = [1.0, 0.75, 0.5, 0.25]
    equal = edit.invert(images(), APPLE, 4)
    own = edit.invert(images(), APPLE, sigmas=grid)
    assert torch.equal(own.latents, equal.latents)
    assert torch.equal(own.error, equal.error)
    call = {"frames": 2, "image": images(2), "output_type": "latent"}
    between = edit.interpolate(APPLE, sigmas=grid, **call).images
    assert torch.equal(between, edit.interpolate(APPLE, num_inference_steps=4, **call).images)
    for method in (edit.invert, edit.interpolate):
        with pytest.raises(UserError, match=r"sigmas begin at 0\.75\nBegin with 1\.0"):
            method(image=images(2), prompt=APPLE, sigmas=[0.75, 0.5])


# ------------------------------------------------------------------ latents


@pytest.mark.parametrize("method", EDITING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_latents_are_those_of_the_images(
    method: str, dtype: torch.dtype, edit: LatentFlowEditPipeline, images: Draw
) -> None:
    latents, call = latents_of(edit, images(2)).to(dtype), {"source_prompt": APPLE, "method": method}
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    by_image = edit(TREE, images(2), generator=seeds(1, 2), **call, **FEW).images
    close(edit(TREE, latents=latents, generator=seeds(1, 2), **call, **FEW).images, by_image, tolerance)
    inverted = edit.invert(images(2), APPLE).latents
    close(edit.invert(latents=latents, prompt=APPLE).latents, inverted, tolerance)
    assert edit(TREE, latents=latents, num_inference_steps=1).images[0].size == (8, 8)


def test_latents_of_a_padded_image_are_cropped_to_its_size(
    edit: LatentFlowEditPipeline, images: Draw
) -> None:
    image = images(1, 7, 5)
    latents = edit(TREE, image, strength=0.0, output_type="latent").images
    assert latents.shape == (1, 2, 4, 3)
    call = {"strength": 0.0, "output_type": "pt"}
    whole = edit(TREE, latents=latents, **call).images
    assert whole.shape == (1, 3, 8, 6)
    cropped = edit(TREE, latents=latents, height=7, width=5, **call).images
    assert torch.equal(cropped, whole[:, :, :7, :5])
    assert edit.invert(latents=latents, height=7, width=5).size == (7, 5)
    with pytest.raises(UserError, match="latents cover 6 x 8 pixels, height and width are 9 and 6"):
        edit(TREE, latents=latents, height=9)


def test_latents_of_an_interpolation_are_its_noise(edit: LatentFlowEditPipeline, images: Draw) -> None:
    call = {"frames": 4, "output_type": "latent", "num_inference_steps": 5}
    noise = edit.invert(images(2), [APPLE, TREE], 5).latents
    by_image = edit.interpolate([APPLE, TREE], images(2), **call).images
    by_noise = edit.interpolate([APPLE, TREE], latents=noise, guidance_scale=1.0, **call).images
    assert torch.equal(by_noise, by_image)
    one = torch.randn(1, 2, 4, 4, generator=seeds(3)[0])
    drawn = edit.interpolate([APPLE, TREE], generator=seeds(3)[0], **call).images
    assert torch.equal(edit.interpolate([APPLE, TREE], latents=one, **call).images, drawn)


def test_latents_that_do_not_fit_are_named(edit: LatentFlowEditPipeline, images: Draw) -> None:
    one, three = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    for call, message in (
        (lambda: edit(TREE, images(), latents=one), "image and latents are both given"),
        (lambda: edit(TREE, latents=one, mask_image=HALF), "latents are given with a mask_image\nPass the image"),
        (lambda: edit(TREE, latents=one[:, :1]), r"latents have shape \(1, 1, 4, 4\)\nThe network takes \(B, 2"),
        (lambda: edit([TREE, HAT], latents=three), "2 prompts or classes for 3 images"),
        (lambda: edit.invert(images(), latents=one), "image and latents are both given"),
        (lambda: edit.interpolate(latents=three), "3 latents\nPass one for all frames, or"),
        (lambda: edit.interpolate(image=images(2), latents=one), "image and latents are both given"),
        (lambda: edit.invert(), "image is NoneType"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("method", EDITING)
def test_a_mask_keeps_every_other_pixel_and_edits_as_without(
    method: str, strength: float, edit: LatentFlowEditPipeline, images: Draw
) -> None:
    """The stub moves every cell by itself, so that within the mask nothing is otherwise."""
    call = {"image": images(2), "source_prompt": APPLE, "method": method, "strength": strength}
    call |= {"num_inference_steps": 4}
    whole = edit(TREE, **call, generator=seeds(1, 2), output_type="latent").images
    latents = edit(TREE, **call, mask_image=HALF, generator=seeds(1, 2), output_type="latent").images
    hole = latent_mask(HALF[None, None], 2)[0, 0] > 0
    close(latents[..., hole], whole[..., hole], 1e-5)
    assert torch.equal(latents[..., ~hole], latents_of(edit, images(2))[..., ~hole])
    drawn = edit(TREE, **call, mask_image=HALF, generator=seeds(1, 2), output_type="pt").images
    assert torch.equal(drawn[..., :4], images(2)[..., :4])
    decoded = (edit.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
    close(drawn[..., 4:], decoded[..., 4:], 1e-6)


def test_kept_pixels_are_the_image_s_own_at_any_size_and_with_transparency(
    edit: LatentFlowEditPipeline,
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (11, 13, 4), dtype=np.uint8)
    mask = np.zeros((11, 13), np.uint8)
    mask[2:6, 3:9] = 255
    for crop in (None, 1):
        call = {"mask_image": Image.fromarray(mask), "padding_mask_crop": crop, "num_inference_steps": 2}
        result = np.asarray(edit(TREE, Image.fromarray(levels), **call).images[0])
        assert result.shape == (11, 13, 4)
        assert np.array_equal(result[mask == 0], levels[mask == 0])
        assert (result[mask > 0][:, 3] == 255).all()
        assert (result[mask > 0][:, :3] != levels[mask > 0][:, :3]).any()


def test_soft_masks_several_masks_and_feathers_are_those_of_inpainting(
    edit: LatentFlowEditPipeline, images: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"num_inference_steps": 2, "output_type": "pt", "generator": seeds(1)[0]}
    masks = torch.stack([HALF, 1 - HALF])
    two = edit([TREE, TREE], images(), mask_image=masks, **call).images
    assert torch.equal(two[0, :, :, :4], images()[0, :, :, :4])
    assert torch.equal(two[1, :, :, 4:], images()[0, :, :, 4:])
    narrow = torch.cat([torch.zeros(8, 5), torch.ones(8, 3)], 1)
    blurred = edit(TREE, images(), mask_image=narrow, feather=2, **call).images
    assert torch.equal(blurred[..., :3], images()[..., :3])
    assert not torch.equal(blurred[..., 3:5], images()[..., 3:5])
    empty = edit(TREE, images(), mask_image=0 * HALF, **call).images
    assert torch.equal(empty, images())
    assert "keeps every pixel" in caplog.text
    for name, value in (("feather", 2), ("padding_mask_crop", 2)):
        with pytest.raises(UserError, match=f"{name} is given without a mask_image"):
            edit(TREE, images(), **{name: value})


def test_a_callback_sees_masked_edits_and_may_end_them(edit: LatentFlowEditPipeline, images: Draw) -> None:
    seen: list[Tensor] = []

    def stop(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"])
        pipe._interrupt = i == 1

    for method in EDITING:
        call = {"mask_image": HALF, "method": method, "num_inference_steps": 4, "output_type": "pt"}
        out = edit(TREE, images(), callback_on_step_end=stop, **call).images
        assert torch.equal(out[..., :4], images()[..., :4])
    assert len(seen) == 2 * len(EDITING)


def test_a_checkpoint_of_classes_edits_within_a_mask(images: Draw) -> None:
    network = GaussianFlow(num_classes=3)
    edit = quiet(LatentFlowEditPipeline(tiny_vae(), network, id2label={0: "apple", 1: "hat", 2: "tree"}))
    call = {"class_labels": "hat", "source_class_labels": 0, "mask_image": HALF, "strength": 1.0}
    out = edit(image=images(), guidance_scale=1.0, solver="rk4", output_type="latent", **call).images
    moved = (network.means[1] - network.means[0]).detach()[:, None, None] * (torch.arange(4) > 1)
    close(out, latents_of(edit, images()) + moved, 1e-3)


def test_a_pipeline_of_text_and_classes_takes_embeddings_of_a_source(images: Draw) -> None:
    network = GaussianFlow(num_classes=3, text_dim=16)
    edit = quiet(LatentFlowEditPipeline(tiny_vae(), network, **tiny_text()))
    call = {"class_labels": 1, "source_class_labels": 0, "generator": seeds(1)[0]} | FEW
    by_text = edit(TREE, images(), source_prompt=APPLE, **call).images
    call["generator"] = seeds(1)[0]
    close(edit(TREE, images(), **encoded(edit, APPLE, "source_prompt"), **call).images, by_text, 1e-5)
