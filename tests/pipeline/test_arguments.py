"""Every argument of every pipeline with wrong values: a sentence that names it, before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentflow.errors import UserError
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.arguments import CHECKS
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

from .conftest import NAMES, GaussianFlow, quiet, tiny_text, tiny_vae

NAN, INF = float("nan"), float("inf")
SEED = torch.Generator
IMAGE, HOLE = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255)
IMAGES = torch.zeros(1, 3, 8, 8)
EMBEDS, LATENTS = torch.zeros(1, 3, 16), torch.zeros(1, 2, 4, 4)

NO_WHOLE = ["4", 2.5, 4.0, NAN, True, [4], 10**30, -1]
NO_NUMBER = ["4", NAN, INF, -INF, True, [4.0], 1j, 10**400, 10**5000]
NO_TEXT = [
    [],
    (),
    ["a hat", None],
    [None],
    3,
    b"a hat",
    {"a": "hat"},
    [["a hat"]],
    "half \ud83c",
    np.array(["a"]),
]
NO_CLASS = [[], ["hat", None], 1.0, [1.5], True, [True], "ht", 3, -1, [[0, 1]], {"hat": 1}, np.array([0.5]),
            torch.tensor([True]), np.int64(7), 10**30]  # fmt: skip
NO_LATENTS = [
    np.zeros((1, 2, 4, 4)), "noise", [LATENTS], LATENTS[0], torch.zeros(1, 3, 4, 4), torch.zeros(2, 2, 4, 4),
    torch.zeros(0, 2, 4, 4), LATENTS.long(), LATENTS.bool(), LATENTS * 1j, LATENTS + NAN, LATENTS / 0 + INF,
]  # fmt: skip
NO_EMBEDS = [EMBEDS[0], EMBEDS[None], torch.zeros(1, 3, 7), torch.zeros(1, 0, 16), torch.zeros(0, 3, 16),
             EMBEDS.long(), EMBEDS + NAN, EMBEDS.numpy(), [EMBEDS]]  # fmt: skip
NO_MASK = [torch.ones(3), torch.ones(1, 4), torch.ones(2, 3), [True], np.ones((1, 3)), torch.ones(1, 3) * 1j]
NO_SCALE = ["0.5", 0.5, ["scale"], {"scale": "0.5"}, {"scale": NAN}, {"scale": None}, {"scale": True}, {"scael": 0.5},
            {"scale": 0.5, "ip_adapter_masks": []}]  # fmt: skip
NO_SIZE = ["8x8", 8, (8,), (8, 8, 8), (8, 0), (8.0, 8), ("8", 8), (True, 8), (8, NAN), {8, 9}, (8, 10**30)]

#: argument -> values that no call may take; beside None, which means "as usual" only where it is the default
WRONG: dict[str, list[Any]] = {
    "prompt": NO_TEXT,
    "negative_prompt": NO_TEXT,
    "source_prompt": NO_TEXT,
    "class_labels": NO_CLASS,
    "source_class_labels": NO_CLASS,
    "height": [*NO_WHOLE, 0],
    "width": [*NO_WHOLE, 0],
    "num_inference_steps": [*NO_WHOLE, 0, 1_000_000],
    "sigmas": [
        [], "1.0", 0.5, [None], ["1.0"], [True], [NAN], [1.0, NAN], [INF, 0.5], [0.5, 1.0], [0.0, 0.5, 1.0], [0.0],
        [1.0, 0.5, 0.5], [1.5, 0.5], [1.0, -0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.5], [1.0, 1e-20], [[1.0, 0.5]],
        {1.0: 2}, np.array(0.5), torch.ones(2, 2),
    ],
    "guidance_scale": NO_NUMBER,
    "source_guidance_scale": NO_NUMBER,
    "control_scale": [*NO_NUMBER, {}, {"image": NAN}],
    "temperature": [*NO_NUMBER, 0.0, -1.0],
    "corrector": [*NO_NUMBER, -1.0],
    "guidance_interval": [0.5, (0.5,), (0.2, 0.6, 0.8), (0.6, 0.2), (-0.1, 0.5), (0.5, 1.5), (NAN, 1.0), ("0", "1"),
                          (None, 1.0), "01"],
    "num_images_per_prompt": [*NO_WHOLE, 0, 10**9, 10**400],
    "frames": [*NO_WHOLE, 0, 1, 10**9],
    "generator": [7, [], [None], (SEED(),), [SEED(), 7], "cpu", [SEED()] * 3],
    "latents": NO_LATENTS,
    "masked_image_latents": NO_LATENTS,
    "prompt_embeds": NO_EMBEDS,
    "negative_prompt_embeds": NO_EMBEDS,
    "source_prompt_embeds": NO_EMBEDS,
    "prompt_attention_mask": NO_MASK,
    "source_prompt_attention_mask": NO_MASK,
    "negative_prompt_attention_mask": NO_MASK,
    "max_sequence_length": [*NO_WHOLE, 0],
    "output_type": ["jpeg", "PIL", 3, ["pil"], True],
    "return_dict": ["no", 0, 1.0],
    "measure": ["no", 0],
    "callback_on_step_end": ["print", 3, [print]],
    "callback_on_step_end_tensor_inputs": ["latents", ["latent"], [3], {"latents"}],
    "solver": ["huen", 3, ["heun"], ""],
    "method": ["flowedits", 3, ["flowedit"], ""],
    "strength": [*NO_NUMBER, -0.1, 1.1],
    "draws": [*NO_WHOLE, 0],
    "plain_from": [*NO_NUMBER, -0.1, 1.1],
    "padding_mask_crop": NO_WHOLE,
    "feather": [*NO_NUMBER, -1.0],
    "seamless": ["no", 0, 1.0],
    "original_size": NO_SIZE,
    "target_size": NO_SIZE,
    "size": NO_SIZE,
    "vae": ["taesd", 3, SEED()],
    "count": [*NO_WHOLE, 0],
    "device": ["gpu9", 3.5, ["cpu"]],
    "do_classifier_free_guidance": ["no", 0],
    "lora_scale": NO_NUMBER,
    "images": ["a.png", IMAGE, [], IMAGES[0], IMAGES[:, :2], IMAGES[..., :5], IMAGES.long(), IMAGES + NAN],
    "joint_attention_kwargs": NO_SCALE,
    "attention_kwargs": NO_SCALE,
    "cross_attention_kwargs": NO_SCALE,
    "crops_coords_top_left": [*NO_SIZE[:4], (0, -1), (0.0, 0), NAN],
    "image": ["a.png", 3, [], [None], b"", np.zeros((8, 8, 3), object), np.zeros((8, 8, 3), complex),
              np.array([["a"]]), torch.zeros(3, 8, 8) + NAN, torch.zeros(3, 8, 8) * 1j, torch.zeros(3, 0, 8),
              torch.full((3, 8, 8), 255), np.full((8, 8, 3), 255, np.uint8), None],
    "mask_image": ["m.png", 3, [], [None], np.zeros((8, 8), object), torch.zeros(8, 8) + NAN, torch.zeros(2, 3, 8, 8),
                   torch.full((8, 8), 255), torch.zeros(0, 8), None],
    "control_image": [torch.rand(3, 8, 8), "edges.png", 3],  # the checkpoint takes none
    "like": [torch.rand(3, 8, 8), "a.png", 3],  # the checkpoint has no latent variable
    "reference_images": ["a.png", 3, [None], IMAGE],  # the checkpoint takes none
}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """name -> a method of a pipeline, and arguments with which it runs. The network takes captions and classes."""
    network = GaussianFlow(num_classes=3, text_dim=16, condition_channels=6)
    parts = {"vae": tiny_vae(), "transformer": network, "id2label": NAMES, **tiny_text()}
    pipe, image, inpaint, edit = (
        quiet(kind(**parts))
        for kind in (
            LatentFlowPipeline,
            LatentFlowImg2ImgPipeline,
            LatentFlowInpaintPipeline,
            LatentFlowEditPipeline,
        )
    )
    asked = {"prompt": "a red apple", "class_labels": 0, "num_inference_steps": 1}
    return {
        "generate": (pipe, asked),
        "image-to-image": (image, asked | {"image": IMAGE}),
        "inpaint": (inpaint, asked | {"image": IMAGE, "mask_image": HOLE, "method": "trained"}),
        "edit": (edit, asked | {"image": IMAGE}),
        "invert": (edit.invert, asked | {"image": IMAGE}),
        "interpolate": (edit.interpolate, asked),
        "encode_prompt": (pipe.encode_prompt, {"prompt": "a red apple"}),
        "prepare_noise": (pipe.prepare_noise, {"count": 1, "height": 8, "width": 8}),
        "encode_images": (pipe.encode_images, {"images": IMAGES}),
        "decode_latents": (pipe.decode_latents, {"latents": LATENTS}),
        "to_images": (pipe.to_images, {"latents": LATENTS}),
    }


def parameters(call: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(call if inspect.ismethod(call) else type(call).__call__).parameters)


METHODS = {
    "generate": LatentFlowPipeline.__call__,
    "image-to-image": LatentFlowImg2ImgPipeline.__call__,
    "inpaint": LatentFlowInpaintPipeline.__call__,
    "edit": LatentFlowEditPipeline.__call__,
    "invert": LatentFlowEditPipeline.invert,
    "interpolate": LatentFlowEditPipeline.interpolate,
}
# Methods that are called outside of a call as well.
PARTS = {
    name: getattr(LatentFlowPipeline, name)
    for name in ("encode_prompt", "prepare_noise", "encode_images", "decode_latents", "to_images")
}
PLACES = [
    (way, name)
    for way, method in {**METHODS, **PARTS}.items()
    for name in inspect.signature(method).parameters
    if name != "self"
]


# Images that may lack: prompts alone interpolate, and an edit needs no mask.
MAY_BE_NONE = {("interpolate", "image"), ("edit", "mask_image")}
# Latents of two images will do here.
TWO_LATENTS = {(way, "latents") for way in ("edit", "invert", "interpolate", "decode_latents", "to_images")}


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


def cases(way: str, name: str) -> list[Any]:
    default = inspect.signature({**METHODS, **PARTS}[way]).parameters[name].default
    values = [value for value in WRONG[name] if value is not None or (way, name) not in MAY_BE_NONE]
    values += [object(), NAN, b"1"]
    if (way, name) == ("encode_prompt", "num_images_per_prompt"):
        values.remove(10**9)  # images would not fit into memory, their embeddings may
    if (way, name) in TWO_LATENTS:
        values = [value for value in values if getattr(value, "shape", ()) != (2, 2, 4, 4)]
    return [*values, *([] if default is None else [None])]


@pytest.mark.parametrize(("way", "name"), PLACES, ids=[f"{way}-{name}" for way, name in PLACES])
def test_a_wrong_argument_is_named_before_anything_is_computed(
    way: str, name: str, calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, usual = calls[way]
    pipe = getattr(call, "__self__", call)
    for part in (pipe.transformer, pipe.text_encoder):
        monkeypatch.setattr(part, "forward", forbid)
    for method in ("encode", "decode"):
        monkeypatch.setattr(pipe.vae, method, forbid)
    embeds = name.replace("attention_mask", "embeds")
    for value in cases(way, name):
        arguments = usual | {name: value}
        if "embeds" in embeds:
            arguments |= {"prompt": None, "prompt_embeds": EMBEDS, embeds: EMBEDS} | {name: value}
        if name in ("padding_mask_crop", "feather"):
            arguments["mask_image"] = HOLE
        if name == "latents" and way in ("edit", "invert"):  # those of the images, in their place
            arguments["image"] = None
        with pytest.raises(UserError) as caught:
            call(**arguments)
        what, fix = caught.value.what, caught.value.fix
        assert fix, value
        assert "\n" not in what and len(what) < 250, value
        assert any(word in what for word in names_of(name)), f"{value!r}: {what}"


def names_of(name: str) -> list[str]:
    """What an error may call an argument."""
    others = {
        "class_labels": ["class"],
        "source_class_labels": ["class"],
        "generator": ["generators"],
        "num_images_per_prompt": ["images"],
        "frames": ["images"],
        "callback_on_step_end_tensor_inputs": ["callback tensor"],
        "guidance_interval": ["guidance interval"],
        "count": ["images"],
        "image": ["array", "tensor"],
        "mask_image": ["array", "tensor"],
    }
    return [name, *others.get(name, [])]


def test_every_argument_has_wrong_values_and_every_check_an_argument() -> None:
    assert {name for _, name in PLACES} == set(WRONG)
    assert set(CHECKS) == set(WRONG) - {"image", "mask_image", "control_image", "like", "reference_images"}


@pytest.mark.parametrize("way", METHODS)
def test_an_argument_that_is_not_there_is_named_with_what_is(way: str, calls: dict[str, Any]) -> None:
    call, usual = calls[way]
    for name, message in (
        ("num_inference_step", r"takes no argument 'num_inference_step'\nDid you mean num_inference_steps\?"),
        ("timesteps", r"takes no argument 'timesteps'\nPass sigmas"),
        ("zzz", r"takes no argument 'zzz'\nIt takes .*prompt, .*attention_kwargs"),
    ):
        with pytest.raises(UserError, match=message):
            call(**usual, **{name: 3})
    with pytest.raises(UserError, match="joint_attention_kwargs and attention_kwargs are given"):
        call(**usual, joint_attention_kwargs={"scale": 0.5}, attention_kwargs={"scale": 0.5})


def test_arguments_that_do_not_fit_one_another_or_the_text_encoder(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, usual = calls["generate"]
    monkeypatch.setattr(pipe.text_encoder.config, "max_position_embeddings", 8, raising=False)
    for changes, message in (
        (
            {"prompt": ["a", "b"], "class_labels": [0, 1, 2]},
            "numbers of prompts and class_labels differ: .2, 3",
        ),
        ({"max_sequence_length": 9}, "max_sequence_length is 9\nThe text encoder takes 8 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**usual | changes)


@pytest.mark.parametrize("way", METHODS)
def test_what_the_numbers_of_other_libraries_mean_is_what_they_are(way: str, calls: dict[str, Any]) -> None:
    """numpy's whole numbers, fractions, tuples and tensors of classes draw what plain Python's do."""
    call, usual = calls[way]
    known = parameters(call)
    plain = {"class_labels": [1], "guidance_scale": 2.0, "strength": 0.5, "height": 8, "width": 8}
    foreign = {
        "class_labels": torch.tensor([1]), "guidance_scale": np.float32(2.0), "strength": Fraction(1, 2),
        "height": np.int64(8), "width": np.uint8(8), "num_inference_steps": np.int32(1), "prompt": ("a red apple",),
        "num_images_per_prompt": np.int64(1), "frames": np.int16(8),
    }  # fmt: skip
    shared = {} if way == "invert" else {"generator": None, "output_type": "latent"}

    def drawn(changes: dict[str, Any]) -> Any:
        arguments = usual | shared | {name: value for name, value in changes.items() if name in known}
        if "generator" in arguments:
            arguments["generator"] = torch.Generator().manual_seed(3)
        out = call(**arguments)
        return out.latents if way == "invert" else out.images

    assert torch.equal(drawn(plain), drawn(foreign))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            {"latents": torch.zeros(1, 2, 4, 5)},
            r"latents that the callback returned after step 1 is a Tensor of shape",
        ),
        (
            {"latents": LATENTS + NAN},
            "latents that the callback returned after step 1 is not finite: 32 of 32",
        ),
        ({"latents": None}, "latents that the callback returned after step 1 is None"),
        ({"prompt_embeds": torch.zeros(1, 2, 7)}, "prompt_embeds that the callback returned after step 1"),
        ({"negative_prompt_embeds": EMBEDS}, "Leave it out: this call has none"),
        ([LATENTS], "callback_on_step_end returned"),
    ],
)
@pytest.mark.parametrize("scheduler", [False, True])
def test_what_a_callback_returns_is_checked(
    returned: Any, message: str, scheduler: bool, calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe, usual = calls["generate"]
    if scheduler:
        monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match=message):
        pipe(**usual, callback_on_step_end=lambda *_: returned)
