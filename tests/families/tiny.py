"""Tiny random checkpoints of every family, built with the real classes in about a second each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn

from .components import (
    aura_flow,
    chroma,
    cogview4,
    dit,
    flux,
    flux2_klein,
    hidream,
    krea2,
    latent_consistency,
    lumina2,
    pixart,
    prx,
    qwen_image,
    sana,
    sana_sprint,
    sd3,
    stable_diffusion,
    stable_diffusion_xl,
    z_image,
)
from .newer_components import (
    bria,
    bria_fibo,
    bria_fibo2,
    cogview3,
    dreamlite,
    ernie_image,
    flux2_dev,
    glm_image,
    hunyuan_dit,
    hunyuan_image,
    ideogram4,
    kandinsky5,
    kolors,
    longcat_image,
    longcat_image_edit,
    lumina,
    nucleus_image,
    omnigen,
    ovis_image,
    plan,
    qwen_image_21,
    qwen_image_edit,
    z_image_omni,
)
from .parts import certain


@dataclass(frozen=True)
class Tiny:
    """How a tiny checkpoint is built and called.

    Attributes:
        components: makes the pipeline's components; a scheduler of flows is added.
        call: options that its size needs.
        scheduler: settings of the scheduler.
        settings: other arguments of the pipeline.
        kind: class of the scheduler; default: Euler's of flows, or DDIM's where the settings are of a diffusion.
    """

    components: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    side: int = 16
    kind: Any = None


SCALED_LINEAR = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
SHORT = {"max_sequence_length": 32}
TINY: dict[str, Tiny] = {
    "StableDiffusion3Pipeline": Tiny(sd3, {}, {"shift": 3.0}),
    "FluxPipeline": Tiny(flux, SHORT, DYNAMIC),
    "FluxPipeline-dev": Tiny(lambda: flux(True), SHORT, DYNAMIC),
    "FluxKontextPipeline": Tiny(
        lambda: flux(True), {**SHORT, "max_area": 16 * 16, "_auto_resize": False}, DYNAMIC
    ),
    "ChromaPipeline": Tiny(chroma, SHORT, DYNAMIC),
    "Flux2KleinPipeline": Tiny(flux2_klein, {**SHORT, "text_encoder_out_layers": (0, 1, 2)}, DYNAMIC),
    "QwenImagePipeline": Tiny(qwen_image, SHORT, {**DYNAMIC, "shift_terminal": 0.02}),
    "ZImagePipeline": Tiny(z_image, SHORT, DYNAMIC),
    "SanaPipeline": Tiny(
        sana,
        {**SHORT, "complex_human_instruction": None, "use_resolution_binning": False},
        {"shift": 3.0},
        side=32,
    ),
    "Lumina2Pipeline": Tiny(lumina2, {"max_sequence_length": 64}, DYNAMIC, side=64),
    "AuraFlowPipeline": Tiny(aura_flow, {"max_sequence_length": 12}, {"shift": 1.73}),
    "CogView4Pipeline": Tiny(
        cogview4,
        SHORT,
        {**DYNAMIC, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"},
    ),
    "GlmImagePipeline": Tiny(glm_image, SHORT, DYNAMIC),
    "PRXPipeline": Tiny(
        prx,
        {"tokenizer_max_length": 32, "use_resolution_binning": False, "skip_text_cleaning": True},
        {"shift": 3.0},
    ),
    "HiDreamImagePipeline": Tiny(hidream, SHORT, {"use_dynamic_shifting": True}),
    "Krea2Pipeline": Tiny(krea2, SHORT, DYNAMIC, {"text_encoder_select_layers": (1, 3)}),
    "Flux2Pipeline": Tiny(
        flux2_dev, {"max_sequence_length": 128, "text_encoder_out_layers": (0, 1, 2)}, DYNAMIC
    ),
    "Ideogram4Pipeline": Tiny(ideogram4, {**SHORT, "guidance_schedule": (7.0, 7.0, 7.0, 3.0)}),
    "OvisImagePipeline": Tiny(ovis_image, SHORT, DYNAMIC),
    "LongCatImagePipeline": Tiny(longcat_image, {"enable_prompt_rewrite": False}, DYNAMIC),
    "HunyuanImagePipeline": Tiny(hunyuan_image, {}, {"shift": 5.0}),
    "HunyuanImagePipeline-distilled": Tiny(lambda: hunyuan_image(True), {}, {"shift": 4.0}),
    "QwenImage21Pipeline": Tiny(qwen_image_21, {"true_cfg_scale": 4.0}, DYNAMIC),
    "BriaPipeline": Tiny(bria, SHORT, DYNAMIC),
    "BriaPipeline-fixed": Tiny(bria, SHORT, {"shift": 3.0}),
    "BriaFiboPipeline": Tiny(bria_fibo, SHORT, DYNAMIC),
    "BriaFibo2Pipeline": Tiny(bria_fibo2, {}, DYNAMIC),
    "NucleusMoEImagePipeline": Tiny(nucleus_image, {"max_sequence_length": 128}, DYNAMIC),
    "ErnieImagePipeline": Tiny(ernie_image, {}, {"shift": 3.0}),
    "Kandinsky5T2IPipeline": Tiny(kandinsky5, SHORT, {"shift": 5.0}, side=64),
    "LuminaPipeline": Tiny(lumina, {"clean_caption": False}, {"shift": 1.0}, side=64),
    "OmniGenPipeline": Tiny(omnigen, {}, {"invert_sigmas": True, "num_train_timesteps": 1}, side=64),
    "ZImageOmniPipeline": Tiny(z_image_omni, SHORT, DYNAMIC),
    "DreamLitePipeline": Tiny(dreamlite, {}, DYNAMIC),
    "DreamLiteMobilePipeline": Tiny(dreamlite, {}, DYNAMIC),
    "StableDiffusionPipeline": Tiny(stable_diffusion, {}, SCALED_LINEAR),
    "StableDiffusionPipeline-v": Tiny(
        stable_diffusion, {}, {**SCALED_LINEAR, "prediction_type": "v_prediction"}
    ),
    "StableDiffusionXLPipeline": Tiny(stable_diffusion_xl, {}, SCALED_LINEAR),
    "KolorsPipeline": Tiny(kolors, {}, SCALED_LINEAR),
    "PixArtAlphaPipeline": Tiny(
        pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, LINEAR
    ),
    "PixArtSigmaPipeline": Tiny(
        pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, LINEAR
    ),
    "HunyuanDiTPipeline": Tiny(
        hunyuan_dit,
        {"use_resolution_binning": False},
        {**SCALED_LINEAR, "prediction_type": "v_prediction"},
        {"requires_safety_checker": False},
        side=64,
    ),
    "CogView3PlusPipeline": Tiny(
        cogview3, SHORT, {**SCALED_LINEAR, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ),
    "DiTPipeline": Tiny(dit, {}, LINEAR, {"id2label": {"0": "tench, fish", "1": "hat"}}),
}

#: families that are tested with images alone, in test_references.py: most need one
WITH_REFERENCES: dict[str, Tiny] = {
    "QwenImageEditPipeline": Tiny(qwen_image_edit, {}, {**DYNAMIC, "shift_terminal": 0.02}),
    "QwenImageEditPlusPipeline": Tiny(qwen_image_edit, {}, {**DYNAMIC, "shift_terminal": 0.02}),
    "BriaFiboEditPipeline": Tiny(bria_fibo, {**SHORT, "_auto_resize": False}, DYNAMIC),
    "LongCatImageEditPipeline": Tiny(longcat_image_edit, {}, DYNAMIC),
}

#: families of consistency models, which have no velocity: tested in test_consistency.py
CONSISTENCY: dict[str, Tiny] = {
    "SanaSprintPipeline": Tiny(
        sana_sprint,
        {**SHORT, "complex_human_instruction": None, "use_resolution_binning": False},
        side=32,
        kind=diffusers.SCMScheduler,
    ),
    "LatentConsistencyModelPipeline": Tiny(latent_consistency, kind=diffusers.LCMScheduler),
}

#: networks that take an image in extra channels, and draw nothing without it
WITH_EXTRA_CHANNELS: dict[str, Tiny] = {
    "FluxFillPipeline": Tiny(lambda: flux(True, 48), SHORT, DYNAMIC),
    "FluxControlPipeline": Tiny(lambda: flux(True, 32), SHORT, DYNAMIC),
    "CogView4ControlPipeline": Tiny(lambda: cogview4(8), SHORT, TINY["CogView4Pipeline"].scheduler),
    "StableDiffusionInpaintPipeline": Tiny(lambda: stable_diffusion(9), {}, SCALED_LINEAR),
    "StableDiffusionXLInpaintPipeline": Tiny(lambda: stable_diffusion_xl(9), {}, SCALED_LINEAR),
    "StableDiffusionInstructPix2PixPipeline": Tiny(lambda: stable_diffusion(8), {}, SCALED_LINEAR),
    "StableDiffusionXLInstructPix2PixPipeline": Tiny(lambda: stable_diffusion_xl(8), {}, SCALED_LINEAR),
}


@cache
def checkpoint(name: str) -> Any:
    """Return the tiny stock pipeline of a row of any of the four tables; do not change it."""
    tiny = {**TINY, **WITH_EXTRA_CHANNELS, **WITH_REFERENCES, **CONSISTENCY}[name]
    torch.manual_seed(0)
    diffusion = "beta_start" in tiny.scheduler
    usual = diffusers.DDIMScheduler if diffusion else diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = (tiny.kind or usual)(**tiny.scheduler)
    components = {**tiny.components(), "scheduler": scheduler}
    if name in WITH_EXTRA_CHANNELS:  # stock pipelines draw a sample of the posterior
        certain(components["vae"])
    for part in components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    for part, module in components.items():
        if isinstance(module, nn.Module) and part != "vae":
            for parameter in module.parameters():  # large enough that each input has a visible effect
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
    return small(getattr(diffusers, name.partition("-")[0])(**components, **tiny.settings), name)


def small(pipe: Any, name: str) -> Any:
    """Give a stock pipeline the sizes and lengths of a tiny checkpoint that no file of its folder holds."""
    pipe.set_progress_bar_config(disable=True)
    if name == "HiDreamImagePipeline":  # which scales every size to one area
        pipe.default_sample_size = 8
    if name in ("LongCatImagePipeline", "LongCatImageEditPipeline"):
        pipe.tokenizer_max_length = 32
    if name in (
        "BriaFiboPipeline",
        "BriaFiboEditPipeline",
        "QwenImage21Pipeline",
    ):  # which take their autoencoder for another
        pipe.vae_scale_factor = 2
    if name == "BriaFibo2Pipeline":
        pipe.text_encoder_out_layers = ((0, 1, 2), (1, 2, 3))
    if "HunyuanImage" in name:
        pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 32, 16
    if name == "GlmImagePipeline":
        pipe.default_sample_size, pipe.generate_prior_tokens = 8, plan
    if name == "Kandinsky5T2IPipeline":
        pipe.resolutions = [(TINY[name].side,) * 2]
    if name == "PRXPipeline":  # whose cleaning of texts needs ftfy
        pipe.text_preprocessor.clean_text = pipe.text_preprocessor.basic_clean = str
    return pipe
