"""Two sets of images compared by their features: kernel distance, precision, recall, density, coverage, diversity.

All take features (N, D) of `features`, in any space. `frechet_distance` is in :mod:`.features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # rows of a matrix of pairs that are computed at once


class KernelDistance(NamedTuple):
    """A squared maximum mean discrepancy, and its standard error."""

    value: float
    standard_error: float


def kernel_distance(a: Tensor, b: Tensor) -> KernelDistance:
    """Return the unbiased squared MMD of (N, D) and (M, D) with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018 (arXiv:1801.01401), eq. 4; for Inception's features it is KID. Unlike a Frechet distance it
    does not depend on the numbers of images: its mean is 0 for sets from one distribution. The standard error is that
    of the delete-one jackknife over both sets (Arvesen 1969), instead of subsets that are drawn at random.

    Raises:
        ValueError: a set has fewer than three rows.
    """
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise ValueError(f"a kernel distance with its error needs at least 3 rows, got {n} and {m}")
    a, b = a.double(), b.double()
    # Sums of each row of the kernel matrices; those of one set without the diagonal.
    within_a = _kernel_sums(a, a) - _kernel(a, a)
    within_b = _kernel_sums(b, b) - _kernel(b, b)
    a_to_b, b_to_a = _kernel_sums(a, b), _kernel_sums(b, a)
    sum_a, sum_b, sum_both = within_a.sum(), within_b.sum(), a_to_b.sum()

    def value(aa: Tensor, n: int, bb: Tensor, m: int, ab: Tensor) -> Tensor:
        return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)

    without_a = value(sum_a - 2 * within_a, n - 1, sum_b, m, sum_both - a_to_b)  # (n,): each row left out
    without_b = value(sum_a, n, sum_b - 2 * within_b, m - 1, sum_both - b_to_a)
    variance = (n - 1) * without_a.var(correction=0) + (m - 1) * without_b.var(correction=0)
    return KernelDistance(float(value(sum_a, n, sum_b, m, sum_both)), float(variance.sqrt()))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel of each row of (N, D) with its own of (N, D), (N,)."""
    return ((x * y).mean(1) + 1) ** 3


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the kernel of each row of (N, D) with all of (M, D), (N,)."""
    return torch.cat([((rows @ y.T / x.shape[1] + 1) ** 3).sum(1) for rows in x.split(_ROWS)])


class Manifold(NamedTuple):
    """Shares of two sets that lie near each other.

    Attributes:
        precision: share of generated images within the balls around real ones: images that look real.
        recall: share of real images within the balls around generated ones: kinds of images that are generated.
        density: mean number of balls around real images that a generated one lies in, divided by k; may exceed 1.
        coverage: share of real images whose ball holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, generated: Tensor, *, k: int = 5) -> Manifold:
    """Compare the balls around each image of (N, D) and (M, D) that reach to its k-th nearest neighbour in its own set.

    Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 2; density and coverage, which single
    outliers hardly change: Naeem et al. 2020 (arXiv:2002.09797), eq. 3 and 4, whose k = 5 serves all four.

    Raises:
        ValueError: a set has no more than k rows.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(
            f"balls to neighbour {k} need more than {k} rows, got {len(real)} and {len(generated)}"
        )
    # Centred, since distances by matrix products lose digits far from the origin.
    centre = real.double().mean(0)
    real, generated = real.double() - centre, generated.double() - centre
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    balls, recalled, covered = [], [], []
    for rows, radius in zip(real.split(_ROWS), real_radius.split(_ROWS), strict=True):
        apart = torch.cdist(rows, generated)
        within = apart <= radius[:, None]
        balls.append(within.sum(0))
        covered.append(within.any(1))
        recalled.append((apart <= generated_radius).any(1))
    count = torch.stack(balls).sum(0).double()
    return Manifold(
        precision=float((count > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(count.mean() / k),
        coverage=float(torch.cat(covered).double().mean()),
    )


def _radii(rows: Tensor, k: int) -> Tensor:
    """Return the distance of each row of (N, D) to its k-th nearest other, (N,)."""
    # Each row is its own nearest. Rounded up, so that equal rows lie within balls of radius 0.
    found = [torch.cdist(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(_ROWS)]
    return torch.cat(found) + 1e-6 * float(rows.std())


def nearest_rows(rows: Tensor, reference: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the k nearest rows of (M, D) for each of (N, D), nearest first."""
    found = [
        torch.cdist(part, reference.double()).topk(min(k, len(reference)), largest=False).indices
        for part in rows.double().split(_ROWS)
    ]
    return torch.cat(found)


def neighbour_labels(rows: Tensor, reference: Tensor, labels: Sequence[str], *, k: int = 5) -> list[str]:
    """Return the label that most of the k nearest rows of the reference have, for each row.

    The nearer neighbours decide a tie.

    Args:
        rows: (N, D). reference: (M, D).
        labels: M.
    """
    names = sorted(set(labels))
    numbers = torch.tensor([names.index(label) for label in labels])
    votes = F.one_hot(numbers[nearest_rows(rows, reference, k)], len(names)).double()  # (N, k, labels)
    # Less than one vote in sum: it only decides between equal numbers of votes.
    nearer = 0.5 ** torch.arange(1, votes.shape[1] + 1, dtype=torch.float64)
    chosen = (votes * (1 + nearer[:, None])).sum(1).argmax(1)
    return [names[int(number)] for number in chosen]


def diversity(rows: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Return the mean distance between two images of (N, D) with one label, for each label with two or more."""
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return {label: _mean_distance(rows[group]) for label, group in groups.items() if len(group) > 1}


def _mean_distance(rows: Tensor) -> float:
    """Return the mean distance between two different rows of (N, D)."""
    rows = rows.double()
    rows = rows - rows.mean(0)
    total = sum(float(torch.cdist(part, rows).sum()) for part in rows.split(_ROWS))
    return total / (len(rows) * (len(rows) - 1))
