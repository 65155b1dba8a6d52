"""Rows in the place of prompts: encoded once, they are enough for every call, without text encoders."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow import LatentFlowEditPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.utils.files import SHIPPED_CHECKPOINTS

from .test_memory import OFFLOADING, own_model, pipe_of
from .test_pretrained import PROMPTS, opened, seeded
from .tiny import TINY, checkpoint


@pytest.mark.parametrize("name", [name for name in TINY if name != "DiTPipeline"])
def test_rows_are_enough(name: str) -> None:
    """Prompts are encoded once; then the encoders go, and the images are the same, guided as well."""
    side = opened(name)[2].side
    pipe = pipe_of(LatentFlowPipeline, own_model(name))
    model = pipe.model
    few: dict[str, Any] = {
        "height": side, "width": side, "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip

    def both() -> list[torch.Generator]:
        return [seeded(0), seeded(1)]

    expected = pipe(PROMPTS, generator=both(), **few).images
    with torch.no_grad():
        rows = model.encode_prompt(PROMPTS)
    encoders = [part for part in model.pipeline.components if part.startswith("text_encoder")]
    with torch.no_grad():
        model.drop_text_encoders()
    assert all(getattr(model.pipeline, part) is None for part in encoders)
    drawn = pipe(prompt_embeds=rows, generator=both(), **few).images
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    if encoders:
        with pytest.raises(UserError, match=r"the pipeline has no text_encoder(.|\n)*prompt_embeds=rows"):
            pipe(PROMPTS, **few)


@pytest.mark.parametrize("how", ["model", "sequential", "leaves"])
def test_encoders_that_are_offloaded_are_dropped(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "StableDiffusionXLPipeline"
    pipe = pipe_of(LatentFlowPipeline, type(opened(name)[1])(deepcopy(checkpoint(name))))
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(PROMPTS[0], generator=seeded(), **few).images
    OFFLOADING[how](pipe, monkeypatch)
    with torch.no_grad():
        rows = pipe.model.encode_prompt(PROMPTS[:1])
    encoder = weakref.ref(pipe.text_encoder_2)
    pipe.model.drop_text_encoders()
    gc.collect()
    assert encoder() is None  # no hook keeps it
    for _ in range(2):
        drawn = pipe(prompt_embeds=rows, generator=seeded(), **few).images
        torch.testing.assert_close(drawn, expected, rtol=0.0, atol=1e-4)


def test_all_calls_take_rows() -> None:
    name, image = "StableDiffusion3Pipeline", torch.rand(1, 3, 16, 16, generator=seeded(1))
    model = own_model(name)
    mask = torch.ones(1, 1, 16, 16)
    few: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    with torch.no_grad():
        first, second = model.encode_prompt(PROMPTS[:1]), model.encode_prompt(PROMPTS[1:])
        negative = model.encode_negative(["hat"])
    edit = pipe_of(LatentFlowEditPipeline, model)
    inpaint = pipe_of(LatentFlowInpaintPipeline, model)

    def drawn(one: dict[str, Any], other: dict[str, Any], frames: dict[str, Any]) -> list[Tensor]:
        return [
            inpaint(image=image, mask_image=mask, generator=seeded(), **few, **one).images,
            edit(image=image, generator=seeded(), **few, **one, **other).images,
            edit.interpolate(frames=3, height=16, width=16, generator=seeded(), **few, **frames).images,
        ]

    by_text = drawn(
        {"prompt": PROMPTS[0], "negative_prompt": "hat"}, {"source_prompt": PROMPTS[1]}, {"prompt": PROMPTS}
    )
    model.drop_text_encoders()
    by_rows = drawn(
        {"prompt_embeds": first, "negative_prompt_embeds": negative},
        {"source_prompt_embeds": second},
        {"prompt_embeds": first.cat([first, second])},
    )
    still = edit.interpolate(
        frames=2, height=16, width=16, generator=seeded(), prompt_embeds=first, **few
    ).images  # one row for all frames
    torch.testing.assert_close(still[0], still[1], rtol=0.0, atol=1e-5)
    for image_by_text, image_by_rows in zip(by_text, by_rows, strict=True):
        torch.testing.assert_close(image_by_text, image_by_rows, rtol=0.0, atol=1e-5)


def test_our_own_checkpoints_take_rows_too() -> None:
    pipe = LatentFlowPipeline.from_pretrained(SHIPPED_CHECKPOINTS / "emoji-64")
    pipe.set_progress_bar_config(disable=True)
    few: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(PROMPTS, generator=[seeded(0), seeded(1)], **few).images
    with torch.no_grad():
        rows = pipe.model.encode_prompt(PROMPTS)
    pipe.text_encoder = None
    drawn = pipe(prompt_embeds=rows, generator=[seeded(0), seeded(1)], **few).images
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_another_model_are_refused() -> None:
    with torch.no_grad():
        rows = opened("FluxPipeline")[1].encode_prompt(PROMPTS[:1])
    pipe = pipe_of(LatentFlowPipeline, opened("StableDiffusion3Pipeline")[1])
    with pytest.raises(UserError, match=r"prompt_embeds are rows of a FluxModel, but the model is a Stable"):
        pipe(prompt_embeds=rows, height=16, width=16)
    with pytest.raises(UserError, match=r"as a tensor\nA pretrained model takes rows"):
        pipe(prompt_embeds=torch.zeros(1, 4, 32), height=16, width=16)
