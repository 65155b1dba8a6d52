"""Figures of two sets of features against closed forms, and against torchmetrics where it has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentflow.metrics import (
    diversity,
    kernel_distance,
    manifold,
    nearest_rows,
    neighbour_labels,
    retrieve_rows,
)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- kernel distance


def test_a_kernel_distance_by_hand() -> None:
    """One dimension: k(x, y) = (x y + 1)^3."""
    a, b = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    within_a = 2 * (1 + 1 + 27) / 6  # pairs 0 1, 0 2, 1 2, both ways
    within_b = 2 * (1 + 1 + 1) / 6
    between = (1 + 1 + 1 + 1 + 1 + 8 + 1 + 1 + 27) / 9
    assert kernel_distance(a, b).value == pytest.approx(within_a + within_b - 2 * between)


def test_it_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(40, 6), normal(40, 6, 1) + 0.3
    assert kernel_distance(a, b).value == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_a_shift_of_gaussians_has_its_closed_form() -> None:
    """With one dimension and N(0, 1) against N(s, 1): E(xy + 1)^3 = 1 + 3 m + 3 v + w, by the moments."""
    shift, n = 0.5, 4000

    def moments(mean: float) -> tuple[float, float, float]:
        return mean, mean**2 + 1, mean**3 + 3 * mean

    def expected(a: float, b: float) -> float:
        (a1, a2, a3), (b1, b2, b3) = moments(a), moments(b)
        return 1 + 3 * a1 * b1 + 3 * a2 * b2 + a3 * b3

    found = kernel_distance(normal(n, 1), normal(n, 1, 1) + shift)
    exact = expected(0, 0) + expected(shift, shift) - 2 * expected(0, shift)
    assert found.value == pytest.approx(exact, abs=3 * found.standard_error)
    assert found.standard_error < 0.2 * exact


def test_sets_of_one_distribution_are_zero_apart_and_the_error_is_that_of_repetitions() -> None:
    found = [kernel_distance(normal(60, 8, 2 * seed), normal(90, 8, 2 * seed + 1)) for seed in range(200)]
    values = torch.tensor([one.value for one in found])
    # 200 repetitions: the mean is 0 within 3 of its errors, the spread within a quarter of the mean jackknife error.
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    errors = torch.tensor([one.standard_error for one in found])
    shifted = [
        kernel_distance(normal(60, 8, 2 * seed), normal(90, 8, 2 * seed + 1) + 0.5) for seed in range(200)
    ]
    spread = torch.tensor([one.value for one in shifted]).std()
    errors = torch.tensor([one.standard_error for one in shifted])
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.25)
    with pytest.raises(ValueError, match="at least 3 rows"):
        kernel_distance(normal(2, 3), normal(9, 3))


# ---------------------------------------------------------------- precision, recall, density, coverage


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_identical_sets_are_as_near_as_can_be(offset: float) -> None:
    rows = normal(50, 4) + offset
    found = manifold(rows, rows.clone())
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    # Each image lies in its own ball and, on average, in those of five others.
    assert found.density == pytest.approx(6 / 5)


def test_sets_that_are_apart_have_nothing_in_common() -> None:
    assert manifold(normal(30, 4), normal(20, 4, 1) + 100) == (0, 0, 0, 0)


def test_one_mode_of_two_is_precise_and_half_recalled() -> None:
    modes = normal(40, 3), normal(40, 3, 1) + 100
    found = manifold(torch.cat(modes), normal(40, 3, 2))
    assert found.precision > 0.9 and 0.4 < found.recall <= 0.5 and 0.4 < found.coverage <= 0.5
    found = manifold(modes[0], torch.cat([normal(40, 3, 2), modes[1]]))
    assert 0.4 < found.precision <= 0.5 and found.recall > 0.9


def test_an_outlier_widens_recall_and_precision_but_neither_density_nor_coverage() -> None:
    """Figures 2 and 3 of Naeem et al.: one real image far away, whose ball holds everything between."""
    real, between = normal(100, 4), normal(50, 4, 1) + 20
    plain = manifold(real, between)
    outlier = manifold(torch.cat([real, torch.full((1, 4), 40.0, dtype=real.dtype)]), between)
    assert plain.precision == 0 and outlier.precision == 1
    assert outlier.density <= 1 / 5 and outlier.coverage < 0.02


def test_equal_images_lie_in_their_own_balls() -> None:
    rows = torch.zeros(8, 3) + 7
    assert manifold(rows, rows)[:2] == (1, 1)
    with pytest.raises(ValueError, match="more than 5 rows"):
        manifold(rows[:5], rows)


def test_coverage_and_density_of_one_distribution_have_their_expectation() -> None:
    """For equal numbers: density 1, and coverage 1 - P(none of n falls among the k nearest), eq. 6 of the paper."""
    n, k, found = 100, 5, []
    for seed in range(20):
        found.append(manifold(normal(n, 3, 2 * seed), normal(n, 3, 2 * seed + 1), k=k))
    missed = 1.0
    for step in range(k):  # the k nearest of n - 1 real and n generated images are all real
        missed *= (n - 1 - step) / (2 * n - 1 - step)
    assert sum(one.density for one in found) / 20 == pytest.approx(1, abs=0.05)
    assert sum(one.coverage for one in found) / 20 == pytest.approx(1 - missed, abs=0.01)


# ---------------------------------------------------------------- neighbours


def test_most_of_the_nearest_decide_and_the_nearer_a_tie() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    labels = ["a", "b", "b", "c", "c"]
    assert nearest_rows(torch.tensor([[0.4], [12.0]]), reference, 2).tolist() == [[0, 1], [4, 3]]
    assert neighbour_labels(torch.tensor([[0.4]]), reference, labels, k=3) == ["b"]
    assert neighbour_labels(torch.tensor([[0.4], [0.6]]), reference, labels, k=2) == ["a", "b"]
    assert neighbour_labels(torch.tensor([[9.0]]), reference, labels, k=9) == ["c"]  # 2, 2 and 1: the nearer


def test_retrieval_of_rows_counts_the_nearest_captions() -> None:
    reference = torch.tensor([[0.0], [1.0], [5.0]])
    found = retrieve_rows(torch.tensor([[0.1], [0.9]]), ["a", "a"], reference, ["a", "b", "c"], tops=(1, 2))
    assert found.hits == {1: 1, 2: 2}
    with pytest.raises(ValueError, match="2 images for 1 labels"):
        retrieve_rows(torch.zeros(2, 1), ["a"], reference, ["a", "b", "c"])


def test_diversity_is_the_mean_distance_within_a_label() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0], [50.0, 0.0], [7.0, 7.0], [7.0, 7.0]])
    found = diversity(rows, ["a", "a", "a", "b", "c", "c"])
    assert found == pytest.approx({"a": (5 + 8 + 5) / 3, "c": 0}, abs=1e-6)
    # Two points of N(0, 1) in d dimensions are 2 Gamma((d + 1) / 2) / Gamma(d / 2) apart; d = 2: sqrt(pi).
    assert diversity(normal(1000, 2), ["x"] * 1000)["x"] == pytest.approx(torch.pi**0.5, rel=0.03)
