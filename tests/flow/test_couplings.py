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
from latentflow.flow.couplings import _condition_weight, _cosine_distances, _draw_rows
from latentflow.flow.transport import squared_distances

from .closed_forms import seeded


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
    if name == "sinkhorn":
        which(paired.reshape(len(x0), -1), x0.reshape(len(x0), -1))
    else:
        assert sorted(paired.tolist()) == sorted(x0.tolist())


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_generator_alone_decides(name, draw) -> None:
    x0, x1, label, coupling = draw(64, 2), draw(64, 2), torch.arange(64) % 3, COUPLINGS[name]()
    torch.manual_seed(1)
    first = coupling(x0, x1, label, seeded(7))
    torch.manual_seed(2)
    assert torch.equal(first, coupling(x0, x1, label, seeded(7)))
    assert (first is x0) == (name in ("independent", "data-dependent"))  # rows that are paired already
    x0.requires_grad_(), x1.requires_grad_()  # rows that carry a graph pass their gradients on
    (gradient,) = torch.autograd.grad(coupling(x0, x1, generator=seeded()).sum(), x0)
    assert gradient.sum() == 128


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
    # Where every permutation is optimal it is one.
    for equal in (torch.zeros(rows, rows), torch.arange(float(rows))[:, None].expand(rows, rows)):
        assert sorted(assignment(equal).tolist()) == list(range(rows))


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
    plan = sinkhorn_plan(cost, regularization, tolerance=1e-12)
    potentials = plan.log() + cost / regularization  # f_i + g_j
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
    paired = Sinkhorn(1.5, relative=False)(x0, x1, None, seeded(1))
    assert torch.equal(paired, x0[_draw_rows(plan, seeded(1))])


def test_relative_regularization_does_not_depend_on_units(draw) -> None:
    x0, x1 = draw(64, 2), draw(64, 2)
    apart, near = (Sinkhorn(0.1)(k * x0, k * x1, generator=seeded(0)) for k in (100, 1))
    assert torch.equal(apart, 100 * near)
    assert torch.equal(Sinkhorn(0.1)(torch.ones(4, 2), torch.ones(4, 2)), torch.ones(4, 2))


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


def test_conditions_that_amount_to_the_same_pair_alike(draw) -> None:
    x0, x1, label = labelled(draw)
    pair = ConditionalOptimalTransport()
    everyone = OptimalTransport()(x0, x1)
    one_number = draw(300)
    for condition, expected in (
        (torch.stack([label == 0, label == 1], 1), pair(x0, x1, label)),  # labels may be several booleans
        (torch.arange(300), x0),
        (torch.zeros(300, dtype=torch.long), everyone),
        (torch.ones(300, 4), everyone),  # equal continuous conditions
        (None, everyone),
        (one_number, ConditionalOptimalTransport(distance="euclidean")(x0, x1, one_number)),
    ):
        assert torch.equal(pair(x0, x1, condition), expected)
    one_hot = torch.nn.functional.one_hot(label).float()
    # Equal conditions stay equal although their cosine is not exactly 1, after rounding.
    embeddings = draw(3, 64)[label] * (1 + torch.rand(300, 1, generator=seeded()))
    apart = _cosine_distances(embeddings)
    assert bool((apart[label[:, None] == label] == 0).all()) and apart.max() > 0.1
    paired = ConditionalOptimalTransport(0.001)(x0, x1, one_hot)
    assert sum(int(label[row] == label[column]) for column, row in enumerate(which(paired, x0))) >= 290
    assert torch.equal(pair(x0[:1], x1[:1], one_hot[:1]), x0[:1])


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


X = torch.arange(16.0).reshape(8, 2)
NAN, TRANSPORTING = float("nan"), ("ot", "sinkhorn", "conditional-ot")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda make=make: make()(X, X[:4]), "8 source rows for 4 data rows")
            for make in COUPLINGS.values()
        ),
        *((lambda name=name: COUPLINGS[name]()(X, X / 0), "NaN or infinite") for name in TRANSPORTING),
        *(
            (lambda name=name: COUPLINGS[name]()(X, torch.ones(8, 3)), r"\(2,\) but data rows \(3,\)")
            for name in TRANSPORTING
        ),
        *((lambda bad=bad: Sinkhorn(bad), "regularization must be positive") for bad in (0.0, NAN)),
        *((lambda bad=bad: sinkhorn_plan(X, bad), "regularization must be positive") for bad in (0.0, NAN)),
        (lambda: assignment(torch.ones(2, 3)), r"square cost, not \(2, 3\)"),
        (lambda: assignment(torch.full((2, 2), NAN)), "NaN or infinite"),
        (lambda: ConditionalOptimalTransport(distance="cosine")(X, X, torch.rand(8)), "euclidean"),
        (lambda: ConditionalOptimalTransport()(X, X, torch.rand(7, 2)), r"\(7, 2\) for 8 rows"),
        (lambda: ConditionalOptimalTransport()(X, X, torch.full((8, 2), NAN)), "NaN or infinite"),
        (lambda: ConditionalOptimalTransport(distance="cosin"), "did you mean 'cosine'"),
        *((lambda bad=bad: ConditionalOptimalTransport(bad), "ratio") for bad in (0.0, 1.5, NAN)),
        (lambda: DataDependent(lambda x0, *others: x0[:4])(X, X), r"source returned shape \(4, 2\)"),
    ],
)
def test_mistakes_are_named(call, message) -> None:
    with pytest.raises(UserError if "did you mean" in message else ValueError, match=message):
        call()


def test_data_dependent_source_is_the_callers(draw) -> None:
    x0, x1, label = draw(8, 2), draw(8, 2), torch.arange(8)

    def degrade(x0, x1, condition, generator):
        return x1 * (condition[:, None] % 2) + x0 + torch.randn(x1.shape, generator=generator)

    paired = DataDependent(degrade)(x0, x1, label, seeded(3))
    torch.testing.assert_close(paired, degrade(x0, x1, label, seeded(3)))
