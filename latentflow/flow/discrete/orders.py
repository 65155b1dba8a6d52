"""Orders in which masks are lifted: samplers for the mask source, as changes of time.

On the path, the mask of a position is lifted when kappa passes a uniform number of its own. An order replaces these
numbers by the place of the position in a row: by each time just as many are lifted as kappa says on average, and which,
the order decides. Where no two positions are lifted in one step, an order that does not look at the tokens drawn
samples exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import UserError, finite
from ..tensors import by_row, time_dtype, uniform_like
from .categorical import Draw
from .samplers import Field, Sampler, SamplerOptions, Step, draw_data, redraw

#: (x, the positions that are masked, their draws, 1 - kappa) -> the place of every position, a floating-point number:
#: the lower, the sooner it is lifted.
Places: TypeAlias = Callable[[Tensor, Tensor, Draw, float], Tensor]


def random_order() -> Sampler:
    """Lift masks in a random order, drawn once: as ``exact``, but for the number lifted by a step, which is fixed.

    MaskGIT without confidence (Chang et al. 2022, arXiv:2202.04200); order 1, exact with a step per position.
    """

    def start(options: SamplerOptions) -> Places:
        places: Tensor | None = None

        def drawn_once(x: Tensor, masked: Tensor, drawn: Draw, rest: float) -> Tensor:
            nonlocal places
            if places is None:
                places = uniform_like(x, options.generator, 1)[0]
            return places

        return drawn_once

    return _by_order(start, order=1)


def halton() -> Sampler:
    """Lift masks in the order of a Halton sequence over the image, so that those of one step lie far apart.

    Besnier et al. 2025 (arXiv:2503.17076). Tokens (B, h, w) have a sequence of bases 2 and 3, those of another shape
    one of base 2 along the row. Order 1, exact with a step per position.
    """

    def places(x: Tensor, masked: Tensor, drawn: Draw, rest: float) -> Tensor:
        shape = x.shape[1:]
        grid = tuple(shape) if len(shape) == 2 else (shape.numel(),)
        order = halton_places(grid).reshape(shape)
        return order.to(x.device, time_dtype(x.device)).expand(x.shape)

    return _by_order(lambda options: places, order=1)


def confidence(noise: float = 4.5) -> Sampler:
    """Lift the masks whose drawn tokens are the most likely ones: log p + noise (1 - kappa) Gumbel, the largest first.

    MaskGIT, Chang et al. 2022 (arXiv:2202.04200), sec. 3.2. Which mask is lifted depends on what was drawn, so that
    likely tokens are drawn more often than the posterior says: a bias stays, however many the steps (order 0). It is
    the price of better looking images in few of them; without noise it is largest.

    Args:
        noise: its factor, falling to 0 with the share of masks; without end it is ``random_order``.

    Raises:
        UserError: noise is negative or not finite.
    """
    finite("noise of the sampler 'confidence'", noise, 0.0, fix="Use a finite number from 0; 4.5 is usual.")

    def start(options: SamplerOptions) -> Places:
        def places(x: Tensor, masked: Tensor, drawn: Draw, rest: float) -> Tensor:
            log_p = torch.zeros(x.shape, dtype=drawn.weight.dtype, device=x.device)
            log_p[masked] = (drawn.weight / drawn.total).log()
            if noise:
                u = uniform_like(x, options.generator, 1)[0].clamp(min=2.0**-54)
                log_p = log_p - noise * rest * (-u.log()).log()
            return -log_p

        return places

    return _by_order(start, order=0)


def _by_order(start: Callable[[SamplerOptions], Places], order: int) -> Sampler:
    """Return the sampler that lifts, by each time, as many masks as kappa says, those with the lowest places first."""

    def begin(options: SamplerOptions) -> Step:
        path, places = options.path, start(options)
        begun: tuple[Tensor, float] | None = None  # masks at the start, (B,), and 1 - kappa there

        def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
            nonlocal begun
            masked = ~path.known(x)
            count = by_row(masked).sum(1)
            if begun is None:
                begun = count, _remainder(options, t)
            rest = _remainder(options, t_next)
            wanted = (begun[0] * (rest / begun[1]) + 1e-6).long()  # masks that are left at t_next
            u = uniform_like(x, options.generator, 3 if options.strength else 1)
            x1, drawn = draw_data(field(x, t), x, u[0], options)
            if t_next == 1.0:
                return x1
            place = by_row(places(x, masked, drawn, rest).masked_fill(~masked, torch.inf))
            rank = place.argsort(dim=1, stable=True).argsort(dim=1)
            lifted = (rank < (count - wanted)[:, None]).reshape(x.shape) & masked
            return redraw(torch.where(lifted, x1, x), x1, t, t_next, u[1:], options)

        return step

    return Sampler(order=order, start=begin, masked=True)


def _remainder(options: SamplerOptions, t: float) -> float:
    return float(options.path.remainder(torch.tensor(t, dtype=torch.float64)))


@lru_cache(maxsize=16)
def halton_places(grid: tuple[int, ...]) -> Tensor:
    """Return the place of each cell of a grid in its Halton sequence: int64, shaped like the grid, 0 first.

    Raises:
        UserError: the grid has more than two dimensions.
    """
    if len(grid) > 2:
        raise UserError(f"a Halton sequence on a grid {grid}", "Pass tokens of one or two dimensions.")
    cells = torch.Size(grid).numel()
    count = 2 * cells
    while True:
        numbers = torch.arange(count, dtype=torch.float64)
        cell = torch.zeros(count, dtype=torch.int64)
        for size, base in zip(grid, (2, 3), strict=False):
            cell = cell * size + (_radical_inverse(numbers, base) * size).long()
        first = torch.full((cells,), count).scatter_reduce(0, cell, numbers.long(), "amin")
        if int(first.max()) < count:
            return first.argsort().argsort().reshape(grid)
        count *= 2


def _radical_inverse(numbers: Tensor, base: int) -> Tensor:
    """Return the digits of whole numbers in a base, mirrored at the point: in [0, 1)."""
    value, scale = torch.zeros_like(numbers), 1.0 / base
    while bool((numbers > 0).any()):
        value += scale * (numbers % base)
        numbers, scale = (numbers / base).floor(), scale / base
    return value
