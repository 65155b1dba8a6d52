"""Losses of token models against sums over all jumps, and their integral against the entropy of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import bits_per_dim, make
from latentflow.flow.discrete import (
    KAPPAS,
    OBJECTIVES,
    WEIGHTINGS,
    DiscretePath,
    DiscreteSample,
    MixturePath,
    cross_entropy,
    generalised_kl,
    generalised_kl_parts,
    likelihood_bound,
)

from ..closed_forms import seeded
from .exact import EVERY_PATH, KINDS, VOCABULARY, Exact, all_states, table

MIXTURES = {name: path for name, path in EVERY_PATH.items() if isinstance(path, MixturePath)}


def pairs(path: DiscretePath, t: float) -> DiscreteSample:
    """All x_t and x1 that the path joins, as rows of one token."""
    x, x1 = torch.meshgrid(torch.arange(path.states), torch.arange(VOCABULARY), indexing="ij")
    x, x1 = x.reshape(-1, 1), x1.reshape(-1, 1)
    possible = path.probabilities(x1, t).gather(-1, x[..., None]).flatten() > 0
    return DiscreteSample(x[possible], x1[possible], torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("path", MIXTURES.values(), ids=list(MIXTURES))
def test_generalised_kl_is_the_sum_over_jumps(path: MixturePath) -> None:
    """sum over y != x of u log(u / v) - u + v, for the rates u given x1 and the predicted ones v."""
    sample = pairs(path, 0.35)
    x, x1, t = sample
    logits = torch.randn(len(x), 1, VOCABULARY, generator=seeded(), dtype=torch.float64)
    p = logits.softmax(-1)
    known = path.known(x)
    p = torch.where(known[..., None], torch.nn.functional.one_hot(x.clamp(max=VOCABULARY - 1), VOCABULARY), p)
    u = path.forward_rates(x, x1, t)[:, 0]
    every = torch.arange(VOCABULARY).expand(len(x), -1)
    v = (p[:, 0, :, None] * path.forward_rates(x.expand(-1, VOCABULARY), every, t)).sum(1)
    terms = torch.where(u > 0, u * (u / v).log(), 0.0) - u + v
    torch.testing.assert_close(generalised_kl(logits, sample, path=path), terms.sum(1), atol=1e-12, rtol=0)
    keep, move = generalised_kl_parts(logits, sample, path)
    assert (keep >= 0).all() and (move >= 0).all()
    assert (keep[x != x1] == 0).all() and (move[x == x1] == 0).all()
    if path.states > VOCABULARY:
        assert (keep == 0).all()
    else:
        assert (keep[x == x1] > 0).all()


@pytest.mark.parametrize("path", MIXTURES.values(), ids=list(MIXTURES))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_0_where_the_posterior_is_sure_of_the_data_and_positive_elsewhere(path, name: str) -> None:
    sample = pairs(path, 0.6)
    sure = 60.0 * torch.nn.functional.one_hot(sample.x1, VOCABULARY).double()
    perfect = OBJECTIVES[name](sure, sample, path=path)
    torch.testing.assert_close(perfect, torch.zeros_like(perfect), atol=1e-12, rtol=0)
    free = ~path.known(sample.xt)[:, 0]
    assert (OBJECTIVES[name](torch.zeros_like(sure), sample, path=path)[free] > 0.1).all()


@pytest.mark.parametrize("kind", ["mask", "uniform"])
def test_the_exact_posterior_is_the_minimum(kind: str) -> None:
    """The mean loss over data and noise has gradient 0 at the exact posterior."""
    path, q = KINDS[kind], table(1)
    exact, sample = Exact(path, q), pairs(KINDS[kind], 0.4)
    x, x1, t = sample
    weight = q[x1[:, 0]] * path.probabilities(x1, t).gather(-1, x[..., None]).flatten()
    states = all_states(path, 1)
    for objective in OBJECTIVES.values():
        logits = exact(states, t).clamp(min=-80.0).requires_grad_()
        loss = (weight * objective(logits[x[:, 0]], sample, path=path)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def integral(path: MixturePath, q: Tensor, nodes: int = 60) -> float:
    """The mean generalised KL over t, x1 and x_t at the exact posterior: Gauss-Legendre in t, sums over the rest."""
    exact, total = Exact(path, q), 0.0
    points, weights = np.polynomial.legendre.leggauss(nodes)
    for t, w in zip((points + 1) / 2, weights / 2, strict=True):
        x, x1, time = pairs(path, float(t))
        p = q[x1[:, 0]] * path.probabilities(x1, time).gather(-1, x[..., None]).flatten()
        loss = generalised_kl(exact(x, time), DiscreteSample(x, x1, time), path=path)
        total += w * float((p * loss).sum())
    return total


@pytest.mark.parametrize("path", MIXTURES.values(), ids=list(MIXTURES))
def test_the_integral_of_generalised_kl_is_the_entropy_or_bounds_it(path: MixturePath) -> None:
    q = table(1)
    entropy = float(-(q * q.log()).sum())
    if path.states > VOCABULARY:
        assert integral(path, q) == pytest.approx(entropy, abs=1e-4)
    else:
        assert entropy < integral(path, q) < entropy + 1.0


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_likelihood_bound_is_the_likelihood_of_one_masked_token(kappa: str) -> None:
    q, path = table(1), MixturePath(VOCABULARY, KAPPAS[kappa]())
    x1 = torch.arange(VOCABULARY)[:, None].repeat_interleave(50, 0)
    bound = likelihood_bound(Exact(path, q), x1, path, samples=200, generator=seeded())
    assert bound.dtype == torch.float64 and bound.shape == (200,)
    mean, error = bound.reshape(VOCABULARY, 50).mean(1), bound.reshape(VOCABULARY, 50).std(1) / 50**0.5
    assert ((mean + q.log()).abs() < 4 * error).all() and (error < 0.03 * mean).all()
    assert float((q * mean).sum()) == pytest.approx(float(-(q * q.log()).sum()), rel=0.02)
    rows = {"samples": 4, "generator": [seeded(row) for row in range(200)]}
    again = likelihood_bound(Exact(path, q), x1, path, **rows)
    rows["generator"] = [seeded(row) for row in range(200)]
    without_axis = likelihood_bound(lambda x, t: Exact(path, q)(x[:, None], t)[:, 0], x1[:, 0], path, **rows)
    torch.testing.assert_close(without_axis, again)
    bits = bits_per_dim(-bound, 1)
    torch.testing.assert_close(bits, bound / torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_the_likelihood_bound_of_two_tokens_is_no_less_than_their_entropy() -> None:
    q = table(2)
    data = torch.multinomial(q.flatten(), 1500, replacement=True, generator=seeded())
    x1 = torch.stack([data // VOCABULARY, data % VOCABULARY], 1)
    entropy = float(-(q * q.log()).sum())
    for kind in ("mask", "uniform"):
        path = KINDS[kind]
        bound = likelihood_bound(Exact(path, q), x1, path, samples=16, generator=seeded(1))
        error = float(bound.std()) / len(x1) ** 0.5
        assert float(bound.mean()) > entropy - 4 * error
        rows = [seeded(i) for i in range(3)]
        together = likelihood_bound(Exact(path, q), x1[:3], path, samples=4, generator=rows)
        alone = likelihood_bound(Exact(path, q), x1[2:3], path, samples=4, generator=[seeded(2)])
        torch.testing.assert_close(together[2:], alone, atol=1e-12, rtol=0)


def test_the_likelihood_bound_of_ignorance_is_finite_for_a_uniform_source() -> None:
    """Per token 2 a log(1 / v) + a (log V - 1 / V - a) (1 - v^2) + log V, for a = 1 - 1 / V and v = 0.1."""
    a, log_v, v = 1.0 - 1.0 / VOCABULARY, np.log(VOCABULARY), 0.1
    expected = 2 * a * np.log(1 / v) + a * (log_v - 1 / VOCABULARY - a) * (1 - v * v) + log_v
    x1 = torch.randint(0, VOCABULARY, (200, 3), generator=seeded())
    zeros = lambda x, t: torch.zeros(*x.shape, VOCABULARY)  # noqa: E731
    bound = likelihood_bound(zeros, x1, KINDS["uniform"], samples=8, generator=seeded(1)) / 3
    error = float(bound.std()) / len(x1) ** 0.5
    assert abs(float(bound.mean()) - expected) < 4 * error and error < 0.02 * expected


def test_losses_broadcast_over_images_of_tokens_and_times_of_rows() -> None:
    path, x1 = KINDS["uniform"], torch.randint(0, VOCABULARY, (3, 2, 5), generator=seeded())
    u, t = torch.rand(3, 2, 5, generator=seeded()), torch.tensor([0.0, 0.5, 1.0])
    sample = path.sample(x1, t, u)
    logits = torch.randn(3, 2, 5, VOCABULARY, generator=seeded()).bfloat16()
    for objective in OBJECTIVES.values():
        loss = objective(logits, sample, path=path)
        assert loss.shape == (3,) and loss.dtype == torch.float32 and loss.isfinite().all()
        for row in range(3):
            alone = DiscreteSample(*(value[row : row + 1] for value in sample))
            torch.testing.assert_close(objective(logits[row : row + 1], alone, path=path)[0], loss[row])
        # rows of a single token need no axis for it
        one = DiscreteSample(sample.xt[:, 0, 0], x1[:, 0, 0], t)
        same = DiscreteSample(one.xt[:, None], one.x1[:, None], t)
        expected = objective(logits[:, 0, :1], same, path=path)
        torch.testing.assert_close(objective(logits[:, 0, 0], one, path=path), expected)


def test_with_masks_cross_entropy_under_the_likelihood_weighting_is_generalised_kl() -> None:
    path = KINDS["mask"]
    x1 = torch.randint(0, VOCABULARY, (4, 6), generator=seeded())
    sample = path.sample(x1, torch.tensor([0.1, 0.4, 0.7, 0.9]), torch.rand(4, 6, generator=seeded()))
    logits = torch.randn(4, 6, VOCABULARY, generator=seeded())
    weight = make(WEIGHTINGS, "likelihood", "weighting")(path, sample.t)
    torch.testing.assert_close(
        cross_entropy(logits, sample, path=path, weight=weight), generalised_kl(logits, sample, path=path)
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_are_finite_and_not_negative(name: str) -> None:
    weighting, t = make(WEIGHTINGS, name, "weighting"), torch.tensor([0.0, 0.3, 0.9, 1.0])
    for path in MIXTURES.values():
        weight = weighting(path, t)
        assert weight.isfinite().all() and (weight >= 0).all() and weight.dtype == torch.float64
    rate = weighting(KINDS["mask"], t)[1:3].tolist()
    expected = {"constant": [1, 1], "likelihood": [1 / 0.7, 10], "capped": [1 / 0.7, 5]}[name]
    assert rate == pytest.approx(expected, rel=1e-6)


def test_mistakes_are_named() -> None:
    path, x1 = KINDS["uniform"], torch.zeros(2, 3, dtype=torch.int64)
    sample = path.sample(x1, 0.5, torch.zeros(2, 3))
    logits = torch.zeros(2, 3, VOCABULARY)
    for objective in OBJECTIVES.values():
        with pytest.raises(UserError, match="vocabulary of 4"):
            objective(torch.zeros(2, 3, 9), sample, path=path)
        with pytest.raises(ValueError, match="one per row"):
            objective(logits, sample, path=path, weight=torch.ones(3))
    metric = KINDS["metric"]
    with pytest.raises(UserError, match=r"(?s)MetricPath has no generalised KL.*cross-entropy"):
        generalised_kl(logits, metric.sample(x1, 0.5, torch.zeros(2, 3)), path=metric)
    with pytest.raises(UserError, match="no generalised KL"):
        likelihood_bound(lambda x, t: logits, x1, metric)
    with pytest.raises(UserError, match="evaluation 1 of 3 are not finite"):
        likelihood_bound(lambda x, t: logits * torch.nan, x1, path, samples=2)
    with pytest.raises(UserError, match="samples of the likelihood bound is 0"):
        likelihood_bound(lambda x, t: logits, x1, path, samples=0)
    with pytest.raises(UserError, match="the cap of the weighting"):
        make(WEIGHTINGS, "capped", "weighting", most=-1)
