"""Guidance of single families and their options: equal to the stock pipeline's, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentflow import FlowModel, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.families.distilled import word_in
from latentflow.families.pretrained import PretrainedModel
from latentflow.flow import integrate

from .test_pretrained import PROMPTS, drawn, grid, images, opened, seeded, stock
from .tiny import TINY, checkpoint

pytestmark = pytest.mark.usefixtures("no_grad")

SKIPPED = {
    "skip_guidance_layers": [0],
    "skip_layer_guidance_scale": 2.0,
    "skip_layer_guidance_start": 0.01,
    "skip_layer_guidance_stop": 0.7,
}


def model_of(pipe: Any, **options: Any) -> PretrainedModel:
    model = FAMILIES[type(pipe).__name__](pipe, **options)
    assert isinstance(model, PretrainedModel)
    return model


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("latentflow")]


# ---------------------------------------------------------------- equal to the stock pipeline


def test_skip_layer_guidance_is_the_stock_pipeline_s() -> None:
    name = "StableDiffusion3Pipeline"
    model, times = model_of(checkpoint(name), **SKIPPED), grid(name)
    rows = model.encode_prompt(PROMPTS)
    ours = images(name, drawn(name, model.velocity(rows, times=times), times))
    torch.testing.assert_close(ours, stock(name, **SKIPPED), rtol=0.0, atol=1e-5)
    plain = images(name, drawn(name, opened(name)[1].velocity(rows, times=times), times))
    assert (ours - plain).abs().max() > 1e-3
    alone = images(name, drawn(name, model.velocity(rows, 1.0, times=times), times))
    torch.testing.assert_close(alone, stock(name, guidance_scale=1.0, **SKIPPED), rtol=0.0, atol=1e-5)


def test_skip_layer_guidance_costs_what_it_costs_the_stock_pipeline() -> None:
    """One evaluation more in a step where it leads, none elsewhere."""
    name, calls = "StableDiffusion3Pipeline", [0, 0]
    model, times = model_of(checkpoint(name), **SKIPPED), grid(name, 10)

    def count(*given: Any) -> None:
        calls[ours] += 1

    handle = model.network.register_forward_hook(count)
    for ours in (False, True):
        if ours:
            drawn(name, model.velocity(model.encode_prompt(PROMPTS), times=times), times)
        else:
            stock(name, PROMPTS[:1], **SKIPPED, num_inference_steps=10)
    handle.remove()
    assert calls == [16, 16]


def test_skip_layer_guidance_on_any_solver_s_grid_is_of_the_same_times() -> None:
    model = model_of(checkpoint("StableDiffusion3Pipeline"), **SKIPPED)
    rows, x = model.encode_prompt(PROMPTS), model.noise(2, 16, 16, seeded())
    times = model.time_grid(None, 16, 16)
    for step in (0, 3, 20):
        bound, free = (model.velocity(rows, times=grid)(x, times[step]) for grid in (times, None))
        torch.testing.assert_close(bound, free)


def test_layers_that_are_not_there() -> None:
    model = model_of(checkpoint("StableDiffusion3Pipeline"), skip_guidance_layers=[7])
    with pytest.raises(UserError, match="numbers of blocks, 0 to 1"):
        model.velocity(model.encode_prompt(PROMPTS))


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxPipeline-dev", "QwenImagePipeline"])
def test_true_guidance_leads_away_from_a_negative_prompt(name: str) -> None:
    call, times = {"true_cfg_scale": 3.0}, grid(name)
    model = model_of(checkpoint(name), **TINY[name].call, **call)
    negative = "small house"
    rows, away = model.encode_prompt(PROMPTS), model.encode_negative([negative])
    ours = images(name, drawn(name, model.velocity(rows, None, away, times=times), times))
    expected = stock(name, negative_prompt=negative, **call)
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5)


def with_text_guider(pipe: Any) -> Any:
    """Return HunyuanImage's pipeline with another guider for prompts that quote text."""
    pipe = copy(pipe)
    pipe.guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5)
    pipe.ocr_guider = diffusers.AdaptiveProjectedMixGuidance(
        guidance_scale=5.0, adaptive_projected_guidance_start_step=2, adaptive_projected_guidance_scale=4.0
    )
    return pipe


def test_hunyuan_image_is_guided_by_all_steps_so_far() -> None:
    name, steps = "HunyuanImagePipeline", 8
    pipe = with_text_guider(checkpoint(name))
    model, times = model_of(pipe), opened(name)[1].time_grid(8, 16, 16)
    prompts = ["a red apple", 'a hat of "red sun"']
    noise = torch.cat([model.noise(1, 16, 16, seeded(seed)) for seed in (0, 1)])
    theirs = [
        pipe(
            [text],
            height=16,
            width=16,
            num_inference_steps=steps,
            generator=seeded(seed),
            output_type="latent",
        ).images
        for seed, text in enumerate(prompts)
    ]
    velocity = model.velocity(model.encode_prompt(prompts), times=times)
    for _ in range(2):  # a velocity begins anew
        ours = integrate(velocity, noise, times, "euler")
        scale = float(ours.abs().max().clamp_min(1.0))
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=0.0, atol=1e-5 * scale)
    plain = integrate(model.velocity(model.encode_prompt(prompts)), noise, times, "euler")
    assert (plain - ours).abs().max() > 1e-2
    heun = integrate(velocity, noise, times, "heun")
    assert heun.isfinite().all() and pipe.guider.momentum_buffer is not None


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("FluxPipeline", {"max_sequence_lenght": 3}, "Did you mean max_sequence_length?"),
        ("FluxPipeline", {"height": 64}, "--height"),
        ("SanaPipeline", {"num_inference_steps": 4}, "--steps"),
        ("FluxPipeline", {"generator": 0}, "--seed"),
        ("FluxPipeline", {"guidance_scale": 2.0}, "--guidance"),
        ("StableDiffusion3Pipeline", {"true_cfg_scale": 2.0}, "--guidance"),
        ("PixArtSigmaPipeline", {"use_resolution_binning": True}, "Leave it out: False"),
        ("StableDiffusionPipeline", {"guidance_rescale": 0.7}, "It has clip_skip."),
    ],
)
def test_options_that_are_not_used_are_refused(name: str, option: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        model_of(checkpoint(name), **option)
    what, _, fix = str(refused.value).partition("\n")
    assert what == f"{next(iter(option))} is no option of {name} here" and said in fix and len(fix) < 100


@pytest.mark.parametrize("name", TINY)
def test_every_option_of_a_family_is_one_of_its_pipeline(name: str) -> None:
    model = opened(name)[1]
    for option in [*model.prompt_options, *model.sampling_options]:
        model.option(option)


def test_pag_is_not_applied_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stock = checkpoint("StableDiffusionPipeline")
    model_of_pag = FAMILIES["StableDiffusionPipeline"](
        diffusers.StableDiffusionPAGPipeline(**stock.components)
    )
    assert type(model_of_pag.pipeline) is diffusers.StableDiffusionPipeline
    assert "perturbed-attention guidance is not applied" in caplog.text


# ---------------------------------------------------------------- embedded guidance and distilled checkpoints


def test_an_interval_of_embedded_guidance_is_refused() -> None:
    name = "FluxPipeline-dev"
    model = opened(name)[1]
    with pytest.raises(UserError, match="takes its guidance scale as an input"):
        model.velocity(model.encode_prompt(PROMPTS), 4.0, interval=(0.2, 0.8))
    pipe = LatentFlowPipeline(model_of(checkpoint(name), true_cfg_scale=2.0, **TINY[name].call))
    pipe("a hat", guidance_interval=(0.2, 0.8), num_inference_steps=1, height=16, width=16)


def klein() -> Any:
    stock = checkpoint("Flux2KleinPipeline")
    return type(stock)(**stock.components, is_distilled=True)


def schnell() -> Any:
    pipe = copy(checkpoint("FluxPipeline"))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe


def krea_turbo() -> Any:
    stock = checkpoint("Krea2Pipeline")
    return type(stock)(**stock.components, is_distilled=True, **TINY["Krea2Pipeline"].settings)


def qwen_few() -> Any:
    stock = checkpoint("QwenImage21Pipeline")
    return type(stock)(**stock.components, sample_sigmas=[1.0, 0.7, 0.4])


def mean_flow() -> Any:
    return checkpoint("HunyuanImagePipeline-distilled")


def mobile() -> Any:
    return checkpoint("DreamLiteMobilePipeline")


def sdxl_turbo() -> Any:
    pipe = copy(checkpoint("StableDiffusionXLPipeline"))
    scheduler = pipe.scheduler.config
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        scheduler, timestep_spacing="trailing"
    )
    return pipe


@pytest.mark.parametrize(
    ("made", "steps", "guidance"),
    [
        (klein, 4, 1.0),
        (schnell, 4, 1.0),
        (krea_turbo, 8, 0.0),
        (qwen_few, 3, 1.0),
        (sdxl_turbo, 4, 1.0),
        (mean_flow, 8, 3.25),
        (mobile, 4, 1.0),
    ],
)
def test_distilled_checkpoints_are_recognised_by_their_files(
    made: Callable[[], Any], steps: int, guidance: float
) -> None:
    model = model_of(made())
    assert model.distilled is not None and model.distilled.certain
    assert (model.usual_steps, model.usual_guidance) == (steps, guidance)
    assert str(model.distilled).endswith(
        f"in about {steps} steps" + ("" if model.distilled.guided else ", without guidance")
    )


@pytest.mark.parametrize(
    "name",
    [name for name in TINY if name not in ("HunyuanImagePipeline-distilled", "DreamLiteMobilePipeline")],
)
def test_other_checkpoints_are_not_taken_for_distilled(name: str) -> None:
    assert opened(name)[1].distilled is None


@pytest.mark.parametrize("made", [klein, schnell])
def test_guidance_of_a_checkpoint_without_is_reported(
    made: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    name = "Flux2KleinPipeline" if made is klein else "FluxPipeline"
    pipe = LatentFlowPipeline(model_of(made(), **TINY[name].call))
    size = {"height": 16, "width": 16, "output_type": "latent"}
    pipe("a hat", generator=seeded(), **size)
    assert not warnings_of(caplog)
    pipe("a hat", guidance_scale=5.0, num_inference_steps=21, generator=seeded(), **size)
    ignored, many = warnings_of(caplog)
    assert ignored == "guidance_scale 5 is ignored by the checkpoint: it draws without guidance"
    assert "it draws in about 4 steps, without guidance, and 21 steps are asked for" in many


def test_a_name_that_says_turbo_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The files of Z-Image-Turbo are those of Z-Image: defaults stay, and the warning says what suits."""
    folder = tmp_path / "Z-Image-Turbo"
    checkpoint("ZImagePipeline").save_pretrained(folder)
    model = FlowModel.from_pretrained(folder, TINY["ZImagePipeline"].call)
    assert model.distilled is not None and not model.distilled.certain
    assert model.usual_guidance == opened("ZImagePipeline")[1].usual_guidance
    pipe, size = LatentFlowPipeline(model), {"height": 16, "width": 16, "output_type": "latent"}
    pipe("a hat", guidance_scale=0.0, num_inference_steps=8, **size)
    assert not warnings_of(caplog)
    pipe("a hat", num_inference_steps=2, **size)
    [line] = warnings_of(caplog)
    assert line == (
        "'turbo' in its name suggests a step-distilled checkpoint: it draws in about 8 steps, without guidance, "
        "and guidance_scale is 5 (none is 0)"
    )


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Z-Image-Turbo", "turbo"),
        ("sd_xl_turbo_1.0", "turbo"),
        ("dreamshaperXL_v21TurboDPMSDE", "turbo"),
        ("FLUX.1-schnell", "schnell"),
        ("SDXL-Lightning-4steps", "lightning"),
        ("Hyper-SD", "hyper-sd"),
        ("Hyper-SDXL-8steps", "hyper-sd"),
        ("dmd2-sdxl", "dmd"),
        ("turbofan-photos", None),
        ("turboprops", None),
        ("admd", None),
        ("hyper-sdr", None),
        ("", None),
    ],
)
def test_words_in_names_are_whole_words(name: str, word: str | None) -> None:
    assert word_in(name) == word


def test_an_option_without_effect_is_refused() -> None:
    """HunyuanImage takes the scale as an input only where it is distilled."""
    options = {"distilled_guidance_scale": 2.0}
    with pytest.raises(UserError, match="distilled_guidance_scale is no option of HunyuanImagePipeline here"):
        model_of(checkpoint("HunyuanImagePipeline"), **options)
    assert model_of(checkpoint("HunyuanImagePipeline-distilled"), **options).usual_guidance == 2.0


# ---------------------------------------------------------------- encoders that are left out


def test_sd3_without_t5_is_the_stock_pipeline_s() -> None:
    pipe = copy(checkpoint("StableDiffusion3Pipeline"))
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    model = model_of(pipe)
    times = model.time_grid(4, 16, 16)
    ours = integrate(
        model.velocity(model.encode_prompt(PROMPTS[:1])), model.noise(1, 16, 16, seeded()), times, "euler"
    )
    theirs: Tensor = pipe(
        PROMPTS[0], height=16, width=16, num_inference_steps=4, generator=seeded(), output_type="latent"
    ).images
    scale = float(theirs.abs().max().clamp_min(1.0))
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 * scale)
