"""Samplers reach the law of the data, at their orders; each generator alone decides its row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latentflow.errors import UserError
from latentflow.flow.discrete import (
    CORRECTORS,
    SAMPLERS,
    DiscretePath,
    LinearKappa,
    MixturePath,
    PolynomialKappa,
    UniformSource,
    confidence,
    simulate,
)
from latentflow.flow.discrete import orders as orders_module
from latentflow.flow.discrete import samplers as samplers_module
from latentflow.flow.discrete.categorical import Logits
from latentflow.flow.discrete.orders import halton_places
from latentflow.flow.discrete.samplers import SamplerOptions

from ..closed_forms import seeded
from .exact import EVERY_PATH, KINDS, VOCABULARY, Exact, all_states, table, total_variation

JUMPS = [name for name, sampler in SAMPLERS.items() if not sampler.masked]
ORDERS = [name for name, sampler in SAMPLERS.items() if sampler.masked]
SAMPLES = 20_000


class Lookup:
    """The exact posterior of two positions, evaluated once for each time and state."""

    def __init__(self, path: DiscretePath, q: Tensor) -> None:
        self.exact, self.states = Exact(path, q), all_states(path, 2)
        self.calls: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(float(t))
        return self.exact(self.states, t)[x[:, 0] * self.exact.path.states + x[:, 1]]


def samples(path: DiscretePath, sampler, steps: int, n: int = SAMPLES, **options) -> Tensor:
    generator = seeded(1)
    start = path.start(torch.rand(n, 2, generator=generator, dtype=torch.float64))
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return simulate(Lookup(path, table(2)), start, times, sampler, path=path, generator=generator, **options)


@pytest.mark.parametrize("corrector", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["mask", "uniform"])
def test_the_default_reaches_the_data_with_and_without_corrector(kind: str, corrector: float) -> None:
    assert total_variation(samples(KINDS[kind], "exact", steps=48, corrector=corrector), table(2)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", JUMPS)
def test_every_sampler_reaches_the_data(kind: str, sampler: str, corrector: float) -> None:
    steps = 96 if sampler == "exact" else 192
    assert total_variation(samples(KINDS[kind], sampler, steps, corrector=corrector), table(2)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [1.0, 5.0])
@pytest.mark.parametrize("sampler", [name for name in ORDERS if SAMPLERS[name].order])
def test_orders_reach_the_data_with_a_corrector(sampler: str, corrector: float) -> None:
    x = samples(KINDS["mask"], sampler, steps=192, corrector=corrector)
    assert total_variation(x, table(2)) < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_rows_are_no_rows(sampler: str) -> None:
    x = torch.zeros(0, 2, 3, dtype=torch.int64)
    out = simulate(lambda x, t: torch.zeros(*x.shape, 4), x, [0, 0.5, 1], sampler, path=MixturePath(4))
    assert out.shape == x.shape


@pytest.mark.parametrize("shape", CORRECTORS)
@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=list(EVERY_PATH))
def test_everything_stays_finite_from_one_end_to_the_other(path: DiscretePath, shape: str) -> None:
    for sampler in JUMPS if path.states == VOCABULARY else SAMPLERS:
        for steps in (1, 3):
            x = samples(path, sampler, steps, n=20, corrector=5.0, corrector_shape=shape)
            assert ((x >= 0) & (x < VOCABULARY)).all()


def test_a_constant_corrector_draws_source_and_data_again_at_the_ends() -> None:
    """Its rates are infinite there, at kappa = 0 as well: the source drawn again is the source, nothing is lost."""
    x = samples(KINDS["uniform"], "exact", steps=48, corrector=1.0, corrector_shape="constant")
    assert total_variation(x, table(2)) < 0.02


@pytest.mark.parametrize(("kind", "sampler"), [("uniform", "exact"), ("mask", "random")])
def test_from_data_made_noise_half_way_the_data_come_back(kind: str, sampler: str) -> None:
    path, q, generator = KINDS[kind], table(2), seeded(1)
    data = torch.multinomial(q.flatten(), SAMPLES, replacement=True, generator=generator)
    x1 = torch.stack([data // VOCABULARY, data % VOCABULARY], 1)
    x = path.sample(x1, 0.5, torch.rand(SAMPLES, 2, generator=generator, dtype=torch.float64)).xt
    times = torch.linspace(0.5, 1.0, 17, dtype=torch.float64)
    out = simulate(Lookup(path, q), x, times, sampler, path=path, generator=generator)
    assert total_variation(out, q) < 0.02
    assert 0.2 < float((out != x1).any(1).double().mean()) < 0.8  # other data


# --- orders of convergence: the law after all steps, computed exactly ---------------------------------------------


def transition(path: DiscretePath, sampler: str, t: float, t_next: float, patch) -> Tensor:
    """Probability of each state after a step, of one position that is at x and whose data token is x1: (S, V, S)."""
    n = 1000
    x, x1 = torch.meshgrid(torch.arange(path.states), torch.arange(VOCABULARY), indexing="ij")
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    here, data = (tokens.flatten()[:, None, None].expand(-1, n, 1).reshape(-1, 1) for tokens in (x, x1))
    event = grid[None, :, None].expand(x.numel(), -1, 1).reshape(-1, 1)
    target = (grid * 619.0 + 0.5).remainder(1.0)[None, :, None].expand(x.numel(), -1, 1).reshape(-1, 1)
    patch.setattr(samplers_module, "uniform_like", lambda *_: torch.stack([event, target, event]))
    options = SamplerOptions(
        path=path, strength=0.0, corrector=CORRECTORS["balanced"], temperature=1.0, generator=None
    )
    certain = torch.nn.functional.one_hot(data, VOCABULARY).double().log()
    after = SAMPLERS[sampler].start(options)(lambda *_: Logits(certain), here, t, t_next)
    law = torch.nn.functional.one_hot(after, path.states).double().reshape(x.numel(), n, -1).mean(1)
    return law.reshape(path.states, VOCABULARY, path.states)


def law_after(path: DiscretePath, sampler: str, times: Tensor, patch) -> Tensor:
    """The law of two positions that ``sampler`` ends with, over all states: positions jump independently given x."""
    exact, x = Exact(path, table(2)), all_states(path, 2)
    law = exact.marginal(x, 0.0)
    for t, t_next in zip(times.tolist(), times[1:].tolist(), strict=False):
        posterior = exact(x, t).exp()
        move = transition(path, sampler, t, t_next, patch)[x]  # (N, D, V, S)
        first, second = (torch.einsum("nv,nvs->ns", posterior[:, d], move[:, d]) for d in (0, 1))
        law = torch.einsum("n,na,nb->ab", law, first, second).flatten()
    return law


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", JUMPS)
def test_the_error_of_a_jump_falls_with_its_order(kind: str, sampler: str, monkeypatch) -> None:
    """Up to a time at which rates are moderate; at t = 1 they are infinite, where frozen ones lose by a logarithm."""
    path, last, errors = KINDS[kind], 0.6, []
    for steps in (8, 16):
        times = torch.linspace(0, last, steps + 1, dtype=torch.float64)
        law = law_after(path, sampler, times, monkeypatch)
        truth = Exact(path, table(2)).marginal(all_states(path, 2), last)
        errors.append(0.5 * float((law - truth).abs().sum()))
    order = SAMPLERS[sampler].order
    assert errors[0] > 0.004
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.2 * 2**order, errors


@pytest.mark.parametrize("path", EVERY_PATH.values(), ids=list(EVERY_PATH))
def test_exact_is_exact_for_one_position_at_any_steps(path: DiscretePath) -> None:
    generator = seeded(1)
    x = path.start(torch.rand(SAMPLES, 1, generator=generator, dtype=torch.float64))
    q = table(1)
    x = simulate(Exact(path, q), x, [0.0, 0.55, 1.0], "exact", path=path, generator=generator)
    assert total_variation(x, q) < 0.012


@pytest.mark.parametrize("sampler", [name for name in ORDERS if SAMPLERS[name].order])
def test_an_order_is_exact_with_a_step_per_position(sampler: str) -> None:
    path = KINDS["mask"]
    assert total_variation(samples(path, sampler, steps=2), table(2)) < 0.012
    assert (
        total_variation(samples(path, "exact", steps=2), table(2)) > 0.05
    )  # lifts both in one step, at times
    assert total_variation(samples(path, sampler, steps=2, corrector=1.0), table(2)) > 0.012


def test_confidence_has_the_bias_that_it_must_have() -> None:
    """Both tokens are drawn alone, the likelier one stays, the other is drawn again given it."""
    q = table(2)
    rows, columns = q.sum(1), q.sum(0)
    expected = torch.zeros_like(q)
    for a in range(VOCABULARY):
        for b in range(VOCABULARY):
            if rows[a] >= columns[b]:
                expected[a] += rows[a] * columns[b] * q[a] / rows[a]
            else:
                expected[:, b] += rows[a] * columns[b] * q[:, b] / columns[b]
    x = samples(KINDS["mask"], confidence(noise=0.0), steps=2)
    assert total_variation(x, expected) < 0.012
    assert total_variation(x, q) > 0.03
    # much noise is a random order
    assert total_variation(samples(KINDS["mask"], confidence(noise=1e6), steps=2), q) < 0.012


# --- orders of lifting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ORDERS)
def test_orders_lift_as_many_masks_as_kappa_says(sampler: str) -> None:
    path, seen = MixturePath(7, PolynomialKappa(2.0)), []
    x = torch.full((3, 4, 5), 7)
    x[1, 0] = 2  # five are known already: kappa is of those that are not
    simulate(
        lambda x, t: torch.zeros(*x.shape, 7), x, [0.0, 0.3, 0.6, 0.9, 1.0], sampler, path=path,
        callback=lambda i, t, x: seen.append((x == 7).flatten(1).sum(1).tolist()),
        generator=[seeded(i) for i in range(3)],
    )  # fmt: skip
    expected = [[int(m * (1 - t * t) + 1e-6) for m in (20, 15, 20)] for t in (0.3, 0.6, 0.9, 1.0)]
    assert seen == expected


def test_a_halton_sequence_visits_every_cell_and_spreads() -> None:
    assert halton_places((8,)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]  # van der Corput
    for grid in ((4, 4), (5, 3), (16, 16), (1, 7)):
        places = halton_places(grid)
        assert sorted(places.flatten().tolist()) == list(range(places.numel()))
    # of the first quarter, each quadrant has a quarter, up to one
    early = halton_places((16, 16)) < 64
    for rows in (slice(0, 8), slice(8, 16)):
        for columns in (slice(0, 8), slice(8, 16)):
            assert abs(int(early[rows, columns].sum()) - 16) <= 1


# --- what integrate promises, too ----------------------------------------------------------------------------


def network(vocabulary: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits that depend on all tokens of the row and on t."""
    weight = torch.randn(vocabulary + 1, vocabulary, generator=seeded(5), dtype=torch.float64)

    def posterior(x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * x.ndim).to(weight)
        return weight[x] + weight[x].flatten(1, -2).mean(1).reshape(len(x), *[1] * (x.ndim - 1), -1) * (1 - t)

    return posterior


CASES = [(name, kind) for name in SAMPLERS for kind in KINDS if kind == "mask" or name in JUMPS]


@pytest.mark.parametrize(("sampler", "kind"), CASES)
def test_each_generator_alone_decides_its_row(sampler: str, kind: str) -> None:
    path, shape = KINDS[kind], (5, 3, 4)
    u = torch.rand(shape, generator=seeded(), dtype=torch.float64)

    def run(rows: list[int], first: int = 0) -> Tensor:
        generators = [seeded(first + row) for row in rows]
        return simulate(
            network(VOCABULARY), path.start(u[rows]), torch.linspace(0, 1, 6), sampler, path=path,
            corrector=2.0, generator=generators,
        )  # fmt: skip

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    together = run(list(range(5)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(together[[3, 0]], run([3, 0]))
    assert torch.equal(together[2:3], run([2]))
    assert not torch.equal(together, run(list(range(5)), first=10))


@pytest.mark.parametrize(("sampler", "kind"), CASES)
def test_rows_of_a_single_token_need_no_axis_for_it(sampler: str, kind: str) -> None:
    path, u = KINDS[kind], torch.rand(6, generator=seeded(), dtype=torch.float64)

    def run(start: Tensor) -> Tensor:
        return simulate(
            lambda x, t: torch.zeros(*x.shape, VOCABULARY), start, [0.0, 0.4, 1.0], sampler, path=path,
            corrector=1.0, generator=[seeded(row) for row in range(6)],
        )  # fmt: skip

    assert torch.equal(run(path.start(u)), run(path.start(u[:, None]))[:, 0])


def test_callbacks_progress_and_modules() -> None:
    path = MixturePath(4)

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert t.shape == x.shape[:1] and t.dtype == torch.float32
            return torch.zeros(*x.shape, 4)

    seen, bars = [], []

    def callback(index: int, t: Tensor, x: Tensor) -> Tensor | None:
        seen.append((index, float(t)))
        return torch.full_like(x, 4) if index == 0 else None

    def progress(steps):
        bars.append(len(steps))
        return steps

    x = torch.zeros(2, 3, dtype=torch.int64)
    out = simulate(
        Network(), x, [0, 0.5, 1], path=path, callback=callback, progress=progress, generator=seeded()
    )
    assert seen == [(0, 0.5), (1, 1.0)] and bars == [2]
    assert (
        out.shape == x.shape and (out < 4).all() and not torch.equal(out, x)
    )  # x was masked by the callback


def test_no_masks_are_evaluated_that_are_known_and_t_is_the_start_of_a_step() -> None:
    lookup = Lookup(KINDS["mask"], table(2))
    out = simulate(lookup, torch.tensor([[1, 4]]), [0.0, 0.25, 1.0], path=KINDS["mask"], generator=seeded())
    assert lookup.calls == [0.0, 0.25]
    assert out[0, 0] == 1  # what is not masked stays, whatever the network says of it


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 1e-300])
def test_a_low_temperature_takes_the_likeliest_token(temperature: float) -> None:
    path = MixturePath(4, LinearKappa(), UniformSource())
    x = torch.zeros(50, 6, dtype=torch.int64)
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0])
    options = {"path": path, "temperature": temperature, "generator": seeded()}
    assert (simulate(lambda x, t: logits.expand(*x.shape, 4), x, [0, 1], **options) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokens_stay_and_the_rest_is_drawn_given_them(kind: str) -> None:
    path, q = KINDS[kind], table(2)
    x = path.start(torch.rand(SAMPLES, 2, generator=seeded(), dtype=torch.float64))
    x[:, 1] = 2
    known = torch.tensor([False, True]).expand_as(x)
    times = torch.linspace(0, 1, 25 if kind == "mask" else 4, dtype=torch.float64)
    out = simulate(Lookup(path, q), x, times, path=path, corrector=1.0, known=known, generator=seeded(3))
    assert (out[:, 1] == 2).all()
    if kind == "mask":  # exact; with others an approximation, as replacement is
        share = torch.bincount(out[:, 0], minlength=VOCABULARY).double() / SAMPLES
        assert 0.5 * float((share - q[:, 2] / q[:, 2].sum()).abs().sum()) < 0.012


# --- bad input ----------------------------------------------------------------------------------------------------


def uniform_path() -> MixturePath:
    return MixturePath(4, LinearKappa(), UniformSource())


def call(posterior=None, x=None, times=(0, 0.5, 1), sampler="exact", path=None, **options) -> Tensor:
    posterior = posterior or (lambda x, t: torch.zeros(*x.shape, 4))
    x = torch.zeros(2, 3, dtype=torch.int64) if x is None else x
    return simulate(posterior, x, times, sampler, path=path or uniform_path(), generator=seeded(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": lambda x, t: torch.zeros(*x.shape, 8)}, "(?s)vocabulary of 4.*another tokenizer"),
        ({"posterior": lambda x, t: torch.zeros(*x.shape, 5)}, "(?s)step 1 of 2.*vocabulary without it"),
        ({"posterior": lambda x, t: torch.zeros(2, 4, 3)}, "they must be"),
        ({"posterior": lambda x, t: torch.zeros(2, 3, 4, dtype=torch.int64)}, "int64"),
        ({"posterior": lambda x, t: torch.full((2, 3, 4), torch.nan)}, "those of 6 of 6 tokens"),
        ({"posterior": lambda x, t: torch.full((2, 3, 4), -torch.inf)}, "(?s)t = 0 in step 1.*not finite"),
        ({"posterior": lambda x, t: torch.tensor([0.0, torch.inf, 0, 0]).expand(2, 3, 4)}, "not finite"),
        ({"x": torch.full((2, 3), 4)}, "(?s)x holds tokens from 4 to 4.*4 states"),
        ({"x": torch.full((2, 3), -1)}, "from -1 to -1"),
        (
            {"path": MixturePath(4), "x": torch.full((2, 3), 4), "known": torch.ones(2, 3).bool()},
            "x where it is known holds tokens from 4 to 4",
        ),
        ({"x": torch.zeros(2, 3)}, "(?s)float32.*int64"),
        ({"x": torch.tensor(0)}, "x is a single token"),
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"sampler": "halton"}, "(?s)'halton' decides which masks.*has none"),
        ({"sampler": confidence()}, "the sampler decides which masks"),
        ({"corrector": -1.0}, "the corrector is -1.0"),
        ({"corrector_shape": "balance"}, "did you mean 'balanced'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"times": (1.0, 0.0)}, "increase from noise to data"),
        ({"callback": lambda i, t, x: x + 9}, "the callback's x after step 1"),
    ],
)
def test_mistakes_are_named(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(**options)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="pass a bool for each token"):
        call(known=torch.ones(2, 3))
    with pytest.raises(ValueError, match="the callback returned shape"):
        call(callback=lambda i, t, x: x[:1])
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        simulate(
            lambda x, t: torch.zeros(*x.shape, 4), torch.zeros(2, 3).long(), [0, 1], path=uniform_path(),
            generator=[seeded()],
        )  # fmt: skip
    with pytest.raises(UserError, match="noise of the sampler"):
        orders_module.confidence(noise=-1.0)
    with pytest.raises(UserError, match="one or two dimensions"):
        halton_places((2, 2, 2))
