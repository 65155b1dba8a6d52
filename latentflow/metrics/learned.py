"""Inception's features, FID and CLIP score, through torchmetrics. Their weights are downloaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..utils.libraries import missing
from ..utils.progress import progress_bar
from .features import refuse_not_finite


def open_fid(network: nn.Module | None = None) -> Any:
    """Open Inception for `inception_fid`.

    Args:
        network: maps uint8 images (B, 3, H, W) to features (B, D) instead of Inception; its ``num_features`` is D.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be fetched.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(
            feature=network if network is not None else 2048, reset_real_features=False
        )
    except ModuleNotFoundError as error:
        raise missing("Inception's features need", "torch-fidelity") from error
    except OSError as error:
        raise _no_weights("Inception's weights", error) from error
    metric.set_dtype(torch.float64)
    return metric


@lru_cache(maxsize=1)
def _kept_fid() -> Any:
    return open_fid()


@torch.no_grad()
def inception_features(images: Tensor) -> Tensor:
    """Return Inception's pooled features (B, 2048), those that FID compares, of images (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: see `open_fid`.
    """
    found: Tensor = _kept_fid().inception.to(images.device)(_bytes(images))
    return found


def inception_fid(metric: Any, sets: Sequence[Tensor], real: Tensor, *, batch_size: int = 50) -> list[float]:
    """Return the Frechet Inception distance (Heusel et al. 2017, arXiv:1706.08500) of each set to the real images.

    Args:
        metric: from `open_fid`.
        sets, real: (N, 3, H, W) in [-1, 1], at least two images each. Papers use N = 50,000; fewer images raise the
            distance, so compare only sets of one size.

    Raises:
        UserError: an image holds values that are not finite.
    """
    metric.reset_real_features = True
    metric.reset()
    metric.reset_real_features = False
    for batch in progress_bar(real.split(batch_size), desc="inception features"):
        metric.update(_bytes(batch), real=True)
    found = []
    for images in sets:
        metric.reset()  # keeps the real images
        for batch in progress_bar(images.split(batch_size), desc="inception features"):
            metric.update(_bytes(batch), real=False)
        found.append(float(metric.compute()))
    return found


def open_clip(model: str) -> Any:
    """Open a CLIP model for `clip_score`.

    Args:
        model: hub id or folder of a CLIP model.

    Raises:
        UserError: the model cannot be fetched.
    """
    from torchmetrics.multimodal import CLIPScore

    try:
        return CLIPScore(model_name_or_path=model)  # type: ignore[arg-type]
    except OSError as error:
        raise _no_weights(f"the CLIP model '{model}'", error) from error


def clip_score(metric: Any, images: Tensor, captions: Sequence[str], *, batch_size: int = 50) -> float:
    """Return the mean of 100 cos(image, caption) under CLIP (Hessel et al. 2021, arXiv:2104.08718).

    Args:
        metric: from `open_clip`.
        images: (N, 3, H, W) in [-1, 1].
        captions: N texts.

    Raises:
        UserError: an image holds values that are not finite.
    """
    metric.reset()
    for start in progress_bar(range(0, len(captions), batch_size), desc="clip scores"):
        rows = slice(start, start + batch_size)
        metric.update(list(_bytes(images[rows])), list(captions[rows]))
    return float(metric.compute())


def _bytes(images: Tensor) -> Tensor:
    refuse_not_finite(images, "images")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _no_weights(name: str, error: OSError) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{name} could not be loaded: {reason}", "Check the network, or leave this metric out.")
