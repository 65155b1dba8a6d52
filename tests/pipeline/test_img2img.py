"""Image-to-image against closed forms, and reading images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from latentflow.errors import UserError
from latentflow.pipeline.images import read_images
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline

from ..data.images import turned_by_exif
from .conftest import close, latents_of

Noise = Callable[[int], Tensor]
Images = Callable[..., Tensor]
EXACT: dict[str, Any] = {"solver": "dopri5", "num_inference_steps": 10, "output_type": "latent"}


# ------------------------------------------------------------------ strength


@pytest.mark.parametrize("strength", [0.25, 0.37, 0.8])
def test_the_flow_starts_between_image_and_noise(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, x0: Noise, strength: float
) -> None:
    call = {"class_labels": 2, "guidance_scale": 3.0, "latents": x0(1)}
    out = img2img_pipe(image=images(), strength=strength, **call, **EXACT).images
    network, t = img2img_pipe.transformer, 1.0 - strength
    mean = network.null + 3.0 * (network.means[2] - network.null)
    start = t * latents_of(img2img_pipe, images()) + (1.0 - t) * x0(1)
    close(out, network.end_from(mean, start, t))
    assert img2img_pipe.num_timesteps == int(np.ceil(10 * strength))


def test_full_strength_is_plain_generation(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, x0: Noise
) -> None:
    out = img2img_pipe(
        image=images(), class_labels=1, strength=1.0, guidance_scale=1.0, latents=x0(1), **EXACT
    )
    close(out.images, img2img_pipe.transformer.end(img2img_pipe.transformer.means[1], x0(1)))


def test_without_strength_it_is_the_image_through_the_autoencoder(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images
) -> None:
    out = img2img_pipe(image=images(2), class_labels=1, strength=0.0, output_type="pt").images
    with torch.no_grad():
        latent = img2img_pipe.vae.encode(2.0 * images(2) - 1.0).latent_dist.mean
        expected = (img2img_pipe.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
    close(out, expected, 1e-5)
    assert not img2img_pipe.transformer.calls


@pytest.mark.parametrize(
    ("strength", "sigmas", "starts"),
    [(0.5, None, [500.0, 400, 300, 200, 100]), (0.23, None, [230.0, 200, 100]), (1.0, [0.8, 0.4], [800.0, 400]),
     (0.6, [0.8, 0.4], [600.0, 400]), (0.9, [0.8, 0.4], [800.0, 400])],
)  # fmt: skip
def test_the_grid_is_cut(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, strength: float, sigmas: Any, starts: list[float]
) -> None:
    seen: list[float] = []
    img2img_pipe(
        image=images(), class_labels=0, strength=strength, sigmas=sigmas, num_inference_steps=10,
        output_type="latent", callback_on_step_end=lambda p, i, t, k: seen.append(float(t)),
    )  # fmt: skip
    assert seen == pytest.approx(starts)


SCHEDULERS: dict[str, tuple[Any, float]] = {
    "euler": (FlowMatchEulerDiscreteScheduler(), 0.03),
    "heun": (FlowMatchHeunDiscreteScheduler(), 0.01),
    "unipc": (
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0), 0.02,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_starts_there_too(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, x0: Noise, name: str
) -> None:
    img2img_pipe.scheduler, tolerance = SCHEDULERS[name]
    call = {"class_labels": 0, "guidance_scale": 1.0, "latents": x0(1), "output_type": "latent"}
    out = img2img_pipe(image=images(), strength=0.4, num_inference_steps=160, **call).images
    start = 0.6 * latents_of(img2img_pipe, images()) + 0.4 * x0(1)
    close(out, img2img_pipe.transformer.end_from(img2img_pipe.transformer.means[0], start, 0.6), tolerance)
    assert img2img_pipe.num_timesteps == (127 if name == "heun" else 64)
    at_rest = img2img_pipe(image=images(), strength=0.0, num_inference_steps=160, **call).images
    close(at_rest, latents_of(img2img_pipe, images()), 1e-6)


# ------------------------------------------------------------------ batches, sizes, callbacks


def test_one_image_serves_several_prompts_and_one_prompt_several_images(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, x0: Noise
) -> None:
    def ends(means: list[int], rows: list[int]) -> Tensor:
        start = 0.5 * latents_of(img2img_pipe, images(2))[rows] + 0.5 * x0(4)
        return img2img_pipe.transformer.end_from(img2img_pipe.transformer.means[means], start, 0.5)

    call = {"strength": 0.5, "guidance_scale": 1.0, "num_images_per_prompt": 2, "latents": x0(4)}
    several = img2img_pipe(image=images(2)[:1], class_labels=[1, 2], **call, **EXACT).images
    close(several, ends([1, 1, 2, 2], [0, 0, 0, 0]))
    one = img2img_pipe(image=images(2), class_labels=1, **call, **EXACT).images
    close(one, ends([1, 1, 1, 1], [0, 0, 1, 1]))
    each = img2img_pipe(image=images(2), class_labels=[1, 2], **call, **EXACT).images
    close(each, ends([1, 1, 2, 2], [0, 0, 1, 1]))


@pytest.mark.parametrize("size", [(7, 9), (1, 3), (8, 11)])
def test_any_size_comes_back_as_it_was(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images, size: tuple[int, int]
) -> None:
    own = images(1, *size)
    missing = (0, size[1] % 2, 0, size[0] % 2)  # edge pixels are repeated to the right and below
    padded = torch.nn.functional.pad(own, missing, mode="replicate")
    call = {"class_labels": 0, "strength": 0.0, "output_type": "pt"}
    expected = img2img_pipe(image=padded, **call).images[..., : size[0], : size[1]]
    close(img2img_pipe(image=own, **call).images, expected, 1e-6)


def test_height_and_width_resize(img2img_pipe: LatentFlowImg2ImgPipeline, images: Images) -> None:
    out = img2img_pipe(image=images(1, 16, 12), height=8, width=6, class_labels=0, num_inference_steps=1)
    assert out.images[0].size == (6, 8)


def test_a_preview_is_what_the_last_evaluation_points_to(
    img2img_pipe: LatentFlowImg2ImgPipeline, images: Images
) -> None:
    seen: list[Tensor] = []
    out = img2img_pipe(
        image=images(), class_labels=0, solver="euler", num_inference_steps=4, output_type="pt",
        callback_on_step_end_tensor_inputs=["latents", "prediction"],
        callback_on_step_end=lambda p, i, t, k: seen.append(p.to_images(k["prediction"], "pt")),
    ).images  # fmt: skip
    close(seen[-1], out, 1e-5)  # Euler's last step goes where it points
    assert not torch.allclose(seen[0], seen[-1], atol=1e-3)


# ------------------------------------------------------------------ images of all kinds


def grey_levels() -> np.ndarray[Any, Any]:
    return np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)


def pil_images() -> dict[str, tuple[Image.Image, np.ndarray[Any, Any]]]:
    """name -> (image, its levels (6, 8, 3) when upright, on white)."""
    grey = grey_levels()
    colours = np.stack([grey, 255 - grey, grey[::-1]], -1)
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8) * np.ones((6, 1), np.uint8)
    palette = Image.fromarray(grey).convert("P")
    turned, exif = turned_by_exif(colours, 6)
    turned.getexif().update(exif)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    return {
        "RGB": (Image.fromarray(colours), colours),
        "grey": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "palette": (palette, np.stack([grey] * 3, -1)),
        "16 bits": (deep, np.stack([grey] * 3, -1)),
        "RGBA": (
            Image.fromarray(np.dstack([colours, alpha])),
            np.where(alpha[..., None] > 0, colours, 255).astype(np.uint8),
        ),
        "EXIF": (turned, colours),
    }


@pytest.mark.parametrize("name", pil_images())
def test_every_pil_mode(name: str) -> None:
    image, levels = pil_images()[name]
    read = read_images([image])
    assert read.shape == (1, 3, 6, 8)
    assert np.array_equal((read[0].permute(1, 2, 0) * 255).round().byte().numpy(), levels)


def test_arrays_and_tensors() -> None:
    levels = np.stack([grey_levels(), 255 - grey_levels(), grey_levels()[::-1]], -1)
    expected = read_images(Image.fromarray(levels))
    array = levels.astype(np.float32) / 255.0
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    same: list[Any] = [
        array,
        array[None],
        tensor,
        tensor[None],
        [array],
        [tensor[None]],
        [Image.fromarray(levels)],
    ]
    for image in same:
        assert torch.equal(read_images(image), expected)
    assert torch.equal(read_images([array, array]), expected.expand(2, -1, -1, -1))
    alpha = torch.zeros(1, 6, 8)
    assert torch.equal(read_images(torch.cat([tensor, alpha])), torch.ones(1, 3, 6, 8))
    assert torch.equal(read_images(tensor[:1]), tensor[:1].expand(1, 3, -1, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image is NoneType"),
        ("photo.png", "image is str"),
        ([], "empty list"),
        (
            torch.zeros(1, 16, 4, 4),
            r"image has shape \(1, 16, 4, 4\)\n.*Latents are decoded first: pipe.to_images",
        ),
        (np.zeros((3, 8, 8), np.float32), r"image has shape \(3, 8, 8\)"),
        (np.zeros((8, 8), np.float32), r"image has shape \(8, 8\)"),
        (np.full((8, 8, 3), 200, np.uint8), "values from 200 to 200.*\nDivide by 255"),
        (torch.full((1, 4, 8, 8), -1.0), "Latents are decoded first: pipe.to_images"),
        (torch.full((3, 8, 8), -1.0), r"values from -1 to -1.*\nBring them to \[0, 1\]"),
        (torch.full((3, 8, 8), torch.nan), "values from nan"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)], "several sizes: 6 x 8, 8 x 8"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_images(image)
