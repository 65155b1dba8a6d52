"""Figures in learned feature spaces, through torchmetrics. Their weights are downloaded on first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentflow.errors import UserError


def inception_fid(
    generated: Tensor, real: Tensor, *, batch_size: int = 50, network: nn.Module | None = None
) -> float:
    """Frechet Inception distance (Heusel et al. 2017, arXiv:1706.08500).

    Args:
        generated, real: (N, 3, H, W) in [-1, 1]. Figures in papers use N = 50,000; fewer raise the distance.
        network: uint8 images (B, 3, H, W) -> features (B, D), in place of Inception.

    Raises:
        UserError: the extra is not installed, or the weights cannot be fetched.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(feature=network if network is not None else 2048)
    except ModuleNotFoundError as error:
        raise UserError("--fid needs torch-fidelity", 'pip install "latentflow[metrics]"') from error
    except OSError as error:
        raise _no_weights("Inception's weights", error) from error
    metric.set_dtype(torch.float64)
    for images, is_real in ((real, True), (generated, False)):
        for batch in tqdm(images.split(batch_size), desc="inception features"):
            metric.update(_bytes(batch), real=is_real)
    return float(metric.compute())


def clip_score(generated: Tensor, captions: Sequence[str], model: str, *, batch_size: int = 50) -> float:
    """100 cos(image, caption) under CLIP, averaged (Hessel et al. 2021, arXiv:2104.08718).

    Args:
        generated: (N, 3, H, W) in [-1, 1].
        captions: the N captions asked for.
        model: hub id or folder of a CLIP model.

    Raises:
        UserError: the model cannot be fetched.
    """
    from torchmetrics.multimodal import CLIPScore

    try:
        metric = CLIPScore(model_name_or_path=model)  # type: ignore[arg-type]
    except OSError as error:
        raise _no_weights(f"the CLIP model '{model}'", error) from error
    for start in tqdm(range(0, len(captions), batch_size), desc="clip scores"):
        rows = slice(start, start + batch_size)
        metric.update(list(_bytes(generated[rows])), list(captions[rows]))
    return float(metric.compute())


def _bytes(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _no_weights(what: str, error: OSError) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{what} could not be loaded: {reason}", "Check the network, or leave this figure out.")
