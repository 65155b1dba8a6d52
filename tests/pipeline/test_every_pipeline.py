"""Promises of a call that all four pipelines keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.autoencoder import mask_channels
from latentflow.errors import UserError
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

from .conftest import NAMES, close, quiet, seeds, tiny_dit, tiny_vae

KINDS = {
    "generate": LatentFlowPipeline,
    "image-to-image": LatentFlowImg2ImgPipeline,
    "inpaint": LatentFlowInpaintPipeline,
    "edit": LatentFlowEditPipeline,
}


@pytest.fixture(params=KINDS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(way: str) -> Any:
    vae = tiny_vae()
    network = tiny_dit(num_classes=3, condition_channels=mask_channels(vae))
    return quiet(KINDS[way](vae, network, id2label=NAMES))


def call_of(way: str, images: Tensor, **changes: Any) -> dict[str, Any]:
    """Arguments with which that pipeline draws a hat for each image, of its size where the pipeline takes one."""
    call = {"class_labels": 1, "num_inference_steps": 4, "output_type": "latent"}
    if way != "generate":
        call["image"] = images
    if way == "inpaint":
        call |= {"mask_image": torch.ones(images.shape[2:]), "solver": "ddpm"}
    return call | changes


def test_a_generator_decides_its_own_image_alone(way: str, pipe: Any, images: Any) -> None:
    own = images(2)
    labels = {"class_labels": [0, 1], "num_images_per_prompt": 2}
    together = pipe(**call_of(way, own, generator=seeds(5, 6, 7, 8), **labels)).images
    close(together[2:3], pipe(**call_of(way, own[1:], generator=seeds(7))).images, 1e-5)
    assert (together[2] - together[3]).abs().max() > 1e-3
    again = pipe(**call_of(way, own, generator=seeds(5, 6, 7, 8), **labels)).images
    assert torch.equal(again, together)


def test_an_interrupted_call_keeps_what_is_there_and_the_size(way: str, pipe: Any, images: Any) -> None:
    steps: list[int] = []

    def stop(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        steps.append(i)
        pipe._interrupt = True

    call = call_of(way, images(1, 7, 9), callback_on_step_end=stop, output_type="pil")
    assert pipe(**call).images[0].size == ((8, 8) if way == "generate" else (9, 7))
    assert steps == [0]


def test_hooks_are_freed_after_the_call(way: str, pipe: Any, images: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = list(pipe._all_hooks)
    assert len(hooks) == 2  # transformer, vae
    assert len(pipe(**call_of(way, images(), output_type="pil")).images) == 1
    # diffusers frees the hooks by putting fresh ones in their place.
    assert all(hook not in pipe._all_hooks for hook in hooks)


def test_an_autoencoder_that_is_not_loaded_is_named(way: str, pipe: Any, images: Any) -> None:
    pipe.vae = None
    with pytest.raises(UserError, match=r"without its autoencoder\n.*output_type='latent'"):
        pipe(**call_of(way, images(), output_type="pil"))
