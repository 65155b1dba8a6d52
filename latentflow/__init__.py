"""latentflow: point it at a folder of images and get a latent flow-matching generator."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoencoder import load_autoencoder as load_autoencoder
    from .families import FlowModel as FlowModel
    from .models import DiT as DiT
    from .models import UNet as UNet
    from .pipeline.edit import LatentFlowEditPipeline as LatentFlowEditPipeline
    from .pipeline.generate import LatentFlowPipeline as LatentFlowPipeline
    from .pipeline.images import expand_canvas as expand_canvas
    from .pipeline.img2img import LatentFlowImg2ImgPipeline as LatentFlowImg2ImgPipeline
    from .pipeline.inpaint import LatentFlowInpaintPipeline as LatentFlowInpaintPipeline
    from .pipeline.registration import register_with_diffusers as register_with_diffusers
    from .training import fit as fit

__version__ = "0.1.0"

# diffusers imports bitsandbytes wherever it is installed, which then complains of a kernel that only inference in 4
# bits on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Public name -> module that owns it. Imported on first use, so that the mathematics (`latentflow.flow`) and
# `latentflow --help` do not pay for diffusers and transformers.
_OWNERS = {
    "LatentFlowPipeline": ".pipeline.generate",
    "LatentFlowEditPipeline": ".pipeline.edit",
    "LatentFlowImg2ImgPipeline": ".pipeline.img2img",
    "LatentFlowInpaintPipeline": ".pipeline.inpaint",
    "expand_canvas": ".pipeline.images",
    "FlowModel": ".families",
    "DiT": ".models",
    "UNet": ".models",
    "load_autoencoder": ".autoencoder",
    "fit": ".training",
    "register_with_diffusers": ".pipeline.registration",
}

__all__ = sorted(_OWNERS)


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'latentflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_OWNERS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OWNERS])
