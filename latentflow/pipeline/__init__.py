"""Diffusers pipelines of latentflow's checkpoints: generate, image-to-image, inpaint, edit."""

from __future__ import annotations

from .edit import LatentFlowEditPipeline as LatentFlowEditPipeline
from .generate import LatentFlowPipeline as LatentFlowPipeline
from .img2img import LatentFlowImg2ImgPipeline as LatentFlowImg2ImgPipeline
from .inpaint import LatentFlowInpaintPipeline as LatentFlowInpaintPipeline
from .registration import register_with_diffusers as register_with_diffusers
