"""Distribution matching: move samples along the difference of the data's score and their own. Yin et al. 2023, 2024.

DMD (arXiv:2311.18828, eq. 7) and DMD2 (arXiv:2405.14867): the gradient of the reverse Kullback-Leibler divergence
between what a generator draws and the data, both with noise, is the difference of their scores, which on the straight
path is that of two velocities, or of the data x + (1 - t) v that they predict. One is the teacher's; the other is
that of a "fake" network, which learns the generator's distribution by flow matching during the run. No pairs are
needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import compute_dtype, expand_t, per_row

_LEAST = 1e-4  # smallest divisor


def distribution_matching_target(
    generated: Tensor, xt: Tensor, t: Tensor, teacher: Tensor, fake: Tensor
) -> Tensor:
    """Return ``generated`` minus the gradient, the target of the regression ||generated - target||^2 / 2.

    DMD, eq. 7 with the weight of eq. 8: the difference of the predicted data, divided by the mean absolute distance
    between the sample and the teacher's prediction of it, so that all t have gradients of about one size.

    Args:
        generated: (B, ...) the generator's samples, x1.
        xt: (B, ...) the same with noise, t x1 + (1 - t) x0.
        t: (B,) or a scalar.
        teacher, fake: (B, ...) the two velocities at ``xt`` and ``t``.

    Returns:
        (B, ...), float32 or better, without a graph.
    """
    dtype = compute_dtype(generated, teacher, fake)
    with torch.no_grad():
        left = 1.0 - expand_t(t, xt).to(dtype)
        distance = (generated.to(dtype) - xt.to(dtype) - left * teacher.to(dtype)).abs().flatten(1).mean(1)
        weight = per_row(distance.clamp(min=_LEAST), xt)
        return generated.to(dtype) - left * (fake.to(dtype) - teacher.to(dtype)) / weight
