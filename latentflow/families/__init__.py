"""Flow models: one class for each family of checkpoints, in one file of this package and one line of `FAMILIES`."""

from __future__ import annotations

from .aura_flow import AuraFlowModel
from .cogview4 import CogView4Model
from .diffusion import ClassDiTModel, PixArtModel, StableDiffusionModel, StableDiffusionXLModel
from .flux import ChromaModel, FluxModel
from .flux2 import Flux2Model
from .hidream import HiDreamModel
from .krea2 import Krea2Model
from .latentflow import LatentFlowModel
from .lumina2 import Lumina2Model
from .model import FlowModel as FlowModel
from .model import Rows as Rows
from .prx import PRXModel
from .qwen_image import QwenImageModel
from .sana import SanaModel
from .stable_diffusion_3 import StableDiffusion3Model
from .z_image import ZImageModel

#: class name of a diffusers pipeline (in model_index.json) -> the flow model that holds it
FAMILIES: dict[str, type[FlowModel]] = {
    "LatentFlowPipeline": LatentFlowModel,
    "LatentFlowEditPipeline": LatentFlowModel,
    "LatentFlowImg2ImgPipeline": LatentFlowModel,
    "LatentFlowInpaintPipeline": LatentFlowModel,
    "StableDiffusion3Pipeline": StableDiffusion3Model,
    "FluxPipeline": FluxModel,
    "ChromaPipeline": ChromaModel,
    "Flux2Pipeline": Flux2Model,
    "Flux2KleinPipeline": Flux2Model,
    "QwenImagePipeline": QwenImageModel,
    "ZImagePipeline": ZImageModel,
    "SanaPipeline": SanaModel,
    "Lumina2Pipeline": Lumina2Model,
    "AuraFlowPipeline": AuraFlowModel,
    "CogView4Pipeline": CogView4Model,
    "HiDreamImagePipeline": HiDreamModel,
    "Krea2Pipeline": Krea2Model,
    "PRXPipeline": PRXModel,
    "StableDiffusionPipeline": StableDiffusionModel,
    "StableDiffusionXLPipeline": StableDiffusionXLModel,
    "PixArtAlphaPipeline": PixArtModel,
    "PixArtSigmaPipeline": PixArtModel,
    "DiTPipeline": ClassDiTModel,
}
