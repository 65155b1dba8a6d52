"""Our pipelines over every family: drawn as by the stock pipeline, inpainted with the kept pixels, edited."""

from __future__ import annotations

import pickle
import re
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Img2ImgPipeline
from safetensors.torch import load_file, save_file

from latentflow import (
    FlowModel,
    LatentFlowEditPipeline,
    LatentFlowImg2ImgPipeline,
    LatentFlowInpaintPipeline,
    LatentFlowPipeline,
)
from latentflow.errors import UserError
from latentflow.pipeline.over_model import ModelPipeline
from latentflow.utils.files import SHIPPED_CHECKPOINTS

from .test_pretrained import PROMPTS, each_family, each_layout, opened, seeded
from .tiny import checkpoint


def over(kind: Any, name: str) -> Any:
    pipe = kind(opened(name)[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def condition(name: str, count: int = 1) -> dict[str, Any]:
    model = opened(name)[1]
    return {"prompt": PROMPTS[:count]} if model.takes_text else {"class_labels": [1, 3][:count]}


def random_image(name: str, seed: int = 0) -> torch.Tensor:
    side = opened(name)[2].side
    return torch.rand(1, 3, side, side, generator=seeded(seed))


@each_family
def test_a_call_draws_as_the_model_does(name: str) -> None:
    """With the model's own steps, grid, guidance (with its schedule) and solver."""
    _, model, tiny = opened(name)
    pipe = over(LatentFlowPipeline, name)
    size = {"height": tiny.side, "width": tiny.side}
    latents = pipe(
        **condition(name), **size, num_inference_steps=4, generator=seeded(), output_type="latent"
    ).images
    with torch.no_grad():
        rows = model.encode_prompt(PROMPTS[:1]) if model.takes_text else model.encode_class([1])
        times = model.usual_grid(4, tiny.side, tiny.side)
        from latentflow.flow import integrate

        x = model.begin(model.noise(1, tiny.side, tiny.side, seeded()), times)
        expected = integrate(model.velocity(rows, times=times), x, times, model.usual_solver)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    image = pipe(**condition(name), **size, num_inference_steps=2, solver="heun", generator=seeded()).images[
        0
    ]
    assert image.size == (tiny.side, tiny.side)


@each_layout
def test_kept_pixels_are_kept_and_the_seam_is_matched(name: str) -> None:
    """Also where a mask ends within a token of the network. The tiny autoencoders shift colours by place, and a small
    strength leaves little else at the seam."""
    side = opened(name)[2].side
    ramp = torch.linspace(0.15, 0.3, side)
    image = (ramp[:, None] + ramp[None]).expand(1, 3, side, side)
    mask = torch.zeros(1, 1, side, side)
    mask[..., 1 : side // 2 + 1, 3 : side - 3] = 1.0
    call = {**condition(name), "image": image, "mask_image": mask, "num_inference_steps": 3}
    steps, little = [], {"strength": 0.3}
    for options in (little, {**little, "seamless": False}, {}):
        filled = over(LatentFlowInpaintPipeline, name)(
            **call, **options, generator=seeded(), output_type="pt"
        ).images
        assert torch.equal(filled[(mask == 0).expand_as(filled)], image[(mask == 0).expand_as(image)])
        assert not torch.equal(filled, image)
        steps.append(
            sum(float((filled.diff(dim=axis).abs() * mask.diff(dim=axis).abs()).sum()) for axis in (2, 3))
        )
    assert steps[0] < steps[1]


@each_layout
def test_edits_and_variations(name: str) -> None:
    """An edit to the same words is the image through the autoencoder; image-to-image of strength 0 as well."""
    if not opened(name)[1].takes_text:
        pytest.skip("takes classes")
    image = random_image(name)
    edit = over(LatentFlowEditPipeline, name)
    words = {"prompt": PROMPTS[0], "source_prompt": PROMPTS[0], "image": image}
    same = {"guidance_scale": 2.0, "source_guidance_scale": 2.0, "output_type": "pt"}
    through = edit.to_images(edit.encode_images(2.0 * image - 1.0), "pt")
    for method in ("flowedit", "direct"):
        edited = edit(**words, **same, method=method, num_inference_steps=4, generator=seeded()).images
        torch.testing.assert_close(edited, through, rtol=0.0, atol=2e-3)
    again = over(LatentFlowImg2ImgPipeline, name)(
        prompt=PROMPTS[0], image=image, strength=0.0, num_inference_steps=3, output_type="pt"
    ).images
    torch.testing.assert_close(again, through, rtol=0.0, atol=1e-5)


@each_layout
def test_inverted_noise_makes_the_image_again(name: str) -> None:
    """To within the error that the inversion has measured; without a condition as well."""
    _, model, tiny = opened(name)
    assert model.true_guidance(model.unguided) == 1.0
    edit, image = over(LatentFlowEditPipeline, name), random_image(name)
    options: dict[str, Any] = {"num_inference_steps": 3, **condition(name)}
    inverted = edit.invert(image, **options)
    again = over(LatentFlowPipeline, name)(
        **options,
        height=tiny.side,
        width=tiny.side,
        guidance_scale=model.unguided,  # of an inversion that names none
        latents=inverted.latents,
        solver="heun",
        output_type="latent",
    ).images
    error = (again - edit.encode_images(2.0 * image - 1.0)).square().mean().sqrt()
    torch.testing.assert_close(error, inverted.error[0], rtol=1e-3, atol=1e-4)
    assert edit.invert(image, num_inference_steps=1, measure=False).latents.isfinite().all()


@each_family
def test_the_model_s_own_scheduler_steps_on_request(name: str) -> None:
    """Each tiny checkpoint has Euler's steps of a flow, or DDIM's: those of the default solver on the same grid."""
    pipe, tiny = over(LatentFlowPipeline, name), opened(name)[2]
    call: dict[str, Any] = {
        **condition(name), "height": tiny.side, "width": tiny.side, "num_inference_steps": 4,
        "output_type": "latent",
    }  # fmt: skip
    seen: list[float] = []

    def after_step(pipe: Any, i: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        seen.append(float(timestep))
        return {}

    before = deepcopy(vars(pipe.model.pipeline.scheduler))
    stepped = pipe(**call, generator=seeded(), solver="scheduler", callback_on_step_end=after_step).images
    assert len(seen) == pipe.num_timesteps == 4 and sorted(seen, reverse=True) == seen
    assert str(vars(pipe.model.pipeline.scheduler)) == str(before)
    expected = pipe(**call, generator=seeded()).images
    if tiny.scheduler.get("set_alpha_to_one") is False:  # DDIM ends with a rest of noise
        assert (stepped - expected).abs().max() < 0.3 * expected.abs().max()
    else:
        torch.testing.assert_close(stepped, expected, rtol=0.0, atol=1e-4 * float(expected.abs().max()))


SCHEDULERS = [
    ("StableDiffusionPipeline", "PNDMScheduler", {"skip_prk_steps": True}),
    ("StableDiffusionPipeline", "EulerDiscreteScheduler", {}),
    ("StableDiffusionPipeline", "EulerAncestralDiscreteScheduler", {}),
    ("StableDiffusionPipeline-v", "UniPCMultistepScheduler", {}),
    ("StableDiffusionXLPipeline", "DPMSolverMultistepScheduler", {}),
    ("StableDiffusionPipeline", "LCMScheduler", {}),
    ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", {}),
    ("SanaPipeline", "DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    ("FluxPipeline-dev", "FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear"}),
]


@pytest.mark.parametrize(("name", "kind", "settings"), SCHEDULERS)
def test_a_scheduler_of_the_user_s_steps_as_in_the_stock_pipeline(
    name: str, kind: str, settings: dict[str, Any]
) -> None:
    stock, tiny = copy(checkpoint(name)), opened(name)[2]
    if "use_flow_sigmas" in settings:
        settings = {**settings, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, kind).from_config(stock.scheduler.config, **settings)
    call: dict[str, Any] = {
        "height": tiny.side, "width": tiny.side, "num_inference_steps": 5, "output_type": "pt",
        "guidance_scale": 3.0,
    }  # fmt: skip
    pipe = LatentFlowPipeline(type(opened(name)[1])(stock, **tiny.call))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    ours = pipe(PROMPTS[0], generator=seeded(), solver="scheduler", **call).images
    stock.scheduler = scheduler
    theirs = stock(PROMPTS[0], generator=seeded(), **call, **tiny.call).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


def test_the_own_scheduler_draws_from_noise_alone() -> None:
    image = random_image("StableDiffusion3Pipeline")
    again = over(LatentFlowImg2ImgPipeline, "StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="draws images from noise"):
        again(PROMPTS[0], image=image, strength=0.5, solver="scheduler")
    with pytest.raises(UserError, match="draws images from noise"):
        over(LatentFlowPipeline, "StableDiffusion3Pipeline")(
            PROMPTS[0], height=16, width=16, sigmas=[1.0, 0.5], solver="scheduler"
        )
    edit = over(LatentFlowEditPipeline, "StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="solver"):
        edit(PROMPTS[0], image=image, solver="scheduler")
    own = LatentFlowPipeline.from_pretrained(SHIPPED_CHECKPOINTS / "emoji-64")
    with pytest.raises(UserError, match="has no scheduler"):
        own("red apple", solver="scheduler")


def test_from_pipe_and_back() -> None:
    stock = checkpoint("FluxPipeline")
    pipe = LatentFlowInpaintPipeline.from_pipe(stock)
    assert isinstance(pipe, ModelPipeline) and type(pipe).__name__ == "LatentFlowInpaintPipeline"
    assert pipe.model.pipeline is stock
    drawing = LatentFlowPipeline.from_pipe(pipe)
    assert drawing.model is pipe.model
    assert pipe.transformer is stock.transformer
    assert pipe.to("cpu") is pipe


def test_a_pipeline_over_a_model_is_one_of_ours() -> None:
    """To isinstance, to pickle and to copy; and it leads to our other kinds, which share its model."""
    pipe = LatentFlowPipeline.from_pipe(checkpoint("FluxPipeline"))
    assert isinstance(pipe, LatentFlowPipeline) and not isinstance(pipe, LatentFlowInpaintPipeline)
    assert type(pipe) is type(LatentFlowPipeline.from_pipe(pipe))
    inpaint = LatentFlowInpaintPipeline.from_pipe(pipe)
    assert isinstance(inpaint, LatentFlowInpaintPipeline) and inpaint.transformer is pipe.transformer
    assert isinstance(inpaint.from_pipe(pipe), LatentFlowInpaintPipeline)
    shallow, deep = copy(pipe), deepcopy(pipe)
    assert shallow.model is pipe.model and deep.transformer is not pipe.transformer
    again = pickle.loads(pickle.dumps(pipe))
    options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
    drawn = [one(PROMPTS[0], **options, generator=seeded()).images for one in (pipe, shallow, deep, again)]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_components_that_are_set_are_those_that_compute() -> None:
    stock = copy(checkpoint("FluxPipeline"))
    pipe = LatentFlowPipeline.from_pipe(stock)
    pipe.vae = vae = deepcopy(stock.vae)
    assert pipe.model.vae is vae and stock.vae is vae
    pipe.text_encoder = None
    assert stock.text_encoder is None and "text_encoder" not in vars(pipe)


def test_from_pipe_takes_a_class_that_derives_from_a_stock_one() -> None:
    stock = checkpoint("FluxPipeline")
    own = type("MyPipeline", (type(stock),), {"__module__": "mine"})(**stock.components)
    assert isinstance(LatentFlowPipeline.from_pipe(own), ModelPipeline)


def test_an_offloaded_sibling_stays_offloaded() -> None:
    """The text-to-image pipeline that is made of it knows the hooks, and where they compute."""
    stock = checkpoint("StableDiffusion3Pipeline")
    sibling = StableDiffusion3Img2ImgPipeline(**stock.components)
    sibling._all_hooks, sibling._offload_device = [hook := object()], torch.device("cpu")
    inside = LatentFlowPipeline.from_pipe(sibling).model.pipeline
    assert type(inside) is type(stock)
    assert inside._all_hooks == [hook] and inside._offload_device == torch.device("cpu")


def test_from_pipe_refuses_what_it_would_lose() -> None:
    stock = checkpoint("FluxPipeline")
    for given in (stock, LatentFlowPipeline.from_pipe(stock)):
        with pytest.raises(UserError, match=r"vae is given beside a FluxPipeline"):
            LatentFlowPipeline.from_pipe(given, vae=None)
    other = type("FluxControlNetPipeline", (DiffusionPipeline,), {})()
    with pytest.raises(UserError, match=r"FluxControlNetPipeline is none of the (.|\n)*ControlNet"):
        LatentFlowPipeline.from_pipe(other)


def test_the_flow_model_of_an_own_pipeline_is_refused() -> None:
    with pytest.raises(UserError, match=r"from_pipe\(model.pipeline\)"):
        over_model = cast(Any, LatentFlowPipeline)
        over_model(FlowModel.from_pretrained(SHIPPED_CHECKPOINTS / "emoji-64"))


def test_a_hub_repository_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its index, which is fetched first; the cache has what the hub would send."""
    cached, name = tmp_path / "models--me--sd3", "0123456789" * 4
    checkpoint("StableDiffusion3Pipeline").save_pretrained(cached / "snapshots" / name)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert isinstance(LatentFlowPipeline.from_pretrained("me/sd3", **where), ModelPipeline)
    with pytest.raises(UserError, match=r"no folder 'me/other', and no hub repository"):
        LatentFlowPipeline.from_pretrained("me/other", **where)


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("transformer/diffusion_pytorch_model", "proj_out.weight"),
        ("text_encoder/model", "text_projection.weight"),
        ("text_encoder_3/model", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(file: str, weight: str, tmp_path: Path) -> None:
    """diffusers and transformers draw random numbers in their place, and only report it."""
    checkpoint("StableDiffusion3Pipeline").save_pretrained(tmp_path)
    path = tmp_path / f"{file}.safetensors"
    weights = load_file(path)
    del weights[weight]
    save_file(weights, path, {"format": "pt"})
    part = file.partition("/")[0]
    with pytest.raises(UserError, match=rf"{part} lacks weights: {re.escape(weight)}"):
        FlowModel.from_pretrained(tmp_path)


def test_a_saved_stock_folder_opens(tmp_path: Path) -> None:
    checkpoint("StableDiffusion3Pipeline").save_pretrained(tmp_path / "sd3")
    pipe = LatentFlowPipeline.from_pretrained(tmp_path / "sd3")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS[0], height=16, width=16, num_inference_steps=2, generator=seeded(), output_type="pt"
    ).images
    expected = over(LatentFlowPipeline, "StableDiffusion3Pipeline")(
        PROMPTS[0], height=16, width=16, num_inference_steps=2, generator=seeded(), output_type="pt"
    ).images
    torch.testing.assert_close(images, expected, rtol=0.0, atol=1e-6)
    assert isinstance(FlowModel.from_pretrained(tmp_path / "sd3"), FlowModel)


def test_bad_input() -> None:
    pipe = over(LatentFlowPipeline, "FluxPipeline-dev")
    with pytest.raises(UserError, match=r"true_cfg_scale"):
        pipe(PROMPTS[0], negative_prompt="a hat", height=16, width=16)
    with pytest.raises(UserError, match=r"height 18 is not a multiple of 4"):
        pipe(PROMPTS[0], height=18, width=16)
    with pytest.raises(UserError, match=r"prompt is missing"):
        pipe(height=16, width=16)
    with pytest.raises(UserError, match=r"LatentFlowPipeline takes no argument"):
        pipe(PROMPTS[0], prompts="a hat")
    with pytest.raises(UserError, match=r"embeddings"):
        pipe(prompt_embeds=torch.zeros(1, 2, 3), height=16, width=16)
