"""Inpainting against closed forms: the network's condition, what is kept, and whose image is whose."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3InpaintPipeline
from PIL import Image
from torch import Tensor

import latentflow.pipeline.inpaint
from latentflow.autoencoder import masked_condition, masked_latents
from latentflow.errors import UserError
from latentflow.flow import SOLVERS, integrate
from latentflow.flow.inpainting import DEFAULT_INPAINTING, INPAINTING
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

from .conftest import close, quiet, seeds

Noise = Callable[[int], Tensor]
Images = Callable[..., Tensor]
Fill = Callable[..., Tensor]
LATENT: dict[str, Any] = {"solver": "dopri5", "num_inference_steps": 10, "output_type": "latent"}


def box(rows: slice, columns: slice, height: int = 8, width: int = 8) -> Tensor:
    """(1, 1, H, W), 1 in the box."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., rows, columns] = 1.0
    return mask


HALF = box(slice(None), slice(4, None))  # the right half: cells 2 and 3 of 4
ODD = box(slice(2, 5), slice(3, 6))  # covers some cells in part


@pytest.fixture
def fill(images: Images, x0: Noise) -> Callable[..., Tensor]:
    """Fill the hole `ODD` of one image with class 0 from fixed noise, unless asked otherwise; the tensor in [0, 1]."""

    def filled(pipe: Any, **options: Any) -> Tensor:
        usual = {"image": images(), "mask_image": ODD, "class_labels": 0, "latents": x0(1)}
        usual |= {"num_inference_steps": 3, "output_type": "pt"}
        result: Tensor = pipe(**usual | options).images
        return result

    return filled


def data_dependent(pipe: LatentFlowInpaintPipeline) -> LatentFlowInpaintPipeline:
    """The same checkpoint as one that was trained by the data-dependent coupling."""
    return quiet(LatentFlowInpaintPipeline(**pipe.components, coupling="data-dependent"))


def known_of(pipe: Any, images: Tensor, masks: Tensor) -> Tensor:
    """Latents of the images with grey holes, written out for the tiny autoencoder."""
    with torch.no_grad():
        raw = pipe.vae.encode((2.0 * images - 1.0) * (1.0 - masks)).latent_dist.mean
    mean, std = torch.tensor([0.3, -0.7]).view(1, 2, 1, 1), torch.tensor([1.5, 0.4]).view(1, 2, 1, 1)
    return (raw - mean) / std


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------ the network's condition


@pytest.mark.parametrize("mask", [HALF, ODD, box(slice(0, 2), slice(0, 8))])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_hole_follows_the_class_and_the_rest_what_is_known(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, mask: Tensor, scale: float
) -> None:
    out = inpaint_pipe(
        image=images(), mask_image=mask, class_labels=2, guidance_scale=scale, latents=x0(1), **LATENT
    ).images
    network = inpaint_pipe.transformer
    guided = network.null + scale * (network.means[2] - network.null)
    hole = F.max_pool2d(mask, 2) > 0
    # The known latents stay the mean of the kept cells at any guidance: both halves have them.
    mean = torch.where(hole, guided.view(1, 2, 1, 1), known_of(inpaint_pipe, images(), mask))
    close(out, network.end(mean, x0(1)))


def test_a_checkpoint_without_other_conditions(images: Images, x0: Noise, inpaint_pipe: Any) -> None:
    network = type(inpaint_pipe.transformer)(condition_channels=6)
    pipe = quiet(LatentFlowInpaintPipeline(inpaint_pipe.vae, network))
    out = pipe(image=images(), mask_image=HALF, latents=x0(1), **LATENT).images
    mean = torch.where(
        F.max_pool2d(HALF, 2) > 0, network.null.view(1, 2, 1, 1), known_of(pipe, images(), HALF)
    )
    close(out, network.end(mean, x0(1)))
    assert {rows for rows, _, _ in network.calls} == {1}  # nothing to guide


def test_a_soft_mask_is_a_hole_from_one_half_on(inpaint_pipe: LatentFlowInpaintPipeline, fill: Fill) -> None:
    soft = torch.where(HALF > 0, 0.5, 0.49)
    assert torch.equal(*(fill(inpaint_pipe, mask_image=mask, **LATENT) for mask in (soft, HALF)))


def test_given_latents_stand_for_the_masked_image(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, fill: Fill
) -> None:
    def filled(latents: Tensor | None) -> Tensor:
        return fill(inpaint_pipe, mask_image=HALF, masked_image_latents=latents, **LATENT)

    close(filled(known_of(inpaint_pipe, images(), HALF)), filled(None))
    close(filled(torch.full((1, 2, 4, 4), 2.0))[..., :2], 2.0 + 0.5 * x0(1)[..., :2])
    message = r"masked_image_latents have shape \(1, 2, 3, 3\)\nFor .* \(1, 2, 4, 4\)"
    with pytest.raises(UserError, match=message):
        filled(torch.zeros(1, 2, 3, 3))


def test_what_lies_in_the_hole_changes_nothing(
    inpaint_pipe: LatentFlowInpaintPipeline,
    steered_pipe: LatentFlowInpaintPipeline,
    images: Images,
    fill: Fill,
) -> None:
    both = images(), torch.where(ODD > 0, 1.0 - images(), images())
    for pipe, method in ((inpaint_pipe, "trained"), (steered_pipe, "replacement")):
        assert torch.equal(*(fill(pipe, image=image, method=method, generator=seeds(0)[0]) for image in both))


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 5)])
def test_kept_pixels_are_the_images_and_soft_ones_blend(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, size: tuple[int, int]
) -> None:
    own = images(1, *size)
    mask = torch.linspace(0.0, 1.0, size[0] * size[1]).view(1, 1, *size)
    mask[..., :2] = 0.0
    mask[..., -1] = 1.0
    canvas = (-(-size[0] // 2), -(-size[1] // 2))
    noise = torch.randn(1, 2, *canvas, generator=torch.Generator().manual_seed(5))
    call = {
        "class_labels": 0,
        "latents": noise,
        "num_inference_steps": 3,
        "solver": "heun",
        "seamless": False,
    }
    out = inpaint_pipe(image=own, mask_image=mask, output_type="pt", **call).images
    # By hand: the edge is repeated to the right and below, of the mask as well; what is drawn there is cut off.
    missing = (0, size[1] % 2, 0, size[0] % 2)
    padded, holes = (
        F.pad(own, missing, mode="replicate"),
        F.pad((mask >= 0.5).float(), missing, mode="replicate"),
    )
    drawn = decoded(
        inpaint_pipe, inpaint_pipe(image=padded, mask_image=holes, output_type="latent", **call).images
    )
    drawn = drawn[..., : size[0], : size[1]]
    assert out.shape == own.shape
    close(out, mask * drawn + (1 - mask) * own, 1e-6)
    kept = (mask == 0).expand_as(own)
    assert torch.equal(out[kept], own[kept])
    array = inpaint_pipe(image=own, mask_image=mask, output_type="np", **call).images
    image = inpaint_pipe(image=own, mask_image=mask, **call).images[0]
    assert np.array_equal(array[0], out[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))


def test_feather_blends_outside_of_the_hole_and_no_farther_than_it_says(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images
) -> None:
    mask, own = box(slice(6, 10), slice(6, 10), 16, 16), images(1, 16, 16)
    call = {"image": own, "mask_image": mask, "class_labels": 0, "output_type": "pt", "seamless": False}

    def draw(feather: float) -> Tensor:
        return inpaint_pipe(
            feather=feather, num_inference_steps=2, generator=torch.Generator().manual_seed(6), **call
        ).images

    sharp, soft = draw(0), draw(3)
    assert torch.equal(soft[..., 6:10, 6:10], sharp[..., 6:10, 6:10])
    changed = (soft != own).any(1)[0]
    assert not changed[:3].any()
    assert not changed[13:].any()
    assert not changed[:, :3].any()
    assert not changed[:, 13:].any()
    assert not changed[3, 4]  # 3.6 pixels away, over the corner
    assert changed[3, 8]
    assert changed[8, 12]
    # One pixel out of the hole the new image counts 3/4, two out 1/2, three out 1/4.
    ratio = (soft - own)[0, :, 8, 10:13] / (draw(1e6) - own)[0, :, 8, 10:13]
    close(ratio.median(0).values, torch.tensor([0.75, 0.5, 0.25]), 1e-3)


def test_a_black_mask_returns_the_image_and_says_so(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        out = inpaint_pipe(
            image=images(), mask_image=torch.full((8, 8), 0.4), class_labels=0, output_type="pt"
        )
    assert torch.equal(out.images, images())
    assert "keeps every pixel" in caplog.text
    assert not inpaint_pipe.transformer.calls
    masks = torch.cat([HALF, 0.4 * HALF])
    call = {"image": images(2), "mask_image": masks, "class_labels": 0, "output_type": "pt"}
    some = inpaint_pipe(**call, padding_mask_crop=1).images
    assert "of image 1 keeps" in caplog.text
    assert torch.equal(some[1], images(2)[1])
    assert not torch.equal(some[0], images(2)[0])


def test_a_white_mask_is_generation(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise
) -> None:
    call = {"class_labels": 1, "latents": x0(1), "output_type": "pt", "solver": "heun"}
    out = inpaint_pipe(image=images(), mask_image=torch.ones(8, 8), **call).images
    plain = quiet(LatentFlowPipeline(**inpaint_pipe.components))
    close(out, plain(**call).images, 1e-6)


# ------------------------------------------------------------------ strength, methods


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_strength_starts_from_the_whole_image(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, strength: float
) -> None:
    out = inpaint_pipe(
        image=images(), mask_image=HALF, class_labels=0, strength=strength, guidance_scale=1.0,
        latents=x0(1), **LATENT,
    ).images  # fmt: skip
    network, t = inpaint_pipe.transformer, 1.0 - strength
    known = known_of(inpaint_pipe, images(), HALF)
    mean = torch.where(F.max_pool2d(HALF, 2) > 0, network.means[0].view(1, 2, 1, 1), known)
    start = t * known_of(inpaint_pipe, images(), torch.zeros(1)) + (1.0 - t) * x0(1)
    close(out, network.end_from(mean, start, t))


def test_strength_zero_is_the_very_image(inpaint_pipe: LatentFlowInpaintPipeline, images: Images) -> None:
    levels = (images(1, 7, 9)[0].permute(1, 2, 0) * 255).byte().numpy()
    mask = Image.new("L", (9, 7), 255)
    out = inpaint_pipe(image=Image.fromarray(levels), mask_image=mask, class_labels=0, strength=0.0).images[0]
    assert np.array_equal(np.asarray(out), levels)


def test_the_data_dependent_source_is_the_known_part_with_noise_in_the_hole(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, fill: Fill
) -> None:
    pipe = data_dependent(inpaint_pipe)
    network, hole = pipe.transformer, F.max_pool2d(ODD, 2) > 0
    drawn = network.end(network.means[0].view(1, 2, 1, 1), x0(1))
    out = fill(pipe, guidance_scale=1.0, **LATENT)
    close(out, torch.where(hole, drawn, known_of(pipe, images(), ODD)))


@pytest.mark.parametrize("way", [{"solver": name} for name in SOLVERS] + [{"method": "pnp-flow"}], ids=str)
def test_the_data_dependent_flow_moves_in_the_hole_only(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, fill: Fill, way: dict[str, str]
) -> None:
    """Also where the solver draws noise everywhere, in the middle of a step too; the network sees what is known."""
    pipe = data_dependent(inpaint_pipe)
    known, hole = known_of(pipe, images(), ODD), F.max_pool2d(ODD, 2) > 0
    seen: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def watch(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {"latents": tensors["latents"] + 1.0}  # which does not reach what is known either

    out = fill(pipe, guidance_scale=1.0, **LATENT | {"solver": None, "callback_on_step_end": watch} | way)
    hook.remove()
    for x in [*seen, out]:
        close(*(torch.where(hole, 0.0, latents) for latents in (x, known)), 1e-6)
    assert (torch.where(hole, out - x0(1), 1.0) != 0).all()


def test_the_data_dependent_flow_follows_a_scheduler_that_draws_noise(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, fill: Fill
) -> None:
    pipe = data_dependent(inpaint_pipe)
    known, hole = known_of(pipe, images(), ODD), F.max_pool2d(ODD, 2) > 0
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    first, second = (fill(pipe, generator=generator, output_type="latent") for generator in seeds(1, 2))
    close(*(torch.where(hole, 0.0, x) for x in (first, known)), 1e-6)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_method_gets_the_noise_what_is_known_and_the_grid(
    steered_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, monkeypatch: Any, strength: float
) -> None:
    given = {}

    def method(
        velocity: Any, x: Tensor, known: Tensor, mask: Tensor, times: Tensor, **options: Any
    ) -> Tensor:
        given.update(x=x, known=known, mask=mask, times=times, **options)
        options["solver"] = options["solver"] or "euler"
        return integrate(velocity, x, times, **options)

    monkeypatch.setitem(latentflow.pipeline.inpaint.INPAINTING, "mine", method)
    steered_pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # which does not steer
    seen: list[float] = []
    generator = torch.Generator()
    call = {"image": images(), "mask_image": ODD, "class_labels": 0, "strength": strength}
    steered_pipe(
        **call, method="mine", latents=x0(1), num_inference_steps=4, generator=generator,
        callback_on_step_end=lambda p, i, t, k: seen.append(float(t)),
    )  # fmt: skip
    whole = known_of(steered_pipe, images(), torch.zeros(1))
    close(given["x"], x0(1) if strength == 1.0 else 0.5 * whole + 0.5 * x0(1), 1e-5)
    close(given["known"], masked_latents(steered_pipe.vae, 2 * images() - 1, ODD).detach(), 1e-5)
    assert torch.equal(given["mask"], F.max_pool2d(ODD, 2))
    assert given["solver"] is None
    assert given["generator"] is generator
    assert seen == [1000.0, 750.0, 500.0, 250.0][0 if strength == 1.0 else 2 :]
    assert given["times"].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0][0 if strength == 1.0 else 2 :]


@pytest.mark.parametrize("method", [None, *INPAINTING])
def test_every_method_keeps_what_is_kept(
    steered_pipe: LatentFlowInpaintPipeline, images: Images, fill: Fill, method: str | None
) -> None:
    def filled(rows: list[int]) -> Tensor:
        some = {"image": images(2)[rows], "class_labels": rows, "generator": seeds(*rows), "latents": None}
        return fill(steered_pipe, method=method, **some)

    out = filled([0, 1])
    kept = (ODD == 0).expand_as(out)
    assert torch.equal(out[kept], images(2)[kept])
    assert not torch.equal(out, images(2))
    close(out[1:], filled([1]), 1e-4)


def test_the_usual_method_is_posterior_or_follows_the_solver_that_is_asked_for(
    inpaint_pipe: LatentFlowInpaintPipeline, steered_pipe: LatentFlowInpaintPipeline, fill: Fill
) -> None:
    parts = inpaint_pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    scheduled = quiet(LatentFlowInpaintPipeline(**parts))
    for pipe, solver, name in (
        (inpaint_pipe, None, DEFAULT_INPAINTING),
        (steered_pipe, None, DEFAULT_INPAINTING),
        (inpaint_pipe, "heun", "trained"),
        (scheduled, None, "trained"),
    ):
        call = {"solver": solver, "latents": None}
        assert torch.equal(*(fill(pipe, method=way, generator=seeds(1)[0], **call) for way in (None, name)))


@pytest.mark.parametrize("method", ["trained", *INPAINTING])
def test_which_methods_have_the_hole_as_a_condition(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, fill: Fill, method: str
) -> None:
    channels: list[Tensor | None] = []
    hook = inpaint_pipe.transformer.register_forward_pre_hook(
        lambda module, given: channels.append(given[2].channels)
    )
    fill(inpaint_pipe, method=method, num_inference_steps=2, guidance_scale=1.0)
    hook.remove()
    if method in ("trained", "pnp-flow"):
        expected = masked_condition(inpaint_pipe.vae, 2 * images() - 1, ODD).detach()
        assert channels
        for seen in channels:
            close(seen, expected, 1e-6)
    else:
        assert set(channels) == {None}


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("count", "masks", "labels", "rows"),
    [(1, 1, [0, 1], ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1])), (2, 1, [2], ([0, 0, 1, 1], [0] * 4, [2] * 4)),
     (1, 2, [2], ([0] * 4, [0, 0, 1, 1], [2] * 4)), (2, 2, [0, 1], ([0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]))],
)  # fmt: skip
def test_whose_image_mask_and_class_a_row_has(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, x0: Noise, count: int, masks: int, labels: Any,
    rows: Any,
) -> None:  # fmt: skip
    holes = torch.cat([HALF, ODD])
    call = {"guidance_scale": 2.0, "num_images_per_prompt": 2, "num_inference_steps": 3}
    call["solver"] = "heun"
    out = inpaint_pipe(
        image=images(2)[:count], mask_image=holes[:masks], class_labels=labels, latents=x0(4),
        output_type="pt", **call,
    ).images  # fmt: skip
    for row, (image, mask, label) in enumerate(zip(*rows, strict=True)):
        alone = inpaint_pipe(
            image=images(2)[image : image + 1], mask_image=holes[mask : mask + 1], class_labels=label,
            latents=x0(4)[row : row + 1], output_type="pt", **call | {"num_images_per_prompt": 1},
        ).images  # fmt: skip
        close(out[row : row + 1], alone, 1e-5)


# ------------------------------------------------------------------ large images


def test_padding_mask_crop_draws_around_the_hole(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, fill: Fill
) -> None:
    own, mask = images(1, 20, 30), box(slice(9, 13), slice(15, 19), 20, 30)
    out = fill(inpaint_pipe, image=own, mask_image=mask, padding_mask_crop=2, solver="heun")
    # 2 pixels around it the hole is as large as the network draws, 8 x 8: nothing is resized.
    part = (..., slice(7, 15), slice(13, 21))
    expected = own.clone()
    expected[part] = fill(inpaint_pipe, image=own[part], mask_image=mask[part], solver="heun")
    close(out, expected, 1e-6)
    assert torch.equal(out[(mask == 0).expand_as(out)], own[(mask == 0).expand_as(out)])


@pytest.mark.parametrize("size", [(50, 40), (9, 31), (5, 4)])
def test_padding_mask_crop_at_other_scales(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, size: tuple[int, int]
) -> None:
    own = images(2, *size)
    masks = torch.cat([box(slice(0, 3), slice(1, 4), *size), box(slice(-3, None), slice(-2, None), *size)])
    drawn: list[torch.Size] = []
    out = inpaint_pipe(
        image=own, mask_image=masks, padding_mask_crop=1, class_labels=0, num_inference_steps=2, output_type="pt",
        callback_on_step_end=lambda p, i, t, k: drawn.append(k["latents"].shape),
    ).images  # fmt: skip
    assert set(drawn) == {(2, 2, 4, 4)}  # as trained
    holes = masks.expand_as(own) > 0
    assert torch.equal(out[~holes], own[~holes])
    assert (out != own)[holes].float().mean() > 0.9


# ------------------------------------------------------------------ transparency


@pytest.mark.parametrize("form", ["PIL", "palette", "grey", "array", "tensor"])
def test_transparent_images_come_back_transparent(inpaint_pipe: LatentFlowInpaintPipeline, form: str) -> None:
    """Several masks of one image, among opaque ones: each result has the alpha of its own image."""
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    clear = Image.fromarray(levels)
    given: Any = clear
    if form == "palette":
        given = clear.convert("RGB").quantize(8)
        given.info["transparency"] = bytes(range(0, 256, 32))
    elif form == "grey":
        given = clear.convert("LA")
    elif form != "PIL":
        given = np.asarray(clear) / np.float32(255)
        given = torch.from_numpy(given).permute(2, 0, 1) if form == "tensor" else given
    kept = np.asarray(given.convert("RGBA")) if isinstance(given, Image.Image) else levels
    call = {"class_labels": 0, "num_inference_steps": 2, "num_images_per_prompt": 2}
    call |= {"image": [given, clear.convert("RGB")], "mask_image": torch.cat([ODD, HALF])}
    first, again, opaque, _ = inpaint_pipe(**call).images
    hole = ODD[0, 0].numpy() > 0
    for image in (first, again):
        seen = np.asarray(image)
        assert image.mode == "RGBA" and np.array_equal(seen[~hole], kept[~hole])
        assert (seen[hole][:, 3] == 255).all()
    assert first.tobytes() != again.tobytes() and opaque.mode == "RGB"
    assert np.array_equal(np.asarray(opaque)[:, :4], levels[:, :4, :3])
    unchanged = inpaint_pipe(**call | {"strength": 0.0}).images
    assert np.array_equal(np.asarray(unchanged[0]), kept)
    larger = inpaint_pipe(**call | {"height": 16, "width": 16}).images
    assert [image.mode for image in larger] == ["RGBA", "RGBA", "RGB", "RGB"] and larger[0].size == (16, 16)


# ------------------------------------------------------------------ masks of all kinds


def test_masks_in_all_their_forms(inpaint_pipe: LatentFlowInpaintPipeline, fill: Fill) -> None:
    expected = fill(inpaint_pipe, solver="heun")
    array = ODD[0, 0].numpy()
    image = Image.fromarray((array * 255).astype(np.uint8))
    forms: list[Any] = [ODD[0, 0], ODD[0], [ODD], ODD > 0]
    forms += [array, array[None], array[..., None], array[None, ..., None]]
    forms += [image, [image], image.convert("1"), image.convert("RGB"), image.convert("I;16")]
    for mask in forms:
        assert torch.equal(fill(inpaint_pipe, mask_image=mask, solver="heun"), expected)


@pytest.mark.parametrize("form", ["pil", "np", "pt"])
def test_a_mask_of_another_size_is_resized_and_says_so(
    inpaint_pipe: LatentFlowInpaintPipeline,
    images: Images,
    fill: Fill,
    form: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = box(slice(1, 3), slice(2, 4), 4, 4)
    array = small[0, 0].numpy()
    mask = {"pil": Image.fromarray((array * 255).astype(np.uint8)), "np": array, "pt": small}[form]
    with caplog.at_level(logging.WARNING):
        out = fill(inpaint_pipe, mask_image=mask)
    changed = (out != images()).any(1)[0]
    assert changed[2:6, 4:8].all()
    assert changed.sum() == 16
    assert "4 x 4, the image 8 x 8: resized to the nearest pixel" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"mask_image": None}, "mask_image is NoneType"),
        ({"mask_image": torch.full((8, 8), 255.0)}, "mask_image has values from 255.*\nDivide by 255"),
        ({"mask_image": torch.full((8, 8), -1.0)}, "mask_image has values from -1"),
        (
            {"mask_image": np.ones((8, 8, 3), np.float32)[None]},
            r"mask_image has shape \(1, 8, 8, 3\)\nPass one chan",
        ),
        ({"mask_image": torch.ones(1, 3, 8, 8)}, r"mask_image has shape \(1, 3, 8, 8\)"),
        ({"mask_image": Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3) * 5)}, "not a mask"),
        ({"mask_image": torch.ones(3, 8, 8)}, "3 masks for 2 images"),
        ({"class_labels": [0, 1, 2]}, "3 prompts or classes for 2 images"),
        ({"method": "replacment"}, "did you mean 'replacement'"),
        ({"method": "traind"}, "did you mean 'trained'"),
    ],
)
def test_what_is_refused(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        inpaint_pipe(**{"image": images(2), "mask_image": HALF, "class_labels": 0} | call)


def test_the_trained_method_needs_a_checkpoint_trained_with_masks(
    steered_pipe: LatentFlowInpaintPipeline, images: Images
) -> None:
    with pytest.raises(UserError, match=r"not trained with masks.*\n.*replacement"):
        steered_pipe(image=images(), mask_image=HALF, class_labels=0, method="trained")


# ------------------------------------------------------------------ diffusers' conventions


def test_arguments_stand_where_diffusers_has_them() -> None:
    def names(function: Any) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [entry.name for entry in parameters if entry.kind is entry.POSITIONAL_OR_KEYWORD]

    ours, theirs = names(LatentFlowInpaintPipeline.__call__), names(StableDiffusion3InpaintPipeline.__call__)
    shared = [name for name in ours if name in theirs]
    assert shared == [name for name in theirs if name in ours]
    assert {"prompt", "image", "mask_image", "strength", "guidance_scale", "generator"} <= set(shared)


def test_an_interrupted_call_fills_the_hole_with_what_is_there(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images
) -> None:
    def stop(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = i == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    call = {"image": images(), "mask_image": HALF, "class_labels": 0, "num_inference_steps": 4}
    out = inpaint_pipe(callback_on_step_end=stop, output_type="pt", seamless=False, **call).images
    close(out[..., 4:], decoded(inpaint_pipe, torch.zeros(1, 2, 4, 4))[..., 4:], 1e-6)
    assert torch.equal(out[..., :4], images()[..., :4])
