"""Pipelines that have the components of others: an image-to-image or inpainting one is opened as text-to-image."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import diffusers

from . import SIBLINGS

log = logging.getLogger(__name__)


def text_to_image(pipeline: Any) -> Any:
    """Return the text-to-image pipeline that has the components of an image-to-image or inpainting one.

    Where the network takes a mask beside its latent, the inpainting pipeline is the network's own.
    """
    stock = SIBLINGS.get(type(pipeline).__name__)
    if stock is None or extra_channels(pipeline) > 0:
        return pipeline
    if "PAG" in type(pipeline).__name__:
        log.warning(
            "%s is opened as %s: perturbed-attention guidance is not applied", type(pipeline).__name__, stock
        )
    kind = getattr(diffusers, stock)
    taken = inspect.signature(kind).parameters
    # not by from_pipe, which brings all components to one precision
    has = {**pipeline.config, **pipeline.components}
    made = kind(**{name: value for name, value in has.items() if name in taken})
    for name in ("_all_hooks", "_offload_device", "_offload_gpu_id"):  # of components that are offloaded
        if name in vars(pipeline):
            setattr(made, name, getattr(pipeline, name))
    return made


def extra_channels(pipeline: Any) -> int:
    """Return how many channels a U-Net takes beside those of its latent; 0 for other networks."""
    config = {} if getattr(pipeline, "unet", None) is None else pipeline.unet.config
    return int(config.get("in_channels", 0)) - int(config.get("out_channels", 0))
