"""Step-distilled checkpoints: their signs in configs and names, and the steps and guidance that suit them."""

from __future__ import annotations

import logging
import re
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
# Words in names such as Z-Image-Turbo, dreamshaperXL_v21TurboDPMSDE and SDXL-DMD2; digits are none.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Steps asked for that are more than this many times those of the checkpoint are reported.
_FAR = 5


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
    if config.get("is_distilled"):
        return Distilled("is_distilled in model_index.json says that this is", 8 if "Krea" in kind else 4)
    if sigmas := config.get("sample_sigmas"):
        return Distilled("sample_sigmas in model_index.json says that this is", len(sigmas), guided=True)
    scheduler = getattr(pipeline, "scheduler", None)
    scheduled = type(scheduler).__name__
    settings = {} if scheduler is None else scheduler.config
    networks = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    network = next(
        (part for part in networks if part is not None), None
    )  # a compiled one is neither true nor false
    built = {} if network is None else network.config
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
    word = word_in(Path(str(config.get("_name_or_path") or "")).name)
    if word is None:
        return None
    steps = 4 if kind.startswith("StableDiffusion") or word == "schnell" else 8
    guided = bool(built.get("guidance_embeds"))
    return Distilled(f"'{word}' in its name suggests", steps, guided, certain=False)


def word_in(name: str) -> str | None:
    """Return the word of a step-distilled checkpoint that the name of a folder or repository has as a whole word."""
    words = " ".join(_WORD.findall(name)).lower()
    return next((word for word, written in _WORDS.items() if re.search(rf"\b({written})\b", words)), None)


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
