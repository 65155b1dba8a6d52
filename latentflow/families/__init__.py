"""Flow models: one class for each family of checkpoints, in one file of this package and one line of `FAMILIES`."""

from __future__ import annotations

from .latentflow import LatentFlowModel
from .model import FlowModel as FlowModel
from .model import Rows as Rows

#: class name of a diffusers pipeline (in model_index.json) -> the flow model that holds it
FAMILIES: dict[str, type[FlowModel]] = {
    "LatentFlowPipeline": LatentFlowModel,
    "LatentFlowEditPipeline": LatentFlowModel,
    "LatentFlowImg2ImgPipeline": LatentFlowModel,
    "LatentFlowInpaintPipeline": LatentFlowModel,
}
