"""Preview pictures of a run, through the pipeline class that users load."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torchvision.utils import make_grid

from ..data import Source, to_pil
from ..pipeline import LatentFlowPipeline
from .precision import has_fast_bfloat16

_IMAGES = 16


def preview_grid(pipe: LatentFlowPipeline, source: Source, device: torch.device) -> Image.Image:
    """A grid of 16 pictures with fixed seeds, of captions or classes spread over ``source``."""
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(device)
    rows = torch.linspace(0, len(source) - 1, _IMAGES).long().tolist()
    asked: dict[str, Any] = {"num_images_per_prompt": _IMAGES}
    if source.kind == "text":
        captions = source.captions()
        asked = {"prompt": [captions[row] for row in rows]}
    elif source.kind == "class":
        asked = {"class_labels": [index % len(source.classes) for index in range(_IMAGES)]}
    generators = [torch.Generator().manual_seed(seed) for seed in range(_IMAGES)]
    with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
        images = pipe(**asked, generator=generators, num_inference_steps=10, output_type="pt").images
    return to_pil(make_grid(images.float() * 2 - 1, nrow=8, padding=2, pad_value=1.0))
