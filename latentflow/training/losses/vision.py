"""Frozen vision models: features of the patches of an image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...errors import UserError, reason
from ...utils.components import load_transformers_model

# Models of images and text, of which only the image half is wanted.
_IMAGE_HALVES: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


class VisionEncoder:
    """A transformers vision model (ViT, DINOv2, CLIP, SigLIP, ...), by hub id or folder, in float32.

    It is no module, so that whoever holds it neither trains nor saves it.

    Attributes:
        width: features of a patch.

    Raises:
        UserError: it cannot be loaded from safetensors, or gives no features of patches.
    """

    def __init__(self, name: str) -> None:
        self._model = load_transformers_model(
            name,
            f"the vision model '{name}'",
            lambda config: _IMAGE_HALVES.get(config.model_type, AutoModel),
            fix="Give a transformers model with safetensors: a folder, or a hub id such as facebook/dinov2-small. "
            f"Without a network, download it where there is one (`hf download {name}`) and give that folder.",
            other_parts=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
        self._model.requires_grad_(False)
        self._colours = torch.tensor(_normalisation(name)).view(2, -1, 1, 1)  # mean and standard deviation
        self._patch = getattr(self._model.config, "patch_size", None) or 1
        parameters = inspect.signature(self._model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        try:
            self.width = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (2, 3)).shape[2]
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"'{name}' gives no features of patches: {reason(error)}",
                "Use a vision transformer such as DINOv2 or ViT.",
            ) from error

    def __deepcopy__(self, memo: object) -> VisionEncoder:
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (B, h * w, width) of pixels (B, 3, H, W) uint8, row by row of the ``grid`` (h, w).

        The images are resized so that the model's patches are the cells of the grid, as in the paper that uses them
        (arXiv:2410.06940): no feature is interpolated, only the model's table of positions.
        """
        self._model.to(pixels.device)
        rows, columns = grid
        size = rows * self._patch, columns * self._patch
        images = F.interpolate(pixels.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        self._colours = self._colours.to(pixels.device)
        mean, std = self._colours
        states = self._model((images - mean) / std, **self._options).last_hidden_state
        if states.ndim != 3 or states.shape[1] < rows * columns:
            raise ValueError(f"{tuple(states.shape)} for {rows * columns} patches")
        patches: Tensor = states[:, -rows * columns :].float()  # before them come the class and registers
        return patches


def _normalisation(name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the colours, by the model's image processor; ImageNet's without one."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        found = {}
    if found.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    return (
        list(found.get("image_mean") or IMAGENET_DEFAULT_MEAN),
        list(found.get("image_std") or IMAGENET_DEFAULT_STD),
    )
