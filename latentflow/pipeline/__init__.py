"""Diffusers pipelines of latentflow's checkpoints: generate, image-to-image, inpaint, edit.

All pipelines are public names of `latentflow`; this package itself imports only what generating needs.
"""

from __future__ import annotations

from ..utils import quick_imports

with quick_imports():
    from .generate import LatentFlowPipeline as LatentFlowPipeline
