"""Training objectives: per-sample losses. A new one is one function, and one line in ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .paths import PathSample
from .tensors import compute_dtype


def flow_matching_loss(prediction: Tensor, sample: PathSample, *, direction_weight: float = 0.0) -> Tensor:
    """||u(x_t, t) - dx_t/dt||^2, averaged over everything but the rows.

    Lipman et al. 2022 (arXiv:2210.02747), eq. 9. ``direction_weight`` times 1 - cos(u, dx_t/dt), the cosine
    over channels, averaged over positions, is added: Yao et al. 2024 (FasterDiT, arXiv:2410.10356), also in
    LightningDiT (arXiv:2501.01423).

    Args:
        prediction: the network's velocity, (B, C, ...), at ``sample.xt`` and ``sample.t``.
        sample: from ``path.sample``.

    Returns:
        (B,), float32 or better.

    Raises:
        ValueError: the prediction is not shaped like the target.
    """
    if prediction.shape != sample.velocity.shape:
        raise ValueError(
            f"the network returned shape {tuple(prediction.shape)} for a velocity of shape "
            f"{tuple(sample.velocity.shape)}: its out_channels must equal the latent channels"
        )
    dtype = compute_dtype(prediction, sample.velocity)
    u, target = prediction.to(dtype), sample.velocity.to(dtype)
    loss = (u - target).square().flatten(1).mean(1)
    if direction_weight:
        misdirection = 1.0 - torch.cosine_similarity(u, target, dim=1)  # (B, ...) without channels
        loss = loss + direction_weight * misdirection.reshape(len(u), -1).mean(1)
    return loss


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "flow-matching": flow_matching_loss,
}
