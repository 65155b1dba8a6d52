"""Classification by a conditional flow: under which condition is a sample most likely?

With the exact velocity of each condition c the evidence lower bound is tight, and up to a constant that does not
depend on c (Kingma & Gao 2023, arXiv:2303.00848, eq. 8; Kong et al. 2023, arXiv:2302.03792, eq. 8)

    -log p(x1 | c) = 1/2 int E |noise - noise predicted under c|^2 d lambda,    lambda = log-SNR.

So the differences of these losses are the posterior's log-ratios (diffusion classifiers: Li et al. 2023,
arXiv:2303.16203). They are estimated with the same times and noises for all conditions: what a noise adds to every
condition's error alike is no part of a difference.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .paths import CondOT
from .predictions import convert
from .tensors import time_dtype
from .weightings import Likelihood, Weighting

#: between which log-SNRs the loss is integrated: outside them conditions hardly differ
LOG_SNR = (-8.0, 8.0)


class ConditionalVelocity(Protocol):
    """(x, t, condition) -> velocity (B, ...) on the straight path."""

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Evaluate x (B, ...) at t (B,) under conditions (B,) int64, each a number below the number of conditions."""
        ...


class Comparison(NamedTuple):
    """Conditions of N samples compared, in float64.

    Attributes:
        log_ratios: (N, K) log p(x1 | condition) less that of the best condition, estimated on their common draws.
        losses: (N, K) estimates of the integral at the head of this file: of the best condition by all draws, of
            another what it has more on their common draws.
        evaluations: (N, K) int64, of the velocity.
    """

    log_ratios: Tensor
    losses: Tensor
    evaluations: Tensor

    def log_posterior(self, log_prior: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Return log p(condition | x1), (N, K).

        Args:
            log_prior: (K,); default: all conditions alike.
            temperature: what the log-ratios are divided by, to calibrate them.
        """
        scores = self.log_ratios / temperature
        return torch.log_softmax(scores if log_prior is None else scores + log_prior, 1)


def compare_conditions(
    velocity: ConditionalVelocity,
    x1: Tensor,
    conditions: int,
    *,
    evaluations: int = 32,
    halving: bool = True,
    weighting: Weighting | None = None,
    log_snr: tuple[float, float] = LOG_SNR,
    batch_size: int = 64,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Comparison:
    """Compare conditions by their flow-matching errors on the same draws.

    Log-SNRs are evenly spread by a van der Corput sequence, whose start differs from sample to sample; each is taken
    with a noise and its negative, so that of what is linear in the noise nothing is left.

    Args:
        velocity: of each condition, on the straight path (`CondOT`), in which the source is N(0, I).
        x1: (N, ...) samples, floating point.
        conditions: K, at least 2.
        evaluations: draws for each condition that remains to the end, even.
        halving: in rounds, drop the worse half of the conditions of each sample, and double the draws of the others
            (successive halving); False: all conditions have all draws.
        weighting: an entry of ``WEIGHTINGS``; default: `Likelihood`, by which the ratios are those of likelihoods.
        log_snr: least and largest.
        batch_size: rows of the velocity's input.
        generator: of the noises, one for all samples or one for each.

    Raises:
        UserError: fewer than two conditions or evaluations, or an odd number of these; a loss is not finite.
    """
    if conditions < 2:
        raise UserError("there is one condition to choose from", "Give at least two.")
    if evaluations < 2 or evaluations % 2:
        raise UserError(
            f"evaluations is {evaluations}", "Give an even number, at least 2: noises come in pairs."
        )
    n, (low, high), path = len(x1), log_snr, CondOT()
    weigh, x1 = weighting or Likelihood(), x1.detach()
    noises, shifts = _draws(x1, evaluations // 2, generator)
    spread = (_van_der_corput(evaluations // 2) + shifts[:, None]) % 1.0
    lambdas = low + (high - low) * spread  # (N, E / 2) float64
    times = path.inverse_log_snr(lambdas)
    errors = torch.full((n, conditions, evaluations), torch.nan, dtype=torch.float64)
    kept = torch.ones(n, conditions, dtype=torch.bool)
    done = 0
    for share, remaining in _rounds(conditions, halving):
        upto = min(evaluations, max(done, 2 * round(share * evaluations / 2), 2))
        due = kept[:, :, None].expand(-1, -1, upto - done).nonzero()
        for part in due.split(batch_size) if len(due) else ():  # a round may add no draw
            sample, condition, draw = part[:, 0], part[:, 1], part[:, 2] + done
            pair, negative = draw // 2, (draw % 2 == 1).view(-1, *[1] * (x1.ndim - 1)).to(x1.device)
            x0 = torch.where(negative, -noises[sample, pair], noises[sample, pair])
            t = times[sample, pair].to(x1.device, time_dtype(x1.device))
            point = path.sample(x0, x1[sample], t)
            v = velocity(point.xt, t, condition.to(x1.device))
            missed = convert(v, point.xt, t, path, source="velocity", target="noise") - x0
            squared = missed.to(time_dtype(x1.device)).flatten(1).square().sum(1)
            if not bool(squared.isfinite().all()):  # a NaN is the mark of a draw that is not taken
                raise UserError(
                    "the velocity is not finite at some sample", "Check the checkpoint and the images."
                )
            errors[sample, condition, draw] = squared.cpu().double() * weigh(lambdas[sample, pair])
        done = upto
        losses = _loss(errors, high - low)
        worst = losses.masked_fill(~kept, torch.inf).argsort(1)[:, remaining:]
        kept = kept.scatter(1, worst, False)
    best = losses.masked_fill(~kept, torch.inf).argmin(1, keepdim=True)
    apart = _loss(errors - errors.gather(1, best[:, :, None].expand(-1, -1, evaluations)), high - low)
    return Comparison(-apart, losses.gather(1, best) + apart, errors.isfinite().sum(2))


def _loss(errors: Tensor, width: float) -> Tensor:
    """Return half the integral over the log-SNR of errors (N, K, E), of those that are there."""
    return 0.5 * width * errors.nanmean(2)


def _rounds(conditions: int, halving: bool) -> list[tuple[float, int]]:
    """Return for each round the share of all draws after it, and the conditions that remain after it."""
    if not halving:
        return [(1.0, 1)]
    counts = [conditions]
    while counts[-1] > 2:
        counts.append((counts[-1] + 1) // 2)
    return [(0.5 ** (len(counts) - 1 - i), max(1, (count + 1) // 2)) for i, count in enumerate(counts)]


def _van_der_corput(count: int) -> Tensor:
    """Return the first ``count`` numbers of the sequence in base 2, in [0, 1)."""
    return torch.tensor(
        [sum((i >> bit & 1) / 2.0 ** (bit + 1) for bit in range(i.bit_length())) for i in range(count)],
        dtype=torch.float64,
    )


def _draws(
    x1: Tensor, count: int, generator: torch.Generator | list[torch.Generator] | None
) -> tuple[Tensor, Tensor]:
    """Return noises (N, count, ...) like x1, and numbers (N,) in [0, 1), drawn on the CPU."""
    each = generator if isinstance(generator, list) else [generator] * len(x1)
    shifts = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in each])
    noises = torch.stack([torch.randn(count, *x1.shape[1:], generator=generator) for generator in each])
    return noises.to(x1), shifts
