"""Diffusers pipelines of latentflow's checkpoints: generate, image-to-image, inpaint, edit.

The others are had from `latentflow`, as all public names: this imports only what generating needs.
"""

from __future__ import annotations

from .generate import LatentFlowPipeline as LatentFlowPipeline
