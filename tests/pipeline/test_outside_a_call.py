"""The pipelines' methods outside of a call: without gradients, of any number type, and offloaded again afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import integrate
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.arguments import ConditionArguments

from .conftest import close, latents_of, quiet, seeds

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def pipe(dit_folder: Path) -> Any:
    return quiet(LatentFlowPipeline.from_pretrained(dit_folder))


@pytest.mark.parametrize("dtype", TYPES)
def test_latents_of_any_type_become_images(dtype: torch.dtype, pipe: Any) -> None:
    call = {"prompt": ["a red apple"] * 2, "num_inference_steps": 2}
    latents = pipe(**call, generator=seeds(1, 2), output_type="latent").images
    expected = pipe(**call, generator=seeds(1, 2), output_type="np").images
    given = latents.to(dtype).requires_grad_()
    images = pipe.to_images(given, "np")
    assert np.abs(images - expected).max() < {2: 0.02, 4: 1e-6, 8: 1e-6}[dtype.itemsize]
    decoded = pipe.decode_latents(given)
    assert decoded.dtype == torch.float32 and not decoded.requires_grad
    assert [image.size for image in pipe.to_images(given)] == [(8, 8)] * 2
    assert pipe.to_images(given, "pt", (5, 7)).shape == (2, 3, 5, 7)
    assert pipe.to_images(given, "latent") is given


@pytest.mark.parametrize("dtype", TYPES)
def test_images_of_any_type_become_latents(dtype: torch.dtype, pipe: Any, images: Any) -> None:
    latents = pipe.encode_images((2.0 * images(2) - 1.0).to(dtype).requires_grad_())
    assert latents.dtype == torch.float32 and not latents.requires_grad
    close(latents, latents_of(pipe, images(2)), {2: 0.05, 4: 0.0, 8: 1e-5}[dtype.itemsize])
    pipe.vae.to(torch.float16)
    assert pipe.encode_images(torch.zeros(1, 3, 8, 8, dtype=dtype)).isfinite().all()


def test_a_call_in_its_parts_is_the_call(pipe: Any) -> None:
    whole = pipe("a red apple", num_inference_steps=3, generator=seeds(1)[0], output_type="np").images
    running = pipe.start_call(ConditionArguments(prompt="a red apple"), 8, 8)
    noise = pipe.prepare_noise(1, 8, 8, seeds(1)[0])
    latents = pipe.sample(running.velocity, noise, 3)
    assert not latents.requires_grad
    assert np.array_equal(pipe.to_images(latents, "np"), whole)
    embeds, _, mask, _ = pipe.encode_prompt("a red apple")
    assert not embeds.requires_grad
    call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "generator": seeds(1)[0]}
    assert np.array_equal(pipe(**call, num_inference_steps=3, output_type="np").images, whole)


def test_the_flow_model_is_what_one_differentiates(pipe: Any) -> None:
    latents = torch.zeros(1, 2, 4, 4, requires_grad=True)
    pipe.model.decode(latents).square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_shapes_that_do_not_fit_name_what_does(pipe: Any) -> None:
    for call, message in (
        (lambda: pipe.decode_latents(torch.zeros(1, 3, 4, 4)), r"takes \(B, 2, h, w\)"),
        (lambda: pipe.to_images(torch.zeros(2, 4, 4)), r"floating-point tensor \(B, C, h, w\)"),
        (lambda: pipe.to_images(np.zeros((1, 2, 4, 4))), "a ndarray of shape"),
        (lambda: pipe.to_images([torch.zeros(2, 4, 4)]), r"floating-point tensor \(B, C, h, w\)"),
        (lambda: pipe.encode_images(torch.zeros(1, 3, 9, 8)), r"shape \(1, 3, 9, 8\)\n.* 2 divides H and W"),
        (lambda: pipe.encode_images(torch.zeros(1, 8, 8, 3)), r"shape \(1, 8, 8, 3\)\nPass \(B, 3, H, W\)"),
        (lambda: pipe.prepare_noise(2, 8, 8, seeds(1)), "1 generators for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def parts(pipe: Any) -> dict[str, Any]:
    return {
        "to_images": lambda: pipe.to_images(torch.zeros(1, 2, 4, 4)),
        "decode_latents": lambda: pipe.decode_latents(torch.zeros(1, 2, 4, 4)),
        "encode_images": lambda: pipe.encode_images(torch.zeros(1, 3, 8, 8)),
        "encode_prompt": lambda: pipe.encode_prompt("a red apple"),
    }


def test_what_was_brought_to_the_device_is_let_go_of_afterwards(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    for name, part in parts(pipe).items():
        hooks = list(pipe._all_hooks)
        part()
        # diffusers frees the hooks by putting fresh ones in their place.
        assert all(hook not in pipe._all_hooks for hook in hooks), name


def test_within_a_call_nothing_is_let_go_of(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    hooks, previews = list(pipe._all_hooks), []

    def preview(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        previews.extend(pipe.to_images(tensors["prediction"]))
        assert pipe.is_running and pipe._all_hooks == hooks

    wanted = {"callback_on_step_end_tensor_inputs": ["prediction"]}
    pipe("a red apple", num_inference_steps=2, callback_on_step_end=preview, **wanted)
    assert [image.size for image in previews] == [(8, 8)] * 2
    assert not pipe.is_running and pipe._all_hooks != hooks


def test_after_an_error_it_is_let_go_of_too(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = list(pipe._all_hooks)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        pipe("a red apple", num_inference_steps=2, callback_on_step_end=fail)
    assert not pipe.is_running and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert all(hook not in pipe._all_hooks for hook in hooks)


def test_our_own_solvers_take_the_velocity_of_a_call(pipe: Any) -> None:
    running = pipe.start_call(ConditionArguments(prompt="a red apple", guidance_scale=1.0), 8, 8)
    noise = pipe.prepare_noise(1, 8, 8, seeds(1)[0])
    with torch.no_grad():
        by_hand = integrate(running.velocity(), noise, [0.0, 0.5, 1.0], "heun")
    close(by_hand, pipe.sample(running.velocity, noise, 2, solver="heun"), 1e-6)
