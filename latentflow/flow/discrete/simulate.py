"""The one loop that takes a sampler's steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import UserError, finite, lookup
from ..solvers.integrate import Callback, Progress, Times, progress_over
from ..tensors import NOT_FINITE, Generators, time_dtype, uniform_like, with_time_rows
from ..times import checked_times
from .categorical import Logits
from .paths import DiscretePath, check_tokens
from .samplers import CORRECTORS, Field, Sampler, SamplerOptions
from .table import SAMPLERS

#: (x, t) -> logits of p(x1 | x_t), (B, ..., V), unnormalised: x is (B, ...) int64, t a scalar tensor or (B,).
Posterior: TypeAlias = Callable[[Tensor, Tensor], Tensor | Logits]


@torch.no_grad()
def simulate(
    posterior: Posterior,
    x: Tensor,
    times: Times,
    sampler: str | Sampler = "exact",
    *,
    path: DiscretePath,
    corrector: float = 0.0,
    corrector_shape: str = "balanced",
    temperature: float = 1.0,
    known: Tensor | None = None,
    callback: Callback | None = None,
    progress: Progress = False,
    generator: Generators = None,
) -> Tensor:
    """Follow the jump process of ``path`` under ``posterior`` from ``times[0]`` to ``times[-1]``.

    Beyond the posterior's logits a step takes memory for a few numbers per token, and for one part in 256 of the
    logits at a time.

    Args:
        posterior: (x, t) -> logits (B, ..., V) of the data tokens given x_t. It gets t as a scalar tensor, an
            ``nn.Module`` as (B,).
        x: (B, ...) int64 at times[0]: ``path.start(uniform)`` at t = 0.
        times: N + 1 increasing times in [0, 1] make N steps, of one evaluation each.
        sampler: a key of ``SAMPLERS``, or a ``Sampler`` made by one of the factories behind it.
        path: that the posterior was trained on.
        corrector: c >= 0, the factor on the divergence-free part; 0 leaves it out. With the shape "balanced" it is
            the mean number of times that each token is drawn again.
        corrector_shape: a key of ``CORRECTORS``: how the part is spread over time.
        temperature: divides the logits; below 1 likely tokens are drawn more often.
        known: (B, ...) bool: tokens that are given and stay, for inpainting. With the mask source that is exact: the
            posterior knows them from the start. With others they are made noise again for each evaluation, as the path
            has it at that time, and are put back at the end.
        callback: called after each step with (step index, t reached, x); a tensor that it returns replaces x.
        progress: True for a progress bar, or a function that wraps the iterable of step indices (``tqdm``).
        generator: for all draws; a list with one for each row makes every row independent of the others.

    Returns:
        x at times[-1]; tokens of the data, where that is 1.

    Raises:
        UserError: unknown sampler or corrector shape (the nearest is suggested); a sampler for masks on a path without;
            logits of another vocabulary, or not finite (step and t are named); x or the callback's x are no tokens of
            the path, or masks are known; invalid times or settings.
        ValueError: ``known`` or the callback's x have another shape; not one generator for each row.
    """
    method = checked_sampler(sampler, path)
    grid = checked_times(times, rising=True)
    check_tokens(x, path.states, "x")
    if known is not None:
        if known.shape != x.shape or known.dtype != torch.bool:
            raise ValueError(
                f"known is {tuple(known.shape)}, {known.dtype}: pass a bool for each token, {tuple(x.shape)}"
            )
        check_tokens(x[known], path.vocabulary, "x where it is known")
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise UserError(f"temperature {temperature}", "Use a positive, finite number; 1 is the posterior.")
    options = SamplerOptions(
        path=path,
        strength=finite("the corrector", corrector, 0.0, fix="Use a finite number from 0; 1 to 5 are usual."),
        corrector=lookup(CORRECTORS, corrector_shape, "corrector shape"),
        temperature=temperature,
        generator=generator,
    )
    step, given = method.start(options), x
    steps = progress_over(progress, range(len(grid) - 1))
    show, follow = getattr(steps, "set_postfix", None), with_time_rows(posterior)  # type: ignore[arg-type]
    for index in steps:
        t, t_next = grid[index], grid[index + 1]
        if known is not None and not path.masked:
            noisy = path.draw(given.clamp(max=path.vocabulary - 1), t, uniform_like(x, generator, 1)[0])
            x = torch.where(known, noisy, x)
        field = _checked_field(follow, path, f"in step {index + 1} of {len(grid) - 1}")
        x = step(field, x, t, t_next)
        if known is not None:
            x = torch.where(known, given, x)
        if show is not None:
            show(evaluations=index + 1, refresh=False)
        if callback is not None:
            replacement = callback(index, _scalar(t_next, x), x)
            if replacement is not None:
                if replacement.shape != x.shape:
                    raise ValueError(
                        f"the callback returned shape {tuple(replacement.shape)}, but must keep that of x, "
                        f"{tuple(x.shape)}"
                    )
                check_tokens(replacement, path.states, f"the callback's x after step {index + 1}")
                x = replacement
    return x


def checked_sampler(sampler: str | Sampler, path: DiscretePath) -> Sampler:
    """Return a sampler, by its name in ``SAMPLERS`` or as it is.

    Raises:
        UserError: there is none of this name (the nearest is suggested), or it is for masks, which the path lacks.
    """
    method = sampler if isinstance(sampler, Sampler) else lookup(SAMPLERS, sampler, "sampler of tokens")
    if method.masked and not path.masked:
        named = f"the sampler '{sampler}'" if isinstance(sampler, str) else "the sampler"
        raise UserError(
            f"{named} decides which masks are lifted next, but {path} has none",
            f"Use {', '.join(samplers_of(path))}, or a model with the source 'mask'.",
        )
    return method


def samplers_of(path: DiscretePath) -> list[str]:
    """Return the names of the samplers that a path can have."""
    return [name for name, sampler in SAMPLERS.items() if path.masked or not sampler.masked]


def _checked_field(posterior: Posterior, path: DiscretePath, where: str) -> Field:
    def field(x: Tensor, t: float) -> Logits:
        logits = as_logits(posterior(x, _scalar(t, x)))
        check_logits(logits, x, path, f"at t = {t:g} {where}")
        return logits

    return field


def as_logits(value: Tensor | Logits) -> Logits:
    """Return the output of a posterior as `Logits`."""
    return value if isinstance(value, Logits) else Logits(value)


def check_logits(logits: Logits, x: Tensor, path: DiscretePath, where: str, values: bool = True) -> None:
    """Refuse logits that are no posterior of the path's data tokens.

    Args:
        values: look at the values too, not only at the shape.

    Raises:
        UserError: the vocabulary or the shape is another; some are NaN, infinite, or all -infinite for a token.
    """
    for value in (logits.conditional, logits.unconditional):
        if value is None:
            continue
        expected = (*x.shape, path.vocabulary)
        if value.shape != expected:
            vocabulary = value.shape[-1] if value.ndim else 0
            raise UserError(
                f"the posterior returned logits of shape {tuple(value.shape)} {where}, but for x of shape "
                f"{tuple(x.shape)} and a vocabulary of {path.vocabulary} they must be {expected}",
                "The mask is no token of the data: predict the vocabulary without it."
                if vocabulary == path.vocabulary + 1
                else "The network belongs to another tokenizer, or its logits are not in the last dimension.",
            )
        if not value.is_floating_point():
            raise UserError(f"the posterior returned {value.dtype} {where}", "Return logits.")
        if not values:
            continue
        # The largest logit of each token tells all: NaN passes through, and -infinite ones may be among others.
        bad = int((~value.amax(-1).isfinite()).sum())
        if bad:
            raise UserError(
                f"the logits {where} are not finite: those of {bad} of {x.numel()} tokens", NOT_FINITE
            )


def _scalar(t: float, x: Tensor) -> Tensor:
    return torch.full((), t, dtype=time_dtype(x.device), device=x.device)
