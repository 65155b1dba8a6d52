"""What users of diffusers take for granted of every pipeline, around both networks.

diffusers' own tests of pipelines are run as well, outside of this repository: docs/reference/diffusers.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.autoencoder import mask_channels
from latentflow.models import UNet

from .conftest import awake, close, quiet, tiny_dit, tiny_text, tiny_vae
from .test_every_pipeline import KINDS

MASKS = mask_channels(tiny_vae())


def tiny_unet(**config: Any) -> UNet:
    network = UNet(in_channels=2, channels=(8, 16), head_dim=8, layers_per_block=1, sample_size=4, **config)
    awake(network)
    return network


@pytest.fixture(params=[tiny_dit, tiny_unet])
def components(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "transformer": request.param(text_dim=16, condition_channels=MASKS),
        **tiny_text(),
    }


@pytest.fixture(params=KINDS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(way: str, components: dict[str, Any]) -> Any:
    return quiet(KINDS[way](**components))


def call_of(pipe: Any, images: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a short call that fit the pipeline."""
    call: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2, "output_type": "pt"}
    if type(pipe) is not KINDS["generate"]:
        call |= {"image": images(), "strength": 1.0}
    if type(pipe) is KINDS["inpaint"]:
        mask = torch.zeros(8, 8)
        mask[2:6, 2:6] = 1.0
        call["mask_image"] = mask
    return call | {"generator": torch.Generator().manual_seed(0)} | changes


def drawn(pipe: Any, images: Any, **changes: Any) -> Tensor:
    made: Tensor = pipe(**call_of(pipe, images, **changes)).images
    return made


def test_the_tuple_holds_what_the_output_holds(pipe: Any, images: Any) -> None:
    whole = drawn(pipe, images)
    first, *others = pipe(**call_of(pipe, images, return_dict=False))
    assert torch.equal(first, whole) and not others


def test_a_pipeline_is_its_components(pipe: Any, components: dict[str, Any], images: Any) -> None:
    assert set(pipe.components) == {*components, "scheduler"}
    assert torch.equal(drawn(quiet(type(pipe)(**pipe.components)), images), drawn(pipe, images))


def test_a_callback_gets_what_it_may_ask_for(pipe: Any, images: Any) -> None:
    seen: list[set[str]] = []

    def look(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(set(tensors))
        return tensors

    names = pipe._callback_tensor_inputs
    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    plain = drawn(pipe, images, guidance_scale=2.0)
    assert torch.equal(drawn(pipe, images, guidance_scale=2.0, **asked), plain)
    assert seen == [set(names)] * pipe.num_timesteps


def test_what_a_callback_puts_in_place_of_the_latents_is_the_result(pipe: Any, images: Any) -> None:
    def empty(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = drawn(pipe, images, output_type="latent", callback_on_step_end=empty)
    hole = (
        result[..., 1:3, 1:3] if type(pipe) is KINDS["inpaint"] else result
    )  # the rest keeps the image's latents
    assert not hole.any()


def test_a_callback_raises_the_guidance(pipe: Any, images: Any) -> None:
    def more(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe._guidance_scale += 1.0

    plain = drawn(pipe, images, guidance_scale=2.0)
    raised = drawn(pipe, images, guidance_scale=2.0, callback_on_step_end=more)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert (raised - plain).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["generate", "image-to-image", "inpaint"], indirect=True)
def test_embeddings_go_from_a_pipeline_that_only_encodes_to_one_that_cannot(
    pipe: Any, components: dict[str, Any], images: Any
) -> None:
    """The values that ``encode_prompt`` returns are in the order of the call's arguments."""
    text = {name: components[name] for name in ("text_encoder", "tokenizer")}
    with torch.no_grad():
        embeds, _, mask, _ = type(pipe)(None, None, **text).encode_prompt("a red apple")
    without = quiet(type(pipe)(components["vae"], components["transformer"]))
    encoded = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    close(drawn(without, images, **encoded), drawn(pipe, images), 1e-5)


@pytest.mark.parametrize("components", [tiny_dit], indirect=True)
def test_each_component_is_loaded_where_and_in_which_precision_it_is_asked_for(
    pipe: Any, tmp_path: Path, images: Any
) -> None:
    pipe.save_pretrained(tmp_path)
    chosen = {"transformer": torch.bfloat16, "default": torch.float32}
    loaded = type(pipe).from_pretrained(tmp_path, dtype=chosen)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    placed = quiet(type(pipe).from_pretrained(tmp_path, device_map="cpu"))
    close(drawn(placed, images), drawn(pipe, images), 1e-5)


def test_what_saves_memory_changes_no_image(pipe: Any, images: Any) -> None:
    two = {"prompt": ["a red apple", "green tree"], "guidance_scale": 2.0}
    plain = drawn(pipe, images, **two)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    close(drawn(pipe, images, **two), plain, 1e-4)
    pipe.disable_attention_slicing()
    pipe.vae.disable_slicing()
    assert torch.equal(drawn(pipe, images, **two), plain)
