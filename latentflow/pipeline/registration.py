"""Our pipelines among diffusers' own."""

from __future__ import annotations

import diffusers
from diffusers.pipelines import auto_pipeline

from .generate import LatentFlowPipeline
from .img2img import LatentFlowImg2ImgPipeline
from .inpaint import LatentFlowInpaintPipeline


def register_with_diffusers() -> None:
    """Let stock ``DiffusionPipeline.from_pretrained(folder)`` and the ``AutoPipelineFor...`` Text2Image,
    Image2Image and Inpainting open our checkpoints.

    diffusers looks a pipeline's class up among its own attributes, and a component's class in modules that
    are already imported; this puts ours there. Nothing in the checkpoint's folder is executed. Calling it
    again changes nothing.
    """
    for mapping, pipeline in (
        (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, LatentFlowPipeline),
        (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, LatentFlowImg2ImgPipeline),
        (auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, LatentFlowInpaintPipeline),
    ):
        mapping["latentflow"] = pipeline
        setattr(diffusers, pipeline.__name__, pipeline)
