"""The device on which a module computes, also while diffusers or accelerate keep its weights elsewhere."""

from __future__ import annotations

import torch
from diffusers.models.modeling_utils import get_parameter_device
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, and its inputs belong, also where its weights are offloaded."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)  # a hook of accelerate
        if device is not None:
            return torch.device(device)
    own: torch.device = get_parameter_device(module)  # diffusers' own: it knows its hooks of group offloading
    return own
