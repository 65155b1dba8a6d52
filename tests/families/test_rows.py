"""Rows in the place of prompts: encoded once, they are enough for every call, without text encoders."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentflow import LatentFlowEditPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.families import Rows
from latentflow.families.pretrained import PretrainedModel
from latentflow.families.text_encoders import TEXT_ENCODERS, embeds_width
from latentflow.utils.files import SHIPPED_CHECKPOINTS

from .test_memory import OFFLOADING, own_model, pipe_of
from .test_pretrained import LAYOUTS, PROMPTS, opened, seeded
from .tiny import TINY, checkpoint


@pytest.mark.parametrize(
    "name",
    [  # of the others, below, one pipeline encodes and another draws
        name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
        if name != "DiTPipeline"
    ],
)
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
    rows = model.encode_prompt(PROMPTS)
    encoders = [part for part in model.pipeline.components if part.startswith("text_encoder")]
    model.drop_text_encoders()
    assert all(getattr(model.pipeline, part) is None for part in encoders)
    drawn = pipe(prompt_embeds=rows, generator=both(), **few).images
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    if encoders:
        with pytest.raises(UserError, match=r"the pipeline has no text_encoder(.|\n)*prompt_embeds=rows"):
            pipe(PROMPTS, **few)


def trainable(name: str) -> PretrainedModel:
    """Return a model over components of its own, whose weights require gradients as those that diffusers loads do."""
    pipeline = deepcopy(checkpoint(name))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(True)
    return type(opened(name)[1])(pipeline, **TINY[name].call)


@pytest.mark.parametrize(
    "name", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLPipeline", "Kandinsky5T2IPipeline"]
)
def test_the_memory_of_dropped_encoders_is_free(name: str) -> None:
    """With gradients switched on, as in a script: rows have no graph that keeps the weights. Copies can be made."""
    model = trainable(name)
    pipe = pipe_of(LatentFlowInpaintPipeline, model)
    encoders = [part for part in model.pipeline.components if part.startswith("text_encoder")]
    weights = [
        weakref.ref(weight) for part in encoders for weight in getattr(model.pipeline, part).parameters()
    ]
    assert weights and all(weight().requires_grad for weight in weights)
    rows = pipe.model.encode_prompt(["a hat", "a red scarf"])
    pipe.model.drop_text_encoders()
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
    few: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    few |= {"image": torch.rand(1, 3, 16, 16), "mask_image": torch.ones(1, 1, 16, 16)}
    drawn = pipe(prompt_embeds=rows, generator=seeded(), **few).images
    again = deepcopy(pipe)(prompt_embeds=rows, generator=seeded(), **few).images
    assert torch.equal(drawn, again)


def test_rows_that_can_be_differentiated() -> None:
    """By `embed`, as the docstring of `encode_prompt` says."""
    model = trainable("StableDiffusion3Pipeline")
    rows = Rows(model, model.embed(["a hat"]))
    x = torch.zeros(1, *model.latent_shape(16, 16))
    model.velocity(rows, guidance_scale=1.0)(x, torch.tensor(0.5)).square().sum().backward()
    words = model.pipeline.text_encoder_3.get_input_embeddings().weight
    assert words.grad is not None and words.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["model", "sequential", "leaves"])
def test_encoders_that_are_offloaded_are_dropped(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "StableDiffusionXLPipeline"
    pipe = pipe_of(LatentFlowPipeline, type(opened(name)[1])(deepcopy(checkpoint(name))))
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(PROMPTS[0], generator=seeded(), **few).images
    OFFLOADING[how](pipe, monkeypatch)
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


def test_an_edit_without_text_encoders_starts_from_the_empty_prompt() -> None:
    name, image = "StableDiffusion3Pipeline", torch.rand(1, 3, 16, 16, generator=seeded(1))
    whole, few = own_model(name), {"num_inference_steps": 2, "output_type": "pt"}
    parts = {
        part: None for part in whole.pipeline.components if part.startswith(("text_encoder", "tokenizer"))
    }
    bare = type(whole)(type(whole.pipeline)(**{**whole.pipeline.components, **parts}))
    call: dict[str, Any] = {"image": image, **few}
    expected = pipe_of(LatentFlowEditPipeline, whole)(PROMPTS[0], generator=seeded(), **call).images
    rows = whole.encode_prompt(PROMPTS[:1])
    drawn = pipe_of(LatentFlowEditPipeline, bare)(prompt_embeds=rows, generator=seeded(), **call).images
    torch.testing.assert_close(drawn, expected, rtol=0.0, atol=1e-5)


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


#: constructors that ask the network or the autoencoder for something
NEED_A_NETWORK = {
    "BriaPipeline",
    "BriaPipeline-fixed",
    "BriaFiboPipeline",
    "BriaFibo2Pipeline",
    "PRXPipeline",
}
APART = [
    name
    for name in TINY
    if name
    not in NEED_A_NETWORK | {"DiTPipeline", "GlmImagePipeline", "Ideogram4Pipeline", "OmniGenPipeline"}
]


def without(name: str, leave_out: Callable[[str], bool]) -> PretrainedModel:
    """Return a model over the shared checkpoint, without components of some names."""
    pipe = checkpoint(name)
    has = {**pipe.config, **pipe.components}
    taken = inspect.signature(type(pipe)).parameters
    given = {part: None if leave_out(part) else value for part, value in has.items() if part in taken}
    made = type(pipe)(**given)
    if hasattr(pipe, "tokenizer_max_length"):  # shorter than the class has it
        made.tokenizer_max_length = pipe.tokenizer_max_length
    return type(opened(name)[1])(made, **TINY[name].call)


@pytest.mark.parametrize("name", APART)
def test_one_pipeline_encodes_and_another_draws(name: str) -> None:
    """One has the text encoders alone, the other has none: the images are those of the whole pipeline."""
    networks = ("transformer", "unet", "vae")
    encodes = without(name, lambda part: part in networks)
    pipe = pipe_of(LatentFlowPipeline, without(name, lambda part: part.startswith(TEXT_ENCODERS)))
    side = opened(name)[2].side
    few: dict[str, Any] = {
        "height": side, "width": side, "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip
    rows = encodes.encode_prompt(PROMPTS)
    whole = pipe_of(LatentFlowPipeline, own_model(name))
    expected = whole(PROMPTS, generator=[seeded(0), seeded(1)], **few).images
    drawn = pipe(prompt_embeds=rows, generator=[seeded(0), seeded(1)], **few).images
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    if whole.model.true_guidance(whole.model.guidance(2.0)) != 1.0:
        again = pipe(
            prompt_embeds=rows,
            negative_prompt_embeds=encodes.encode_negative(["a hat"]),
            generator=[seeded(0), seeded(1)],
            guidance_scale=2.0,
            **few,
        ).images
        expected = whole(
            PROMPTS, negative_prompt="a hat", generator=[seeded(0), seeded(1)], guidance_scale=2.0, **few
        ).images
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_drawn_by_the_pipeline_that_is_called() -> None:
    """Two checkpoints of one class: the rows of one are drawn by the network of the other."""
    name = "StableDiffusion3Pipeline"
    first, second = own_model(name), type(opened(name)[1])(deepcopy(checkpoint(name)), **TINY[name].call)
    for weight in second.network.parameters():
        weight.mul_(1.1)
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    both = [pipe_of(LatentFlowPipeline, model) for model in (first, second)]
    rows = first.encode_prompt(PROMPTS[:1])
    of_first, of_second = (pipe(PROMPTS[:1], generator=seeded(), **few).images for pipe in both)
    assert not torch.allclose(of_first, of_second, atol=1e-3)
    torch.testing.assert_close(both[1](prompt_embeds=rows, generator=seeded(), **few).images, of_second)
    guided = both[1](
        prompt_embeds=second.encode_prompt(PROMPTS[:1]),
        negative_prompt_embeds=first.encode_negative(["hat"]),
        generator=seeded(),
        **few,
    ).images
    expected = both[1](PROMPTS[:1], negative_prompt="hat", generator=seeded(), **few).images
    torch.testing.assert_close(guided, expected)


def test_rows_of_another_width_are_refused() -> None:
    model, other = own_model("StableDiffusion3Pipeline"), own_model("StableDiffusion3Pipeline")
    rows = other.encode_prompt(PROMPTS[:1])
    wide = replace(rows, values={**rows.values, "embeds": torch.zeros(1, 4, 48)})
    with pytest.raises(UserError, match=r"have embeddings of width 48, but this network takes 32"):
        pipe_of(LatentFlowPipeline, model)(prompt_embeds=wide, height=16, width=16)


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("DiTPipeline", "OmniGenPipeline")])
def test_the_width_that_a_network_takes(name: str) -> None:
    """Its config says the width of what the family encodes."""
    model = opened(name)[1]
    if model.needs_images:
        pytest.skip("it encodes no prompt alone")
    rows = model.encode_prompt(PROMPTS[:1])
    assert "embeds" not in rows.values or rows.values["embeds"][0].shape[-1] == embeds_width(
        model.network.config
    )


def test_what_are_no_rows_is_refused() -> None:
    """With advice that holds for this model too."""
    pipe = pipe_of(LatentFlowPipeline, own_model("AuraFlowPipeline"))
    with pytest.raises(UserError, match=r"prompt_embeds is 'x'\nPass rows: pipe\.model\.encode_prompt"):
        pipe(prompt_embeds="x", height=16, width=16)
    with pytest.raises(
        UserError, match=r"given to an AuraFlowModel as a tensor\nA pretrained model takes rows"
    ):
        pipe(prompt_embeds=torch.zeros(1, 4, 16), height=16, width=16)


def test_no_rows_are_refused() -> None:
    model = own_model("StableDiffusion3Pipeline")
    rows = model.encode_prompt(PROMPTS[:1])
    pipe = pipe_of(LatentFlowPipeline, model)
    with pytest.raises(UserError, match="prompt_embeds hold no rows"):
        pipe(prompt_embeds=rows[[]], height=16, width=16)
    with pytest.raises(UserError, match="negative_prompt_embeds hold no rows"):
        pipe(prompt_embeds=rows, negative_prompt_embeds=rows[[]], height=16, width=16)


def test_an_error_is_not_blamed_on_an_encoder_that_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 3 without T5 encodes; what else goes wrong keeps its own message."""
    model = without("StableDiffusion3Pipeline", lambda part: part in ("text_encoder_3", "tokenizer_3"))
    assert len(model.encode_prompt(PROMPTS)) == 2

    def broken(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(model.pipeline, "encode_prompt", broken)
    for error in (TypeError("unexpected keyword"), UserError("the prompt is refused", "Give another.")):
        with pytest.raises(type(error), match=str(error.args[0]).splitlines()[0]):
            model.encode_prompt(PROMPTS)


def test_rows_of_another_width_are_refused_by_our_own_models() -> None:
    pipe = LatentFlowPipeline.from_pretrained(SHIPPED_CHECKPOINTS / "emoji-64")
    rows = pipe.model.encode_prompt(PROMPTS[:1])
    width = rows.values["text"].shape[-1]  # type: ignore[union-attr]
    wide = replace(rows, values={**rows.values, "text": torch.zeros(1, 4, width + 1)})
    with pytest.raises(UserError, match=rf"shape \(1, 4, {width + 1}\)\nThe network takes \(B, L, {width}\)"):
        pipe(prompt_embeds=wide)
