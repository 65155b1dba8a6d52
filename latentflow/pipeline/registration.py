"""Our pipelines among diffusers' own, so that its loaders find them."""

from __future__ import annotations

import diffusers
from diffusers.pipelines import auto_pipeline

import latentflow

from .base import FAMILY


def register_with_diffusers() -> None:
    """Let stock ``DiffusionPipeline.from_pretrained(folder)`` and the ``AutoPipelineFor...`` Text2Image,
    Image2Image and Inpainting open our checkpoints, whichever of our pipelines has saved them.

    diffusers looks a pipeline's class up among its own attributes, and a component's class in modules that
    are already imported; this puts ours there. Nothing in the checkpoint's folder is executed. Calling it
    again changes nothing.
    """
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["latentflow"] = latentflow.LatentFlowPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["latentflow"] = latentflow.LatentFlowImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["latentflow"] = latentflow.LatentFlowInpaintPipeline
    for name in FAMILY:
        pipeline = getattr(latentflow, name)
        setattr(diffusers, name, pipeline)
        if auto_pipeline._get_model(name) is None:  # it has no task of diffusers': its folder opens for all
            auto_pipeline.SUPPORTED_TASKS_MAPPINGS.append({"latentflow": pipeline})
