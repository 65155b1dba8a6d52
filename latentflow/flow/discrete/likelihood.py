"""A bound of the likelihood that a token model gives to its data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import whole
from ..solvers.integrate import Progress, progress_over
from ..tensors import Generators, by_row, time_dtype, uniform_like, with_time_rows
from .objectives import cross_entropy, generalised_kl_parts, mixture_of
from .paths import DiscretePath, DiscreteSample
from .simulate import Posterior, as_logits, check_logits

#: sqrt(1 - kappa) where the last draw is made: 1 % of the tokens are the source's
_LAST = 0.1


@torch.no_grad()
def likelihood_bound(
    posterior: Posterior,
    x1: Tensor,
    path: DiscretePath,
    *,
    samples: int = 64,
    progress: Progress = False,
    generator: Generators = None,
) -> Tensor:
    """Upper bound of -log p(x1), in nats and summed over positions, for jumps that end with a draw from the posterior.

    It is the integral of the generalised KL divergence up to kappa = 0.99, and there the cross-entropy, as every token
    is drawn. Up to kappa = 1 the integral is infinite under a uniform source, unless the posterior is sure of right
    tokens there, which no network is.

    As dt kappa' is d kappa, the bound is the same for every schedule. It is estimated with one draw in each of
    ``samples`` equal parts of v = sqrt(1 - kappa), under which the weight d kappa / (1 - kappa) = 2 dv / v varies less.
    With the mask source and the exact posterior of a single position it is -log p(x1) itself; otherwise it is more.
    For bits per token pass its negative to ``bits_per_dim``.

    Args:
        posterior: (x, t) -> logits (B, ..., V); t is (B,).
        x1: (B, ...) tokens of the data.
        path: a mixture path.
        samples: evaluations of the integral; the last draw is one more.
        progress: True for a progress bar, or a function that wraps the iterable of indices.
        generator: decides the draws; a list with one for each row makes every row independent of the others.

    Returns:
        (B,) float64, an unbiased estimate of the bound.

    Raises:
        UserError: the path is no mixture; x1 holds no tokens of it; samples < 1; logits as in ``simulate``.
    """
    mixture, count = mixture_of(path), whole("samples of the likelihood bound", samples, 1)
    follow = with_time_rows(posterior)  # type: ignore[arg-type]

    def evaluated(v: Tensor, u: Tensor, index: int) -> tuple[Tensor, DiscreteSample]:
        t = mixture.kappa.inverse(1.0 - v * v)
        sample = mixture.sample(x1, t, u)
        logits = as_logits(follow(sample.xt, t))
        check_logits(logits, x1, mixture, f"in evaluation {index + 1} of {count + 1}")
        return logits.dense(), sample

    total = torch.zeros(len(x1), dtype=time_dtype(x1.device), device=x1.device)
    for index in progress_over(progress, range(count)):
        u = uniform_like(x1, generator, 2)
        v = _LAST + (1.0 - _LAST) * (index + 1.0 - by_row(u[0])[:, 0]) / count
        keep, move = generalised_kl_parts(*evaluated(v, u[1], index), mixture)
        total += by_row(keep + move).sum(1) * (1.0 - _LAST) * 2.0 / v
    last = evaluated(torch.full_like(total, _LAST), uniform_like(x1, generator, 1)[0], count)
    return total / count + cross_entropy(*last, path=mixture) * x1.shape[1:].numel()
