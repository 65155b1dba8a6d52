from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from latentflow.errors import UserError
from latentflow.flow import (
    COUPLINGS,
    ConditionalOptimalTransport,
    DataDependent,
    OptimalTransport,
    Sinkhorn,
    assignment,
    sinkhorn_plan,
)
from latentflow.flow.couplings import _condition_weight, _draw_rows
from latentflow.flow.transport import squared_distances

PERMUTING = [name for name in COUPLINGS if name != "sinkhorn"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def which(rows: torch.Tensor, x0: torch.Tensor) -> list[int]:
    """The index in x0 of every row."""
    same = (rows.flatten(1)[:, None] == x0.flatten(1)).all(-1)
    assert same.any(1).all()
    return same.int().argmax(1).tolist()


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("shape", [(8,), (8, 2), (6, 3, 4, 4), (1, 2), (150, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_coupling_only_moves_source_rows(name, shape, dtype, draw) -> None:
    x0, x1 = draw(*shape).to(dtype), draw(*shape).to(dtype)
    paired = COUPLINGS[name]()(x0, x1, condition=None, generator=seeded(0))
    assert paired.shape == x0.shape
    assert paired.dtype == dtype
    if name in PERMUTING:
        assert sorted(paired.tolist()) == sorted(x0.tolist())
    else:
        which(paired.reshape(len(x0), -1), x0.reshape(len(x0), -1))


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_generator_alone_decides(name, draw) -> None:
    x0, x1, label = draw(64, 2), draw(64, 2), torch.arange(64) % 3
    torch.manual_seed(1)
    first = COUPLINGS[name]()(x0, x1, label, seeded(7))
    torch.manual_seed(2)
    assert torch.equal(first, COUPLINGS[name]()(x0, x1, label, seeded(7)))


@pytest.mark.parametrize("name", COUPLINGS)
def test_different_numbers_of_rows_are_refused(name, draw) -> None:
    with pytest.raises(ValueError, match="4 source rows for 8 data rows"):
        COUPLINGS[name]()(draw(4, 2), draw(8, 2))


@pytest.mark.parametrize("name", ["ot", "sinkhorn", "conditional-ot"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_have_no_distance_are_refused(name, bad, draw) -> None:
    x0, x1 = draw(4, 2), draw(4, 2)
    x1[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        COUPLINGS[name]()(x0, x1)
    with pytest.raises(ValueError, match=r"\(2,\) but data rows \(3,\)"):
        COUPLINGS[name]()(x0, draw(4, 3))


def test_independent_coupling_leaves_the_rows_as_drawn(draw) -> None:
    x0, x1 = draw(8, 2), draw(8, 2)
    assert torch.equal(COUPLINGS["independent"]()(x0, x1), x0)


def test_squared_distances_far_from_the_origin(draw) -> None:
    a, b = draw(6, 2, 3), draw(9, 2, 3)
    expected = (a[:, None] - b).square().sum((-1, -2))
    torch.testing.assert_close(squared_distances(a, b), expected)
    torch.testing.assert_close(squared_distances(a + 1e3, b + 1e3), expected, atol=1e-8, rtol=0)


def test_assignment_is_the_best_of_all_permutations(draw) -> None:
    for _ in range(5):
        cost = draw(6, 6)
        best = min(sum(cost[row, column] for column, row in enumerate(p)) for p in permutations(range(6)))
        torch.testing.assert_close(cost[assignment(cost), torch.arange(6)].sum(), best)


@pytest.mark.parametrize("rows", [127, 128, 300])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_potentials_leave_the_optimal_assignment_as_it_is(rows, scale, draw) -> None:
    cost = scale * squared_distances(draw(rows, 2), 5 * draw(rows, 2).sign() + draw(rows, 2))
    reference = linear_sum_assignment(cost.numpy().T)[1]
    assert assignment(cost).tolist() == reference.tolist()


@pytest.mark.parametrize("cost", [torch.zeros(200, 200), torch.arange(200.0)[:, None].expand(200, 200)])
def test_assignment_where_every_permutation_is_optimal(cost) -> None:
    assert sorted(assignment(cost).tolist()) == list(range(200))


def test_optimal_transport_of_a_translation_is_the_identity(draw) -> None:
    for rows, width in ((16, 2), (300, 2), (200, 16)):
        x0 = draw(rows, width).float()
        assert torch.equal(OptimalTransport()(x0, x0 + 7.0), x0)
        shuffle = torch.randperm(rows, generator=seeded(rows))
        assert torch.equal(OptimalTransport()(x0, (x0 + 7.0)[shuffle]), x0[shuffle])


def test_autocast_does_not_touch_the_optimum(draw) -> None:
    x0, x1 = draw(200, 16).float(), draw(200, 16).float()
    for coupling in (OptimalTransport(), Sinkhorn(0.01)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = coupling(x0, x1, generator=seeded(0))
        assert torch.equal(inside, coupling(x0, x1, generator=seeded(0)))


@pytest.mark.parametrize("relative", [10.0, 0.1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (40, 70)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinkhorn_marginals(relative, rows, columns, dtype, draw) -> None:
    cost = squared_distances(draw(rows, 2), 5 * draw(columns, 2).sign() + draw(columns, 2)).to(dtype)
    plan = sinkhorn_plan(cost, relative * float(cost.mean()))
    assert bool((plan >= 0).all())
    torch.testing.assert_close(plan.sum(1) * rows, torch.ones(rows, dtype=dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(0) * columns, torch.ones(columns, dtype=dtype), atol=1e-6, rtol=0)


def test_sinkhorn_plan_is_a_scaled_gibbs_kernel(draw) -> None:
    cost, regularization = squared_distances(draw(30, 2), draw(40, 2)), 2.0
    potentials = (
        sinkhorn_plan(cost, regularization, tolerance=1e-12).log() + cost / regularization
    )  # f_i + g_j
    mixed = potentials - potentials.mean(0) - potentials.mean(1, keepdim=True) + potentials.mean()
    assert mixed.abs().max() < 1e-9


def test_sinkhorn_plan_lies_between_optimum_and_independence(draw) -> None:
    cost = squared_distances(draw(50, 2), draw(50, 2))
    best = float(cost[assignment(cost), torch.arange(50)].mean())
    for regularization in (1.0, 0.1, 0.01):
        excess = float((sinkhorn_plan(cost, regularization) * cost).sum()) - best
        # <P, C> - optimum <= regularization * (largest possible gain of entropy)
        assert 0 <= excess <= regularization * torch.log(torch.tensor(50.0))
    flat = sinkhorn_plan(cost, 1e6)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 2500), atol=1e-8, rtol=0)


def test_sinkhorn_draws_follow_the_columns_of_the_plan(draw) -> None:
    x0, x1, generator, rounds = draw(4, 2), draw(4, 2), seeded(0), 4000
    plan, counts = sinkhorn_plan(squared_distances(x0, x1), 1.5), torch.zeros(4, 4)
    for _ in range(rounds):
        counts[_draw_rows(plan, generator), torch.arange(4)] += 1
    error = (4 * plan * (1 - 4 * plan) / rounds).sqrt()
    assert bool(((counts / rounds - 4 * plan).abs() <= 4.5 * error).all())
    assert torch.equal(
        Sinkhorn(1.5, relative=False)(x0, x1, None, seeded(1)), x0[_draw_rows(plan, seeded(1))]
    )


def test_relative_regularization_does_not_depend_on_units(draw) -> None:
    x0, x1 = draw(64, 2), draw(64, 2)
    assert torch.equal(
        Sinkhorn(0.1)(100 * x0, 100 * x1, generator=seeded(0)),
        100 * Sinkhorn(0.1)(x0, x1, generator=seeded(0)),
    )
    assert torch.equal(Sinkhorn(0.1)(torch.ones(4, 2), torch.ones(4, 2)), torch.ones(4, 2))


@pytest.mark.parametrize("regularization", [0.0, -1.0, float("nan")])
def test_regularization_must_be_positive(regularization) -> None:
    with pytest.raises(ValueError, match="regularization must be positive"):
        Sinkhorn(regularization)
    with pytest.raises(ValueError, match="regularization must be positive"):
        sinkhorn_plan(torch.ones(2, 2), regularization)


def test_bad_costs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"square cost, not \(2, 3\)"):
        assignment(torch.ones(2, 3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        assignment(torch.full((2, 2), float("nan")))


# -- conditions ------------------------------------------------------------------------------------------------------


def labelled(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0 ~ N(0, 1), and x1 whose first coordinate tells its label."""
    label = torch.arange(300) % 3
    x1 = draw(300, 2) * 0.2
    x1[:, 0] += 3.0 * (label - 1)
    return draw(300, 2), x1, label


def test_transport_skews_the_source_given_the_label_and_conditional_transport_does_not(draw) -> None:
    x0, x1, label = labelled(draw)
    skewed = OptimalTransport()(x0, x1, label)[label == 2, 0].mean()
    assert skewed > 0.8  # E[z | z above its 2/3 quantile] = 1.09, where the prior has 0 +- 0.1
    paired = ConditionalOptimalTransport()(x0, x1, label)
    for k in range(3):
        assert sorted(paired[label == k].tolist()) == sorted(x0[label == k].tolist())
        assert torch.equal(paired[label == k], OptimalTransport()(x0[label == k], x1[label == k]))


def test_labels_may_be_booleans_or_several_numbers(draw) -> None:
    x0, x1, label = labelled(draw)
    several = torch.stack([label == 0, label == 1], 1)
    expected = ConditionalOptimalTransport()(x0, x1, label)
    assert torch.equal(ConditionalOptimalTransport()(x0, x1, several), expected)
    assert torch.equal(ConditionalOptimalTransport()(x0, x1, torch.arange(300)), x0)
    everyone = OptimalTransport()(x0, x1)
    assert torch.equal(ConditionalOptimalTransport()(x0, x1, torch.zeros(300, dtype=torch.long)), everyone)
    assert torch.equal(ConditionalOptimalTransport()(x0, x1), everyone)


def test_condition_weight_lets_the_asked_share_of_pairs_through(draw) -> None:
    cost, apart = squared_distances(draw(100, 2), draw(100, 2)), squared_distances(*[draw(100, 3)] * 2)
    others = ~torch.eye(100, dtype=torch.bool)
    for ratio in (0.005, 0.02, 0.1):
        w = _condition_weight(cost, apart, ratio)
        within = (cost + w * apart * (1 - 1e-12) <= cost.diagonal()[:, None])[others]
        assert within.sum() == round(ratio * 9900)
    assert _condition_weight(cost, apart, 1.0) == 0.0


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_continuous_conditions_hold_the_source_back(distance, draw) -> None:
    x0, x1, _ = labelled(draw)
    angle = x1[:, 0] / 3
    condition = torch.stack([angle.cos(), angle.sin()], 1)

    def skew(ratio: float) -> float:
        paired = ConditionalOptimalTransport(ratio, distance)(x0, x1, condition)
        assert sorted(paired.tolist()) == sorted(x0.tolist())
        return float((paired[:, 0] * x1[:, 0]).mean())

    plain = float((OptimalTransport()(x0, x1)[:, 0] * x1[:, 0]).mean())
    assert skew(0.005) < 0.5 * plain
    assert skew(0.005) < skew(0.2) < plain
    assert skew(1.0) == plain


def test_equal_continuous_conditions_are_plain_transport_and_groups_are_kept(draw) -> None:
    x0, x1, label = labelled(draw)
    same = ConditionalOptimalTransport()(x0, x1, torch.ones(300, 4))
    assert torch.equal(same, OptimalTransport()(x0, x1))
    one_hot = torch.nn.functional.one_hot(label).float()
    paired = ConditionalOptimalTransport(0.001)(x0, x1, one_hot)
    stayed = sum(int(label[row] == label[column]) for column, row in enumerate(which(paired, x0)))
    assert stayed >= 290
    one = ConditionalOptimalTransport()(x0[:1], x1[:1], one_hot[:1])
    assert torch.equal(one, x0[:1])


def test_single_numbers_as_conditions_are_compared_by_distance(draw) -> None:
    x0, x1, number = draw(64, 2), draw(64, 2), draw(64)
    expected = ConditionalOptimalTransport(distance="euclidean")(x0, x1, number)
    assert torch.equal(ConditionalOptimalTransport()(x0, x1, number), expected)


@pytest.mark.parametrize("name", COUPLINGS)
def test_rows_that_carry_a_graph_are_paired(name, draw) -> None:
    x0, x1 = draw(8, 2).requires_grad_(), draw(8, 2).requires_grad_()
    paired = COUPLINGS[name]()(x0, x1, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(paired.sum(), x0)
    assert gradient.sum() == 16  # each paired row passes its gradient on


def test_bad_conditions_are_refused(draw) -> None:
    x0, x1 = draw(8, 2), draw(8, 2)
    with pytest.raises(ValueError, match="euclidean"):
        ConditionalOptimalTransport(distance="cosine")(x0, x1, draw(8))
    with pytest.raises(ValueError, match=r"\(7, 2\) for 8 rows"):
        ConditionalOptimalTransport()(x0, x1, draw(7, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        ConditionalOptimalTransport()(x0, x1, torch.full((8, 2), float("nan")))
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        ConditionalOptimalTransport(distance="cosin")
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            ConditionalOptimalTransport(ratio)


def test_data_dependent_source_is_the_callers(draw) -> None:
    x0, x1, label = draw(8, 2), draw(8, 2), torch.arange(8)
    assert DataDependent()(x0, x1) is x0

    def degrade(x0, x1, condition, generator):
        return x1 * (condition[:, None] % 2) + x0 + torch.randn(x1.shape, generator=generator)

    paired = DataDependent(degrade)(x0, x1, label, seeded(3))
    torch.testing.assert_close(paired, degrade(x0, x1, label, seeded(3)))
    with pytest.raises(ValueError, match=r"source returned shape \(4, 2\)"):
        DataDependent(lambda x0, x1, condition, generator: x0[:4])(x0, x1)
