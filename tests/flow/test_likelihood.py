from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentflow.errors import UserError
from latentflow.flow import PATHS, SOLVERS, CondOT, bits_per_dim, guide, log_likelihood, time_grid

from .closed_forms import seeded

PATH = CondOT()
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def exact_density(mixture, x: Tensor) -> Tensor:
    """Return log p_1 of the elementwise product of mixtures."""
    return mixture.log_density(PATH, x, torch.ones((), dtype=torch.float64)).flatten(1).sum(1)


@pytest.fixture
def velocity(mixture):
    return mixture.on(PATH)


class Net(nn.Module):
    """A velocity with what networks are made of: convolution, norms, attention, an embedding of t."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.time, self.qkv, self.outwards = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.inwards(x))).flatten(2).mT  # (B, HW, 8)
        hidden = F.layer_norm(hidden + self.time(t.to(x).reshape(-1, 1, 1)), (8,))
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, 2))
        hidden = hidden + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.outwards(hidden).mT.reshape(x.shape)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@pytest.mark.parametrize("shape", [(6, 1), (4, 3), (3, 2, 2, 3), (2, 2, 2, 1, 2)])
def test_density_of_the_mixture_in_any_shape(mixture, velocity, draw, shape) -> None:
    x1 = 2 * draw(*shape)
    found = log_likelihood(velocity, x1, **TIGHT)
    assert found.shape == shape[:1] and found.dtype == torch.float64
    assert (found - exact_density(mixture, x1)).abs().max() < 1e-5
    flat = log_likelihood(velocity, x1.flatten(1), **TIGHT)
    assert torch.allclose(found, flat, atol=1e-9)


def test_an_affine_flow_that_mixes_and_turns_the_elements(draw) -> None:
    """dx/dt = A x: x1 = exp(A) x0, a normal with covariance exp(A) exp(A)^T; the trace alone is not enough."""
    matrix = torch.tensor([[0.3, -1.0, 0.2], [0.8, -0.5, 0.0], [0.1, 0.4, 0.6]], dtype=torch.float64)
    end, x1 = torch.linalg.matrix_exp(matrix), draw(5, 3)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3).double(), end @ end.T).log_prob(x1)
    assert torch.allclose(log_likelihood(lambda x, t: x @ matrix.T, x1, **TIGHT), exact, atol=1e-6)


SHIFT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
LEARNED = nn.Parameter(SHIFT.clone())


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    "velocity",
    [
        lambda x, t: SHIFT.expand_as(x),  # no graph at all
        lambda x, t: 2 * t * SHIFT + torch.zeros_like(x),  # of t alone
        lambda x, t: SHIFT.long().expand_as(x),  # whole numbers
        lambda x, t: LEARNED.expand_as(x),  # a graph, to parameters only
        lambda x, t: 0 * x + SHIFT,
        lambda x, t: x.sign().abs() * SHIFT,  # constant in pieces: its derivative is 0 almost everywhere
        lambda x, t: (x > -1e9).long() * SHIFT.long(),
    ],
)
def test_a_translation_moves_the_density(draw, velocity, kind, differentiable) -> None:
    """dx/dt = c, or any other that does not depend on x: log p1(x) = log N(x - c)."""
    x1 = draw(5, 3).requires_grad_(differentiable)
    found = log_likelihood(velocity, x1, kind, differentiable=differentiable)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x1 - SHIFT).sum(1)
    torch.testing.assert_close(found, exact)
    if differentiable:
        (score,) = torch.autograd.grad(found.sum(), x1)
        torch.testing.assert_close(score, SHIFT - x1)


def test_elements_that_stand_still_or_drift_add_nothing(draw) -> None:
    """dx/dt = (a x, c, 0): the divergence is a."""
    x1 = draw(5, 3)
    found = log_likelihood(
        lambda x, t: torch.stack([0.5 * x[:, 0], SHIFT[1].expand(len(x)), torch.zeros(len(x))], 1),
        x1,
        **TIGHT,
    )
    start = torch.stack([x1[:, 0] * math.exp(-0.5), x1[:, 1] - SHIFT[1], x1[:, 2]], 1)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(start).sum(1) - 0.5
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_on_a_full_jacobian_and_more_probes_vary_less(draw, probe) -> None:
    matrix, x1 = draw(4, 4) / 2, draw(1, 4)
    options = {"solver": "rk4", "times": time_grid(4).flip(0), "probe": probe, "generator": seeded()}
    velocity = lambda x, t: (x @ matrix.T).tanh()  # noqa: E731
    exact = log_likelihood(velocity, x1, **options)
    one, nine = (
        log_likelihood(velocity, x1.expand(10_000, 4), "hutchinson", probes=n, **options) for n in (1, 9)
    )
    for many in (one, nine):
        error = many.std().item() / 10_000**0.5
        assert 0.0005 < error < 0.05
        assert abs(many.mean().item() - exact.item()) < 4 * error
    assert (one.std() / nine.std()).item() == pytest.approx(3.0, rel=0.1)


def test_rademacher_is_exact_on_a_diagonal_field(draw) -> None:
    diagonal, x1 = draw(2, 3), draw(5, 2, 3)
    exact, estimate = (
        log_likelihood(lambda x, t: x * diagonal, x1, kind, generator=seeded(), **TIGHT)
        for kind in ("exact", "hutchinson")
    )
    assert torch.allclose(estimate, exact, atol=1e-10)


def test_a_generator_of_its_own_makes_a_row_independent_of_the_others(net, draw) -> None:
    x1, alone = draw(3, 2, 2, 2).float(), {"solver": "heun", "times": [1.0, 0.5, 0.0], "probes": 2}
    found = log_likelihood(net, x1, "hutchinson", generator=[seeded(seed) for seed in range(3)], **alone)
    for row in range(3):
        one = log_likelihood(net, x1[row : row + 1], "hutchinson", generator=[seeded(row)], **alone)
        torch.testing.assert_close(one[0], found[row])
    assert not torch.allclose(
        log_likelihood(net, x1[:1], "hutchinson", generator=[seeded(9)], **alone), found[:1]
    )
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        log_likelihood(net, x1, "hutchinson", generator=[seeded(), seeded()])


def test_gradient_to_the_data_is_the_score(mixture, velocity, draw) -> None:
    x1 = (2 * draw(4, 2, 3)).requires_grad_()
    log_likelihood(velocity, x1, differentiable=True, **TIGHT).sum().backward()
    score = mixture.score(PATH, x1, torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(x1.grad, score, atol=1e-5)


def test_gradient_to_the_parameters_is_the_difference_quotient(draw) -> None:
    scale, x1 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), draw(3, 2)

    def density(scale: Tensor) -> Tensor:
        return log_likelihood(lambda x, t: (scale * x).sin(), x1, differentiable=True, **TIGHT)

    assert torch.autograd.gradcheck(density, scale, eps=1e-4, atol=1e-5)


def test_without_differentiable_nothing_keeps_a_graph(net, draw) -> None:
    x1 = draw(2, 2, 3, 3).float().requires_grad_()
    grid = {"solver": "euler", "times": [1.0, 0.5, 0.0]}
    for kind in ("exact", "hutchinson"):
        assert not log_likelihood(net, x1, kind, **grid).requires_grad
        with torch.no_grad():
            assert log_likelihood(net, x1, kind, **grid).isfinite().all()
    assert all(p.grad is None for p in net.parameters()) and x1.grad is None


def test_divergence_of_a_network_is_the_trace_of_its_jacobian(net, draw) -> None:
    x1, t = draw(3, 2, 3, 3).float(), torch.tensor(1.0)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: net(x[None], t)[0], x) for x in x1])
    trace = jacobian.reshape(3, 18, 18).diagonal(dim1=1, dim2=2).sum(1)
    # One Euler step back: log p = log N(x - v) - div.
    step = log_likelihood(net, x1, solver="euler", times=[1.0, 0.0])
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x1 - net(x1, t)).flatten(1).sum(1)
    assert torch.allclose(normal - step, trace, atol=1e-4)
    assert trace.abs().min() > 1e-2


def test_a_network_with_attention_is_differentiated_twice(net, draw) -> None:
    x1 = draw(2, 2, 3, 3).float()
    log_likelihood(net, x1, solver="euler", times=[1, 0], differentiable=True).sum().backward()
    assert all(p.grad.isfinite().all() for name, p in net.named_parameters() if name != "outwards.bias")
    assert net.qkv.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_chunks_change_nothing(net, draw, kind) -> None:
    x1, options = draw(2, 2, 3, 3).float(), {"probes": 7, "solver": "euler", "times": [1, 0.5, 0]}
    first, *others = (
        log_likelihood(net, x1, kind, generator=seeded(), chunk_size=size, **options)
        for size in (1, 5, 18, 1000)
    )
    assert all(torch.allclose(first, other, atol=1e-4) for other in others)


def test_in_half_precision_the_trace_is_added_up_in_float32() -> None:
    """The divergence of x -> x / 3 in 3,000 elements: in bfloat16 the sum of the products would stall at 128."""
    x1 = torch.zeros(2, 3000, dtype=torch.bfloat16)
    third = float(torch.tensor(1 / 3).bfloat16())
    for kind, chunk_size in (("hutchinson", 32), ("exact", 1000)):
        found = log_likelihood(
            lambda x, t: third * x, x1, kind, solver="euler", times=[1, 0], chunk_size=chunk_size
        )
        normal = 3000 * math.log(2 * math.pi) / 2
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx([-normal - 3000 * third] * 2, rel=1e-5)


def test_a_source_of_its_own_and_a_part_of_the_time(draw) -> None:
    """dx/dt = x from t = 0.25 to 0.75 multiplies by e^(1/2): N(1, 3^2) becomes N(e^(1/2), (3 e^(1/2))^2)."""
    x1, growth = draw(4, 2), math.exp(0.5)
    found = log_likelihood(
        lambda x, t: x,
        x1,
        times=[0.75, 0.25],
        log_source=lambda x: torch.distributions.Normal(1.0, 3.0).log_prob(x).sum(1),
        **TIGHT,
    )
    exact = torch.distributions.Normal(growth, 3 * growth).log_prob(x1).sum(1)
    assert torch.allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.stochastic])
def test_every_deterministic_solver(gaussian, draw, solver) -> None:
    x1, times = 1.5 + 0.4 * draw(10, 2), time_grid(400 if SOLVERS[solver].order == 1 else 80).flip(0)
    found = log_likelihood(gaussian.on(PATH), x1, solver=solver, times=times)
    assert torch.allclose(found, exact_density(gaussian, x1), atol=0.05)


def test_a_guided_flow_that_stands_still_keeps_the_density(draw) -> None:
    x1 = draw(5, 2)
    still = guide(lambda x, t: x, lambda x, t: x, 1.0, zero_init=0.5)
    found = log_likelihood(still, x1, solver="rk4", times=[0.4, 0.0])
    assert torch.allclose(found, torch.distributions.Normal(0.0, 1.0).log_prob(x1).sum(1), atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_density_on_every_path(mixture, draw, name) -> None:
    path, x1 = PATHS[name](), 2 * draw(8, 2)
    start = path.sigma(torch.tensor(0.0, dtype=torch.float64))
    found = log_likelihood(
        mixture.on(path),
        x1,
        times=path.interval[::-1],
        rtol=1e-6,
        atol=1e-6,
        log_source=lambda x: torch.distributions.Normal(0.0, start).log_prob(x).sum(1),
    )
    # The paths that reach neither end exactly miss by no more than alpha(0), or sigma(1) / std.
    assert torch.allclose(found, exact_density(mixture, x1), atol=0.05)


def test_bits_per_dim_of_a_standard_normal_is_its_entropy(draw) -> None:
    x1 = draw(20_000, 2, 2, 3)
    logp = torch.distributions.Normal(0.0, 1.0).log_prob(x1).flatten(1).sum(1)
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    assert bits_per_dim(logp, x1.shape[1:]).mean().item() == pytest.approx(entropy, abs=0.02)
    assert torch.equal(bits_per_dim(logp, x1.shape[1:]), bits_per_dim(logp, 12))
    with pytest.raises(ValueError, match="0 dimensions"):
        bits_per_dim(logp, (2, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "exakt"}, UserError, "did you mean 'exact'"),
        ({"divergence": "hutchinson", "probe": "gausian"}, UserError, "did you mean 'gaussian'"),
        ({"solver": "dopri"}, UserError, "did you mean 'dopri5'"),
        ({"solver": "ddpm"}, UserError, "stochastic"),
        ({"probes": 0}, ValueError, "probes is 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ({"times": (0.0, 1.0)}, UserError, "Pass decreasing times"),
        ({"x1": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "torch.int64"),
        ({"x1": torch.zeros(2)}, ValueError, "floating-point rows"),
        ({"log_source": lambda x: -x}, ValueError, "sum over the elements"),
        ({"velocity": lambda x, t: x[:, :1]}, ValueError, "must keep that of x"),
        ({"velocity": torch.no_grad()(lambda x, t: -x)}, UserError, "no graph"),
        ({"velocity": lambda x, t: LEARNED[:2] * x.detach()}, UserError, "no graph"),
        ({"velocity": lambda x, t: torch.full_like(x, torch.nan)}, UserError, "not finite"),
        ({"velocity": lambda x, t: x * torch.nan}, UserError, "not finite"),
    ],
)
def test_bad_input(options, error, message) -> None:
    with pytest.raises(error, match=message):
        log_likelihood(**{"velocity": lambda x, t: -x, "x1": torch.zeros(2, 2), **options})
