"""Training objectives of token models: per-sample losses of logits, and their weightings over time.

A new one is one function (logits, sample, path=..., weight=...) -> (B,), and one line in ``OBJECTIVES``.

The generalised Kullback-Leibler divergence of two rates of jumps u and v from x, sum over y of u log(u / v) - u + v,
becomes on a mixture path, with p the predicted posterior and r = kappa' / (1 - kappa),

    r (1 - p(x_t))                   where x_t = x1:   a right token is to be kept,
    r (-log p(x1) - p(x_t))          where x_t != x1:  a wrong one is to be moved to x1.

Both are >= 0, and 0 where p is sure of x1. Integrated over t in [0, 1] and summed over positions it bounds
-log p(x1) from above: Shaul et al. 2024 (arXiv:2412.03487); Lipman et al. 2024 (arXiv:2412.06264), sec. 7.
With the mask source p(x_t) is 0 at a mask and 1 elsewhere, and cross-entropy at the masks is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...errors import UserError
from ..tensors import by_row, compute_dtype, time_dtype
from ..times import check_positive
from .categorical import Logits
from .paths import DiscretePath, DiscreteSample, MixturePath
from .simulate import check_logits


class Divergence(NamedTuple):
    """The two parts of the generalised KL divergence of each token, (B, ...), without the rate r; both >= 0."""

    keep: Tensor
    move: Tensor


def generalised_kl_parts(logits: Tensor, sample: DiscreteSample, path: DiscretePath) -> Divergence:
    """Return what keeping right tokens and moving wrong ones cost, per token and per unit of the rate.

    Raises:
        UserError: the path is no mixture, whose divergence takes a sum over pairs of tokens; logits as
            ``cross_entropy``.
    """
    mixture_of(path)
    log_p, (xt, x1, _) = _log_posterior(logits, sample, path), sample
    log_p1 = log_p.gather(-1, x1[..., None])[..., 0]
    # A mask is in no data: its probability is 0, and the index below only has to exist.
    inside = xt < path.vocabulary
    log_px = log_p.gather(-1, xt.clamp(max=path.vocabulary - 1)[..., None])[..., 0]
    px = torch.where(inside, log_px.exp(), 0.0)
    right, known = xt == x1, path.known(xt)
    keep = torch.where(right & ~known, -torch.expm1(log_px), 0.0)
    move = torch.where(right, 0.0, -log_p1 - px)
    return Divergence(keep, move)


def generalised_kl(
    logits: Tensor, sample: DiscreteSample, *, path: DiscretePath, weight: Tensor | None = None
) -> Tensor:
    """Generalised KL divergence between the rates given x1 and the predicted ones, averaged over positions.

    Args:
        logits: (B, ..., V) at ``sample.xt`` and ``sample.t``.
        sample: from ``path.sample``.
        path: a mixture path.
        weight: (B,) factors in the place of the rate, from ``WEIGHTINGS``; default: "likelihood", the rate itself.

    Returns:
        (B,), float32 or better.

    Raises:
        UserError: as ``generalised_kl_parts``.
        ValueError: the weight is not (B,).
    """
    keep, move = generalised_kl_parts(logits, sample, path)
    default = likelihood(path, sample.t) if weight is None else weight
    return weighted_mean(keep + move, default)


def cross_entropy(
    logits: Tensor, sample: DiscreteSample, *, path: DiscretePath, weight: Tensor | None = None
) -> Tensor:
    """-log p(x1 | x_t), averaged over positions: its minimum is the posterior, on every path.

    Gat et al. 2024 (arXiv:2407.15595); Campbell et al. 2024 (arXiv:2402.04997). Positions that are
    known (not masked, with the mask source) count as 0. With the weight "likelihood" and the mask source it is the
    generalised KL divergence.

    Args:
        logits: (B, ..., V) at ``sample.xt`` and ``sample.t``.
        sample: from ``path.sample``.
        path: the path of the sample.
        weight: (B,) factors, from ``WEIGHTINGS``; default: 1.

    Returns:
        (B,), float32 or better.

    Raises:
        UserError: logits of another vocabulary or shape.
        ValueError: the weight is not (B,).
    """
    log_p = _log_posterior(logits, sample, path)
    loss = -log_p.gather(-1, sample.x1[..., None])[..., 0]
    loss = torch.where(path.known(sample.xt), 0.0, loss)
    return weighted_mean(loss, torch.ones(len(loss)) if weight is None else weight)


#: (logits, sample, *, path, weight) -> (B,)
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "generalised-kl": generalised_kl,
    "cross-entropy": cross_entropy,
}

#: (path, t) -> the factor at t, in float64 where there is one, shaped like t: () or (B,).
Weighting: TypeAlias = Callable[[DiscretePath, Tensor], Tensor]


def constant(path: DiscretePath, t: Tensor) -> Tensor:
    """1: the plain cross-entropy (Gat et al. 2024)."""
    return torch.ones_like(t, dtype=time_dtype(t.device))


def likelihood(path: DiscretePath, t: Tensor) -> Tensor:
    """kappa' / (1 - kappa): the bound of the likelihood, whatever kappa is. At t = 1 that of shortly before."""
    return mixture_of(path).rate(t.to(time_dtype(t.device)))


def capped(most: float = 5.0) -> Weighting:
    """min(kappa' / (1 - kappa), ``most``): the bound without its large factors near the data, of which few are drawn.

    Raises:
        UserError: most is not positive and finite.
    """
    check_positive("the cap of the weighting", most)
    return lambda path, t: likelihood(path, t).clamp(max=most)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "constant": lambda: constant,
    "likelihood": lambda: likelihood,
    "capped": capped,
}


def mixture_of(path: DiscretePath) -> MixturePath:
    """Return ``path``.

    Raises:
        UserError: it is no mixture path.
    """
    if not isinstance(path, MixturePath):
        raise UserError(
            f"{type(path).__name__} has no generalised KL divergence in closed form",
            "Train it with 'cross-entropy' and the weighting 'constant', or use a mixture path.",
        )
    return path


def _log_posterior(logits: Tensor, sample: DiscreteSample, path: DiscretePath) -> Tensor:
    # Values are left to the loop, which sees the loss: to look at them here a GPU would have to be waited for.
    check_logits(Logits(logits), sample.xt, path, "in training", values=False)
    return logits.to(compute_dtype(logits)).log_softmax(-1)


def weighted_mean(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the means (B,) of a loss (B, ...) over its positions, times one factor or (B,); ValueError for others."""
    rows = by_row(loss).mean(1)
    if weight.ndim > 1 or (weight.ndim and weight.shape != rows.shape):
        raise ValueError(f"the weight has shape {tuple(weight.shape)}: pass one per row, {tuple(rows.shape)}")
    return weight.to(rows) * rows
