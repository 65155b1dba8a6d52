"""Couplings: how source rows are paired with data rows before a path joins them.

A new coupling is one subclass of ``Coupling``, and one line in ``COUPLINGS``. The data and its condition
stay put; only the source rows move. The source may have any distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import UserError, lookup
from .tensors import compute_dtype
from .transport import assignment, sinkhorn_plan, squared_distances

Generator: TypeAlias = torch.Generator | None
#: (x0, x1, condition, generator) -> the source rows that belong to x1.
PairedSource: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Generator], Tensor]


class Coupling(ABC):
    """Return the source rows in the order in which they pair with ``x1``, row by row."""

    def __call__(
        self, x0: Tensor, x1: Tensor, condition: Tensor | None = None, generator: Generator = None
    ) -> Tensor:
        """Return the paired source, (B, ...).

        Args:
            x0, x1: (B, ...).
            condition: (B, ...), the condition of each row of x1.
            generator: decides all that is random.

        Raises:
            ValueError: x0 and x1 have different numbers of rows, or values that are not finite.
        """
        if len(x0) != len(x1):
            raise ValueError(f"{len(x0)} source rows for {len(x1)} data rows: draw one for each")
        return self._pair(x0, x1, condition, generator)

    @abstractmethod
    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        """Return the paired source, given as many source as data rows."""


@dataclass(frozen=True)
class Independent(Coupling):
    """The independent coupling, pi(x0, x1) = p(x0) p(x1): the rows stay as they were drawn."""

    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        return x0


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The permutation of the source rows with the least total squared distance to the data rows.

    Minibatch optimal transport: Pooladian et al. 2023 (arXiv:2304.14772), Tong et al. 2023 (arXiv:2302.00482).
    Exact, and every source row is used once. It disregards the condition, and so skews conditional models: there
    use ``ConditionalOptimalTransport``.
    """

    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        return x0[assignment(squared_distances(x0, x1))]


@dataclass(frozen=True)
class Sinkhorn(Coupling):
    """Every data row draws its source row from the entropic plan under the squared distance.

    Between optimal transport (regularization -> 0) and the independent coupling (-> infinity). One draw per data
    row, from its column of the plan, so source rows may repeat (about a third are unused in a batch).

    Args:
        regularization: the weight of the entropy, > 0.
        relative: in units of the batch's mean squared distance; otherwise of the squared distance itself, as the
            Schrodinger bridge needs it (2 sigma^2).

    Raises:
        UserError: the regularization is not positive.
    """

    regularization: float = 0.05
    relative: bool = True

    def __post_init__(self) -> None:
        if not self.regularization > 0:
            raise UserError(
                f"regularization must be positive, not {self.regularization}",
                "For none use the coupling 'ot'.",
            )

    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        cost = squared_distances(x0, x1).to(compute_dtype(x0, x1))
        scale = float(cost.mean()) if self.relative else 1.0
        if scale == 0:  # all rows are equal
            return x0
        plan = sinkhorn_plan(cost, self.regularization * scale)
        return x0[_draw_rows(plan, generator)]


@dataclass(frozen=True)
class ConditionalOptimalTransport(Coupling):
    """C2OT: optimal transport that keeps source and condition (nearly) independent.

    Cheng & Schwing 2025 (arXiv:2503.10636). Source row i counts as having the condition of data row i as drawn.

    - Discrete conditions (integer or boolean, (B, ...)): rows move only among rows of equal condition, by exact
      transport. The source given the condition keeps its distribution exactly.
    - Continuous conditions (floating, (B, ...)): the cost is |x0_i - x1_j|^2 + w d(c_i, c_j). w is the largest
      weight at which ``ratio`` of all pairs (i, j), j other than i, cost no more than (i, i).
    - No condition: plain optimal transport.

    Args:
        ratio: in (0, 1]; smaller ties rows more firmly to their own condition.
        distance: d of continuous conditions: "cosine" (1 - cosine, of embeddings) or "euclidean" (of coordinates).
            None: euclidean for one number a row, else cosine.

    Raises:
        UserError: the distance is unknown, or the ratio is out of range.
        ValueError: the condition has another number of rows or NaN, or it is one number
            a row and the cosine is asked for.
    """

    ratio: float = 0.01
    distance: str | None = None

    def __post_init__(self) -> None:
        if self.distance is not None:
            lookup(_CONDITION_DISTANCES, self.distance, "distance")
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio must lie in (0, 1], not {self.ratio}", "Usual values: 0.005 to 0.1.")

    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        if condition is None:
            return x0[assignment(squared_distances(x0, x1))]
        if condition.shape[:1] != x1.shape[:1]:
            raise ValueError(
                f"condition of shape {tuple(condition.shape)} for {x1.shape[0]} rows: one per row"
            )
        condition = condition.to(x0.device).reshape(len(condition), -1)
        if not condition.is_floating_point():
            return x0[_assignment_within(x0, x1, condition)]
        if not bool(condition.isfinite().all()):
            raise ValueError(
                "the condition holds NaN or infinite values: no distance between such conditions exists"
            )
        cost = squared_distances(x0, x1)
        distance = self.distance or ("euclidean" if condition.shape[1] == 1 else "cosine")
        apart = _CONDITION_DISTANCES[distance](condition.to(cost.dtype))
        return x0[assignment(cost + _condition_weight(cost, apart, self.ratio) * apart)]


@dataclass(frozen=True)
class DataDependent(Coupling):
    """A source drawn for each data row: x0 ~ p(x0 | x1), as in restoration, inpainting and data-to-data transport.

    Albergo et al. 2023 (arXiv:2310.03725).

    Args:
        source: (x0, x1, condition, generator) -> the source rows for x1, shaped like x1; for example a degraded x1 plus
            x0 as noise. None: the rows are paired as they are supplied, as with the pairs of a reflow.
    """

    source: PairedSource | None = None

    def _pair(self, x0: Tensor, x1: Tensor, condition: Tensor | None, generator: Generator) -> Tensor:
        if self.source is None:
            return x0
        paired = self.source(x0, x1, condition, generator)
        if paired.shape != x1.shape:
            raise ValueError(
                f"source returned shape {tuple(paired.shape)} for data of shape {tuple(x1.shape)}: "
                "return one source row per data row, of the same shape"
            )
        return paired


def _draw_rows(plan: Tensor, generator: Generator) -> Tensor:
    """Draw a row for every column of the (B, B) plan, with the column's probabilities."""
    device = plan.device if generator is None else generator.device
    uniform = torch.rand(len(plan), generator=generator, device=device).to(plan)
    cumulative = plan.T.cumsum(1).contiguous()
    # right=True: never a row of probability 0.
    rows = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    return rows[:, 0].clamp_(max=len(plan) - 1)


def _assignment_within(x0: Tensor, x1: Tensor, condition: Tensor) -> Tensor:
    """Exact assignment (B,) among the rows of equal condition, (B, K)."""
    label = condition.unique(dim=0, return_inverse=True)[1]
    order = label.argsort(stable=True)
    rows = torch.arange(len(label), device=label.device)
    for group in order.split(label.bincount().tolist()):
        if len(group) > 1:
            rows[group] = group[assignment(squared_distances(x0[group], x1[group]))]
    return rows


def _cosine_distances(condition: Tensor) -> Tensor:
    """1 - cosine between all rows of (B, K), (B, B)."""
    if condition.shape[1] == 1:
        raise ValueError(
            "the cosine between single numbers is 1 or -1, no measure of how far conditions lie apart: "
            'use distance="euclidean", or integers for labels'
        )
    unit = torch.nn.functional.normalize(condition, dim=1)
    apart = squared_distances(unit, unit) / 2  # |u - v|^2 = 2 - 2 cosine
    equal = apart < 64 * torch.finfo(apart.dtype).eps  # but for rounding
    return apart.masked_fill_(equal, 0)


def _euclidean_distances(condition: Tensor) -> Tensor:
    """The distances between all rows of (B, K), (B, B)."""
    return torch.cdist(condition, condition, compute_mode="donot_use_mm_for_euclid_dist")


def _condition_weight(cost: Tensor, apart: Tensor, ratio: float) -> float:
    """The largest w >= 0 at which cost_ij + w apart_ij <= cost_ii for ``ratio`` of the pairs with j other than i.

    The paper searches for it by halving; but a pair meets the inequality up to w = (cost_ii - cost_ij) / apart_ij, so
    w is an order statistic of these.
    """
    limit = (cost.diagonal()[:, None] - cost) / apart
    # NaN is 0 / 0: every w meets the inequality.
    limit = limit.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    limit = limit[~torch.eye(len(cost), dtype=torch.bool, device=cost.device)]
    finite = limit[limit.isfinite()]
    if not len(finite):  # all conditions are equal, or there is but one row: the weight changes nothing
        return 0.0
    rank = max(round(ratio * len(limit)), 1)
    # If so many conditions are equal that any weight would do, take the least that holds all other pairs back.
    weight = limit.sort(descending=True).values[rank - 1].clamp(max=finite.max())
    return max(float(weight), 0.0)


_CONDITION_DISTANCES = {"cosine": _cosine_distances, "euclidean": _euclidean_distances}

COUPLINGS: dict[str, type[Coupling]] = {
    "independent": Independent,
    "ot": OptimalTransport,
    "sinkhorn": Sinkhorn,
    "conditional-ot": ConditionalOptimalTransport,
    "data-dependent": DataDependent,
}
