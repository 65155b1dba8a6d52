"""Paths of tokens move their probabilities as they say: Kolmogorov's equation, at every pair of schedule and source."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import make
from latentflow.flow.discrete import (
    CORRECTORS,
    KAPPAS,
    SOURCES,
    CubicKappa,
    DiscretePath,
    Kappa,
    LinearKappa,
    MaskSource,
    MetricPath,
    MixturePath,
    PolynomialKappa,
    UniformSource,
)

from .exact import EVERY_PATH, VOCABULARY, Exact, all_states, generator_matrix, table

TIMES = (0.05, 0.4, 0.9)
EVERY_KAPPA: dict[str, Kappa] = {name: make() for name, make in KAPPAS.items()} | {
    "polynomial-3": PolynomialKappa(3.0),
    "cubic-steep": CubicKappa(first=2.0, last=0.5),
}


@pytest.fixture(params=EVERY_PATH.values(), ids=list(EVERY_PATH))
def path(request: pytest.FixtureRequest) -> DiscretePath:
    return request.param


def pairs(path: DiscretePath) -> tuple[Tensor, Tensor]:
    """All (x, x1): (states, V) each."""
    x, x1 = torch.meshgrid(torch.arange(path.states), torch.arange(path.vocabulary), indexing="ij")
    return x, x1


@pytest.mark.parametrize("kappa", EVERY_KAPPA.values(), ids=list(EVERY_KAPPA))
def test_kappa_runs_from_0_to_1_with_its_derivative_and_inverse(kappa: Kappa) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert kappa(t)[[0, -1]].tolist() == pytest.approx([0.0, 1.0], abs=1e-15)
    assert kappa.remainder(t)[[0, -1]].tolist() == pytest.approx([1.0, 0.0], abs=1e-15)
    assert (kappa(t).diff() > 0).all()
    inner = t[1:-1]
    torch.testing.assert_close(kappa.remainder(inner), 1 - kappa(inner), atol=1e-14, rtol=0)
    difference = (kappa(inner + 1e-6) - kappa(inner - 1e-6)) / 2e-6
    torch.testing.assert_close(kappa.derivative(inner), difference, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(kappa.inverse(kappa(t)), t, atol=1e-8, rtol=0)


def test_the_remainder_is_exact_where_it_is_small() -> None:
    for kappa in EVERY_KAPPA.values():
        near = torch.tensor([1e-9], dtype=torch.float64)
        slope = kappa.derivative(torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(kappa.remainder(1 - near), slope * near, rtol=1e-6, atol=1e-17)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("t", TIMES)
def test_forward_and_backward_rates_move_p_t_and_together_leave_it(path, t: float, positions: int) -> None:
    exact, x = Exact(path, table(positions)), all_states(path, positions)
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    p = exact.marginal(x, time)
    unit = torch.eye(len(p), dtype=torch.float64)
    (slope,) = torch.autograd.grad(p, time, unit, is_grads_batched=True)
    p = p.detach()
    forward, backward = (
        generator_matrix(exact, x, t, rates) for rates in (path.forward_rates, path.backward_rates)
    )
    for matrix in (forward, backward):
        assert (matrix - torch.diag(matrix.diag()) >= 0).all()
    tolerance = 1e-12 if isinstance(path, MixturePath) else 1e-9
    torch.testing.assert_close(p @ forward, slope, atol=tolerance, rtol=0)
    torch.testing.assert_close(p @ -backward, slope, atol=tolerance, rtol=0)
    torch.testing.assert_close(p @ (forward + backward), torch.zeros_like(p), atol=tolerance, rtol=0)
    # the corrector that samplers apply: a draw from p_t(. | x1), whatever the present token
    redraws = generator_matrix(exact, x, t, lambda here, data, time: path.probabilities(data, time))
    torch.testing.assert_close(p @ redraws, torch.zeros_like(p), atol=tolerance, rtol=0)


def test_a_mixture_with_its_corrector_is_forward_plus_a_share_of_forward_less_backward() -> None:
    """k' / (k (1 - k)) to a draw from p_t(. | x1) is both parts, and the clocks count its events."""
    for name in ("cosine-mask", "cubic-uniform"):
        path, t = EVERY_PATH[name], 0.37
        x, x1 = pairs(path)
        time = torch.tensor(t, dtype=torch.float64)
        k, rest = path.progress(time), path.remainder(time)
        both = path.forward_rates(x, x1, t) + path.backward_rates(x, x1, t)
        redraw = path.kappa.derivative(time) / (k * rest) * path.probabilities(x1, t)
        torch.testing.assert_close(both, redraw.scatter(-1, x[..., None], 0.0), atol=1e-13, rtol=0)
    k = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    for name, share in (("balanced", k * (1 - k)), ("constant", torch.ones_like(k))):
        (slope,) = torch.autograd.grad(CORRECTORS[name](k, 1 - k).sum(), k)
        torch.testing.assert_close(slope, (share / (k * (1 - k))).detach())


def test_everything_is_finite_at_both_ends_and_they_are_source_and_data(path) -> None:
    x, x1 = pairs(path)
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.0, 1e-9, 0.5, 1.0 - 1e-9, 1.0):
        p = path.probabilities(x1, t)
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
        assert (p >= 0).all()
        for jump in (path.forward(x, x1, t, uniform), path.backward(x, x1, t, uniform)):
            assert jump.rate.isfinite().all() and (jump.rate >= 0).all()
            assert ((jump.target >= 0) & (jump.target < path.states)).all()
        for rates in (path.forward_rates, path.backward_rates):
            assert rates(x, x1, t).isfinite().all()
        for t_next in (0.0, 0.7, 1.0):
            leap = path.leap(x, x1, t, max(t, t_next), uniform)
            assert ((leap.rate >= 0) & (leap.rate <= 1)).all()
    assert torch.equal(path.draw(x1, 1.0, uniform), x1)
    data = torch.nn.functional.one_hot(x1, path.states).double()
    torch.testing.assert_close(path.probabilities(x1, 1.0), data, atol=0, rtol=0)
    start = path.probabilities(x1, 0.0)
    torch.testing.assert_close(start, start[:1, :1].expand_as(start), atol=1e-15, rtol=0)
    if isinstance(path, MixturePath):
        torch.testing.assert_close(start[0, 0], path.source.probabilities(VOCABULARY))
    else:
        torch.testing.assert_close(start[0, 0], torch.full((VOCABULARY,), 0.25, dtype=torch.float64))


def test_the_steepest_kappa_has_rates_at_both_ends() -> None:
    path, ends = MixturePath(4, PolynomialKappa(50.0)), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.rate(ends).isfinite().all() and path.backward_rate(ends).isfinite().all()
    assert float(path.backward_rate(ends)[0]) == pytest.approx(50e6)


@pytest.mark.parametrize("t", [0.0, 0.4, 0.95])
def test_drawn_jumps_have_the_law_of_the_rates(path, t: float) -> None:
    """Evenly spaced numbers in the place of random ones: the shares of the targets are their probabilities."""
    x, x1 = (tokens.flatten() for tokens in pairs(path))
    n = 2000
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(len(x), -1)
    wide, data = x[:, None].expand(-1, n), x1[:, None].expand(-1, n)

    def shares(targets: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(targets, path.states).double().mean(1)

    torch.testing.assert_close(shares(path.draw(data, t, u)), path.probabilities(x1, t), atol=2 / n, rtol=0)
    for draw, rates in ((path.forward, path.forward_rates), (path.backward, path.backward_rates)):
        target, rate = draw(wide, data, t, u)
        # the rate of leaving: jumps to the present token do nothing
        leaving = (torch.nn.functional.one_hot(target, path.states) * rate[..., None]).mean(1)
        leaving = leaving.scatter(-1, x[:, None], 0.0)
        expected = rates(x, x1, t)
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(leaving / scale, expected / scale, atol=4 / n, rtol=0)


@pytest.mark.parametrize(("t", "t_next"), [(0.0, 0.3), (0.3, 0.35), (0.5, 1.0), (0.0, 1.0)])
def test_a_leap_is_exact(path, t: float, t_next: float) -> None:
    n = 2000
    x, x1 = (tokens.flatten() for tokens in pairs(path))
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(len(x), -1)
    target, probability = path.leap(x[:, None].expand(-1, n), x1[:, None].expand(-1, n), t, t_next, u)
    torch.testing.assert_close(probability, probability[:, :1].expand_as(probability), atol=0, rtol=0)
    p = path.probabilities(x1, t).gather(1, x[:, None])[:, 0]
    moved = torch.nn.functional.one_hot(target, path.states).double().mean(1) * probability[:, :1]
    stay = torch.nn.functional.one_hot(x, path.states) * (1 - probability[:, :1])
    after = torch.zeros(VOCABULARY, path.states, dtype=torch.float64).index_add(
        0, x1, p[:, None] * (moved + stay)
    )
    torch.testing.assert_close(
        after, path.probabilities(torch.arange(VOCABULARY), t_next), atol=3 / n, rtol=0
    )


def test_samples_are_a_function_of_their_numbers(path) -> None:
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randint(0, VOCABULARY, (3, 2, 5), generator=generator)
    u, t = torch.rand(3, 2, 5, generator=generator, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0])
    sample = path.sample(x1, t, u)
    assert sample.x1 is x1 and sample.xt.shape == x1.shape and sample.xt.dtype == torch.int64
    assert torch.equal(sample.xt[2], x1[2])
    for row in range(3):
        assert torch.equal(
            path.sample(x1[row : row + 1], t[row : row + 1], u[row : row + 1]).xt[0], sample.xt[row]
        )
    start = path.start(u)
    assert torch.equal(start, path.start(u)) and start.shape == u.shape
    if isinstance(path, MixturePath):
        expected = torch.full_like(x1, VOCABULARY) if path.states > VOCABULARY else (u * VOCABULARY).long()
        assert torch.equal(start, expected)


@dataclasses.dataclass(frozen=True)
class Wrong(Kappa):
    """a + (b - a) t, and a bump."""

    a: float = 0.0
    b: float = 1.0
    bump: float = 0.0

    def __call__(self, t: Tensor) -> Tensor:
        return self.a + (self.b - self.a) * t + self.bump * torch.sin(2 * math.pi * t)

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MixturePath(4, Wrong(a=0.1)), "(?s)from 0.1 at t = 0 to 1 at t = 1.*must be 0 at t = 0"),
        (lambda: MixturePath(4, Wrong(b=0.9)), "from 0 at t = 0 to 0.9 at t = 1"),
        (lambda: MixturePath(4, Wrong(bump=0.5)), "falls between"),
        (lambda: MixturePath(4, Wrong(bump=math.nan)), "from nan"),
        (lambda: MixturePath(1), "the vocabulary is 1"),
        (lambda: MixturePath(4.0), "the vocabulary is 4.0"),
        (lambda: PolynomialKappa(0.5), "degree must be a number of at least 1"),
        (lambda: PolynomialKappa(60.0), "at most 50, not 60.0"),
        (lambda: CubicKappa(first=4.0), "first slope of the cubic kappa is 4.0"),
        (lambda: make(KAPPAS, "polynomail", "kappa"), "did you mean 'polynomial'"),
        (lambda: make(SOURCES, "masks", "source"), "did you mean 'mask'"),
        (lambda: MetricPath(torch.zeros(3)), r"shape \(3,\)"),
        (lambda: MetricPath(torch.zeros(3, 2)), "(?s)2 of 3 embeddings are equal.*collapsed"),
        (lambda: MetricPath(torch.tensor([[0.0], [math.nan]])), "not all finite"),
        (lambda: MetricPath(torch.eye(3), scale=0.0), "scale 0.0"),
        (
            lambda: MixturePath(4).sample(torch.tensor([[4]]), 0.5, torch.zeros(1, 1)),
            "(?s)from 4 to 4.*tokenizer",
        ),
        (lambda: MixturePath(4).sample(torch.tensor([[1.0]]), 0.5, torch.zeros(1, 1)), "(?s)float32.*int64"),
    ],
)
def test_mistakes_are_named(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_wrong_shapes_and_times_are_refused() -> None:
    path, x1 = MixturePath(4, LinearKappa(), UniformSource()), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one number per token"):
        path.sample(x1, 0.5, torch.zeros(3))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        path.sample(x1, 1.5, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one t per row"):
        path.sample(x1, torch.zeros(3), torch.zeros(2, 3))
    assert MixturePath(4, LinearKappa(), MaskSource()).states == 5
