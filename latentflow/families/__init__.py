"""Flow models: one class for each family of checkpoints, in one file of this package and one line of `FAMILIES`."""

from __future__ import annotations

import importlib
from collections import UserDict
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import FlowModel as FlowModel
    from .model import Rows as Rows


class Families(UserDict[str, Any]):
    """Class name of a pipeline -> flow model that holds it, imported when it is looked up."""

    def __getitem__(self, kind: str) -> type[FlowModel]:
        family: Any = super().__getitem__(kind)
        if isinstance(family, str):
            module, _, name = family.partition(":")
            family = getattr(importlib.import_module(f".{module}", __name__), name)
        return family  # type: ignore[no-any-return]


#: class name of a diffusers pipeline (in model_index.json) -> "module:class" of the flow model that holds it
FAMILIES = Families(
    {
        "LatentFlowPipeline": "latentflow:LatentFlowModel",
        "LatentFlowEditPipeline": "latentflow:LatentFlowModel",
        "LatentFlowImg2ImgPipeline": "latentflow:LatentFlowModel",
        "LatentFlowInpaintPipeline": "latentflow:LatentFlowModel",
        "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3Model",
        "FluxPipeline": "flux:FluxModel",
        "FluxFillPipeline": "flux:FluxFillModel",
        "FluxControlPipeline": "flux:FluxControlModel",
        "FluxKontextPipeline": "flux:FluxKontextModel",
        "ChromaPipeline": "flux:ChromaModel",
        "Flux2Pipeline": "flux2:Flux2Model",
        "Flux2KleinPipeline": "flux2:Flux2Model",
        "QwenImagePipeline": "qwen_image:QwenImageModel",
        "QwenImageEditPipeline": "qwen_image:QwenImageEditModel",
        "QwenImageEditPlusPipeline": "qwen_image:QwenImageEditPlusModel",
        "ZImagePipeline": "z_image:ZImageModel",
        "ZImageOmniPipeline": "z_image:ZImageOmniModel",
        "SanaPipeline": "sana:SanaModel",
        "SanaSprintPipeline": "sana:SanaSprintModel",
        "Lumina2Pipeline": "lumina2:Lumina2Model",
        "AuraFlowPipeline": "aura_flow:AuraFlowModel",
        "CogView4Pipeline": "cogview4:CogView4Model",
        "CogView4ControlPipeline": "cogview4:CogView4ControlModel",
        "GlmImagePipeline": "glm_image:GlmImageModel",
        "HiDreamImagePipeline": "hidream:HiDreamModel",
        "Krea2Pipeline": "krea2:Krea2Model",
        "PRXPipeline": "prx:PRXModel",
        "Ideogram4Pipeline": "ideogram4:Ideogram4Model",
        "OvisImagePipeline": "ovis_image:OvisImageModel",
        "LongCatImagePipeline": "longcat_image:LongCatImageModel",
        "LongCatImageEditPipeline": "longcat_image:LongCatImageEditModel",
        "HunyuanImagePipeline": "hunyuan_image:HunyuanImageModel",
        "QwenImage21Pipeline": "qwen_image:QwenImage21Model",
        "BriaPipeline": "bria:BriaModel",
        "BriaFiboPipeline": "bria:BriaFiboModel",
        "BriaFiboEditPipeline": "bria:BriaFiboEditModel",
        "BriaFibo2Pipeline": "bria:BriaFibo2Model",
        "NucleusMoEImagePipeline": "nucleus_image:NucleusImageModel",
        "ErnieImagePipeline": "ernie_image:ErnieImageModel",
        "Kandinsky5T2IPipeline": "kandinsky5:Kandinsky5Model",
        "LuminaPipeline": "lumina:LuminaModel",
        "OmniGenPipeline": "omnigen:OmniGenModel",
        "DreamLitePipeline": "dreamlite:DreamLiteModel",
        "DreamLiteMobilePipeline": "dreamlite:DreamLiteModel",
        "StableDiffusionPipeline": "diffusion:StableDiffusionModel",
        "StableDiffusionXLPipeline": "diffusion:StableDiffusionXLModel",
        "LatentConsistencyModelPipeline": "consistency:LatentConsistencyModel",
        "KolorsPipeline": "kolors:KolorsModel",
        "StableDiffusionInstructPix2PixPipeline": "instruct_pix2pix:InstructPix2PixModel",
        "StableDiffusionXLInstructPix2PixPipeline": "instruct_pix2pix:InstructPix2PixXLModel",
        "PixArtAlphaPipeline": "diffusion:PixArtModel",
        "PixArtSigmaPipeline": "diffusion:PixArtModel",
        "HunyuanDiTPipeline": "diffusion:HunyuanDiTModel",
        "CogView3PlusPipeline": "diffusion:CogView3PlusModel",
        "DiTPipeline": "diffusion:ClassDiTModel",
    }
)

#: class name of a pipeline -> the text-to-image pipeline of diffusers that has the same components, and is its family
SIBLINGS = {
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "FluxImg2ImgPipeline": "FluxPipeline",
    "FluxInpaintPipeline": "FluxPipeline",
    "FluxControlImg2ImgPipeline": "FluxControlPipeline",
    "FluxControlInpaintPipeline": "FluxControlPipeline",
    "FluxKontextInpaintPipeline": "FluxKontextPipeline",
    "ChromaImg2ImgPipeline": "ChromaPipeline",
    "ChromaInpaintPipeline": "ChromaPipeline",
    "Flux2KleinInpaintPipeline": "Flux2KleinPipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
    "QwenImageInpaintPipeline": "QwenImagePipeline",
    "QwenImageEditInpaintPipeline": "QwenImageEditPipeline",
    "ZImageImg2ImgPipeline": "ZImagePipeline",
    "ZImageInpaintPipeline": "ZImagePipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "LatentConsistencyModelPipeline",
    "SanaSprintImg2ImgPipeline": "SanaSprintPipeline",
    "KolorsImg2ImgPipeline": "KolorsPipeline",
    # perturbed-attention guidance, which is how a pipeline guides and nothing of its weights
    "StableDiffusionPAGPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPAGPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLPAGInpaintPipeline": "StableDiffusionXLPipeline",
    "StableDiffusion3PAGPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3PAGImg2ImgPipeline": "StableDiffusion3Pipeline",
    "PixArtSigmaPAGPipeline": "PixArtSigmaPipeline",
    "SanaPAGPipeline": "SanaPipeline",
    "HunyuanDiTPAGPipeline": "HunyuanDiTPipeline",
    "KolorsPAGPipeline": "KolorsPipeline",
}

#: entry points of this group add families: their name is the pipeline's class name, their value the family's class
GROUP = "latentflow.families"


def family_of(kind: str) -> type[FlowModel] | None:
    """Return the flow model of a pipeline's class name; None if there is none.

    Other packages' families are found by their entry points, and imported only where their class is asked for.
    """
    kind = SIBLINGS.get(kind, kind)
    if kind in FAMILIES:
        return FAMILIES[kind]
    for point in entry_points(group=GROUP, name=kind):
        family: type[FlowModel] = point.load()
        return family
    return None


def __getattr__(name: str) -> Any:
    if name not in ("FlowModel", "Rows"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(".model", __name__), name)
