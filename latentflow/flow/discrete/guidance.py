"""Classifier-free guidance of token models, on log-probabilities.

The rule is that of ``latentflow.flow.guide``, with log-probabilities in the place of velocities, and so is the order:
conditional, then unconditional. The two tensors of logits are combined a few positions at a time, where tokens are
drawn: no third one is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance import check_rows, checked_scales, halves
from ..tensors import expand_t, time_dtype, with_time_rows
from .categorical import Logits
from .simulate import Posterior


def guide(
    conditional: Posterior,
    unconditional: Posterior,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Posterior:
    """Guided posterior, log p = log p_cond + (scale - 1) (log p_cond - log p_uncond), normalised.

    The posterior given the condition, sharpened: p_cond (p_cond / p_uncond)^(scale - 1). Its jump rates are the guided
    rates of Nisonoff et al. 2024 (arXiv:2406.01572) on a mixture path with the mask source, up to their norm. A token
    that is impossible under either posterior keeps its conditional logit.

    Args:
        conditional, unconditional: (x, t) -> logits.
        scale: 1 is the plain conditional posterior at one evaluation. One number, or (B,): one for each row.
        interval: (low, high) in t (t = 0 source, t = 1 data): guide where low <= t <= high; elsewhere only
            ``conditional`` is evaluated.

    Raises:
        UserError: scale is not finite; the interval is not 0 <= low <= high <= 1.
        ValueError: scale has more than one dimension or, when evaluated, not one number for each row.
    """
    pair = (with_time_rows(conditional), with_time_rows(unconditional))  # type: ignore[arg-type]
    return _guided(pair[0], lambda x, t: (pair[0](x, t), pair[1](x, t)), scale, interval)


def guide_batched(
    batched: Posterior,
    conditional: Posterior,
    scale: float | Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Posterior:
    """``guide`` with one evaluation per guided call instead of two.

    Args:
        batched: posterior over 2B rows: the first B rows under the condition, the last B without it.
        conditional: posterior over B rows, evaluated alone at scale 1 or outside the interval.
        scale, interval: as in ``guide``.

    Raises:
        UserError, ValueError: as in ``guide``.
    """
    pair = halves(batched)  # type: ignore[arg-type]
    return _guided(with_time_rows(conditional), pair, scale, interval)  # type: ignore[arg-type]


def _guided(
    conditional: Callable[[Tensor, Tensor], Tensor],
    pair: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    scale: float | Tensor,
    interval: tuple[float, float],
) -> Posterior:
    scales, (low, high) = checked_scales(scale, interval), interval

    def guided(x: Tensor, t: Tensor) -> Tensor | Logits:
        check_rows(scales, x)
        time = expand_t(t, x).flatten().cpu()
        active = (low <= time) & (time <= high)
        extra = torch.where(active, scales - 1.0, 0.0)  # (1,) or (B,)
        if not bool(extra.any()):
            return conditional(x, t)
        given, without = pair(x, t)
        return Logits(given, without, extra.to(x.device, time_dtype(x.device)).expand(len(x)))

    return conditional if bool((scales == 1.0).all()) else guided
