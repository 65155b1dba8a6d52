"""Stochastic solvers hold the marginals of the flow.

For a Gaussian every step is affine in x and in the noise, so the mean and the variance that a solver ends with
are computed exactly, without sampling: x is carried as the row of its coefficients on (1, x_start, z_1, z_2, ...),
and the k-th draw of noise is replaced by the k-th unit vector.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import (
    DIFFUSIONS,
    PATHS,
    SOLVERS,
    CondOT,
    Path,
    Solver,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
    Velocity,
    churn,
    ddpm,
    euler_maruyama,
    integrate,
    langevin,
    stochastic_heun,
    time_grid,
)
from latentflow.flow.solvers import stochastic
from latentflow.flow.solvers.base import schedule

from .closed_forms import Watched, seeded

STOCHASTIC = [name for name, solver in SOLVERS.items() if solver.stochastic]
# Noise that falls 5000-fold, the default of variance exploding, asks for more steps than a test has.
CASES: dict[str, Path] = {name: make() for name, make in PATHS.items()} | {
    "variance-exploding": VarianceExploding(sigma_min=0.05, sigma_max=3.0)
}
MEAN, STD = 1.5, 0.4  # of the fixture ``gaussian``


def moments(path: Path, t: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    a, s = schedule(path, t)
    return a * MEAN, math.hypot(a * STD, s)


def on_coefficients(affine: Velocity) -> Velocity:
    """Apply a function that is affine in x to rows of coefficients."""

    def apply(x: Tensor, t: Tensor) -> Tensor:
        intercept, moved = affine(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t)
        result = (moved - intercept) * x
        result[:, 0] += intercept
        return result

    return apply


@pytest.fixture
def chain(monkeypatch, gaussian):
    """chain(path, times, solver) -> [(t, mean, standard deviation)] after each step, exactly."""

    def run(path, times, solver, velocity=None, score=None, start=None) -> list[tuple[float, float, float]]:
        used = [2]

        def unit_vector(x: Tensor, generator) -> Tensor:
            z = torch.zeros_like(x)
            z[0, used[0]] = 1.0
            used[0] += 1
            return z

        monkeypatch.setattr(stochastic, "normal_like", unit_vector)
        x = torch.zeros(1, 2 + 6 * len(times), dtype=torch.float64)
        x[0, 0], x[0, 1] = start or moments(path, float(times[0]))
        seen: list[tuple[float, float, float]] = []
        integrate(
            on_coefficients(velocity or gaussian.on(path)),
            x,
            times,
            solver,
            path=path,
            score=score and on_coefficients(score),
            callback=lambda i, t, x: seen.append((float(t), float(x[0, 0]), float(x[0, 1:].norm()))),
        )
        return seen

    return run


def error(path: Path, after: tuple[float, float, float]) -> float:
    """Return the error of the mean and the standard deviation at one time, in standard deviations."""
    t, mean, std = after
    exact_mean, exact_std = moments(path, t)
    return max(abs(mean - exact_mean), abs(std - exact_std)) / exact_std


STEPS, TOLERANCE = {0: 60, 1: 120, 2: 60}, {0: 0.08, 1: 0.11, 2: 0.012}  # by order


@pytest.mark.parametrize("path", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_gaussian_marginals(chain, path, solver) -> None:
    """They are held on the whole of every path, at the middle and at the end, forwards and backwards."""
    order = SOLVERS[solver].order
    times = time_grid(STEPS[order])
    for grid in (times, times.flip(0)):
        states = chain(path, grid, solver)
        middle, end = states[len(states) // 2 - 1], states[-1]
        assert (middle[0], end[0]) == (0.5, float(grid[-1]))
        assert max(error(path, middle), error(path, end)) < TOLERANCE[order]


@pytest.mark.parametrize("path", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_gaussian_marginals_of_every_diffusion(chain, monkeypatch, path, diffusion) -> None:
    """Away from the ends, where some are infinite. Without the score term the noise adds up."""
    times = torch.linspace(0.1, 0.9, 61, dtype=torch.float64)
    for grid in (times, times.flip(0)):
        assert error(path, chain(path, grid, euler_maruyama(diffusion, scale=0.8))[-1]) < 0.08
    monkeypatch.setattr(stochastic._Sde, "score_term", lambda *arguments: 0.0)
    assert error(path, chain(path, times, euler_maruyama(diffusion, scale=0.8))[-1]) > 0.16


ORDERS: dict[str, Solver] = {
    **{name: SOLVERS[name] for name in STOCHASTIC if SOLVERS[name].order},
    "euler-maruyama, constant": euler_maruyama("constant"),
    **{f"stochastic-heun, {name}": stochastic_heun(name) for name in DIFFUSIONS},
    "ddpm, eta 1/2": ddpm(0.5),
    "churn, euler": churn(solver=SOLVERS["euler"]),
    "churn, part of the time": churn(amount=3, interval=(0.3, 0.6)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_weak_order(chain, name) -> None:
    """The errors of the first two moments fall with the declared order."""
    solver, path = ORDERS[name], Trigonometric()

    def moment_error(n: int) -> tuple[float, float]:
        t, mean, std = chain(path, torch.linspace(0.2, 0.9, n + 1, dtype=torch.float64), solver)[-1]
        exact_mean, exact_std = moments(path, t)
        return abs(mean - exact_mean), abs(std**2 - exact_std**2)

    coarse, fine = moment_error(40), moment_error(80)
    slopes = [math.log2(c / f) for c, f in zip(coarse, fine, strict=True) if c > 1e-12]
    assert slopes
    assert all(abs(slope - solver.order) <= 0.25 for slope in slopes), slopes


def test_langevin_pulls_a_wrong_marginal_back(chain) -> None:
    """Euler alone would carry it along; the bias that stays is of the order snr^2 = 0.01."""
    path, times = Trigonometric(), torch.linspace(0.2, 0.6, 61, dtype=torch.float64)
    wrong = (0.0, 2.0)
    assert error(path, chain(path, times, "euler", start=wrong)[-1]) > 0.5
    assert error(path, chain(path, times, langevin(5, snr=0.1), start=wrong)[-1]) < 0.01


def test_schrodinger_bridge_with_its_own_score(chain) -> None:
    """N(-2, 1) -> N(2, 1), sigma = 1: its marginals by the SDE and by the ODE, in both directions."""
    root = math.sqrt(5.0)  # sqrt(4 + sigma^4)

    def exact(t):
        return (2 * t - 1) * 2.0, t * (1 - t) * root + (1 - t) ** 2 + t**2

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = exact(t)
        return 4.0 + (1 - 2 * t) * (root - 2) / (2 * variance) * (x - mean)

    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = exact(t)
        return (mean - x) / variance

    times = time_grid(60)
    for solver, tolerance in [(euler_maruyama("constant", 1.0), 1.5e-2), (stochastic_heun("constant"), 2e-4)]:
        for grid in (times, times.flip(0)):
            start = exact(float(grid[0]))[0], 1.0
            states = chain(CondOT(), grid, solver, velocity=velocity, score=score, start=start)
            for t, mean, std in (states[29], states[-1]):
                assert abs(mean - exact(t)[0]) < 1e-12
                assert abs(std**2 - exact(t)[1]) < tolerance


@pytest.mark.parametrize("path", [CondOT(), VariancePreserving()], ids=repr)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_mixture_marginals(mixture, path, solver) -> None:
    """Distance of distributions at the middle and the end: below its mean + 4 standard errors for perfect
    samples, (0.87 + 4 * 0.26) / sqrt(n) = 0.027, and 0.013 of bias."""
    steps, generator, far = 100, seeded(), []

    def watch(i: int, t: Tensor, x: Tensor) -> None:
        if i + 1 in (steps // 2, steps):
            cdf = mixture.cdf(path, x.flatten().sort().values, t)
            far.append(float((cdf - (torch.arange(len(cdf)) + 0.5) / len(cdf)).abs().max()))

    x = path.start(torch.randn(5000, 1, generator=generator, dtype=torch.float64))
    velocity = lambda x, t: mixture.velocity(path, x, path.clip(t))  # noqa: E731
    integrate(velocity, x, time_grid(steps), solver, path=path, callback=watch, generator=generator)
    assert max(far) < 0.04


# ---------------------------------------------------------------- identities


@pytest.fixture
def velocity(mixture):
    return lambda x, t: mixture.velocity(CondOT(), x.double(), t).to(x.dtype)


@pytest.mark.parametrize(
    ("solver", "ode"),
    [
        (euler_maruyama("sbdm", scale=0), "euler"),
        (stochastic_heun(scale=0), "heun"),
        (churn(0), "heun"),
        (churn(10, interval=(1.0, 1.0)), "heun"),
        (churn(0, solver=SOLVERS["rk4"]), "rk4"),
    ],
)
def test_without_noise_it_is_the_ode_solver_bit_for_bit(velocity, draw, solver, ode) -> None:
    generator, before, x = seeded(), seeded().get_state(), draw(64, 2).float()
    for times in (time_grid(11)[:-1], time_grid(11)[:-1].flip(0)):
        ours = integrate(velocity, x, times, solver, generator=generator)
        assert torch.equal(ours, integrate(velocity, x, times, ode))
    assert torch.equal(generator.get_state(), before)


def test_ddim_is_euler(gaussian, draw) -> None:
    """It is, step for step, on the straight path; on any other as Euler on the straight path at matched times."""
    x, times, other = draw(16, 2), time_grid(12), VariancePreserving()
    for straight in (CondOT(sigma_min=0.01), CondOT()):
        flow = gaussian.on(straight)
        for grid in (times, times.flip(0)):
            ddim, euler = (integrate(flow, x, grid, s, path=straight) for s in (ddpm(eta=0), "euler"))
            assert (ddim - euler).abs().max() < 1e-12

    ddim = integrate(
        lambda x, t: gaussian.velocity(other, x, other.clip(t)), x, times[:-1], ddpm(eta=0), path=other
    )
    a, s = other.alpha(times[:-1]), other.sigma(times[:-1])
    euler = integrate(flow, x / (a + s)[0], a / (a + s), "euler")
    assert (ddim / (a + s)[-1] - euler).abs().max() < 1e-9


def test_ddpm_is_the_posterior_as_its_paper_has_it(gaussian, draw) -> None:
    """Ho et al. 2020, eq. 6-7, from the products alpha-bar = alpha^2 and beta = 1 - alpha-bar_t / alpha-bar_s."""
    path, x, t, s = VariancePreserving(), draw(16, 2), 0.4, 0.55
    end = integrate(gaussian.on(path), x, [t, s], ddpm(), path=path, generator=seeded())
    bar_t, bar_s = schedule(path, t)[0] ** 2, schedule(path, s)[0] ** 2
    beta = 1 - bar_t / bar_s
    data = gaussian.ends(path, x, torch.tensor(t, dtype=torch.float64))[0]
    mean = math.sqrt(bar_s) * beta / (1 - bar_t) * data + math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t) * x
    variance = (1 - bar_s) / (1 - bar_t) * beta
    z = torch.randn(x.shape, generator=seeded(), dtype=torch.float64)
    assert (end - (mean + math.sqrt(variance) * z)).abs().max() < 1e-12


def test_a_diffusion_of_ones_own(velocity, draw) -> None:
    x, own = draw(8, 2), euler_maruyama(lambda path, t: path.sigma(t), 2.0)
    table = integrate(velocity, x, time_grid(9), euler_maruyama("sigma", math.sqrt(2.0)), generator=seeded())
    assert (integrate(velocity, x, time_grid(9), own, generator=seeded()) - table).abs().max() < 1e-12


def test_sbdm_is_the_noise_of_the_diffusion() -> None:
    """g^2 on the variance-preserving path is the noise schedule beta."""
    t = torch.linspace(0, 0.99, 9, dtype=torch.float64)
    g_squared = DIFFUSIONS["sbdm"](VariancePreserving(0.1, 20.0), t)
    assert (g_squared - (0.1 + 19.9 * (1 - t))).abs().max() < 1e-12


def test_churn_raises_the_noise_level_by_its_factor_but_not_above_that_of_the_first_time(
    velocity, draw
) -> None:
    for amount, factor in ((1.0, 1.1), (1000.0, math.sqrt(2.0))):  # 1 + amount (0.6 - 0.5), at most sqrt(2)
        watched = Watched(velocity)
        integrate(watched, draw(4, 2), [0.2, 0.5, 0.6], churn(amount))
        first, _, second, _ = watched.times  # two in each step of Heun
        assert first == 0.2
        assert (1 - second) / second == pytest.approx(factor * (1 - 0.5) / 0.5)


def test_composed_solvers_declare_their_evaluations() -> None:
    assert churn(solver=SOLVERS["rk4"]).evaluations == 4
    assert langevin(3, predictor=SOLVERS["heun"]).evaluations == 5
    assert langevin(3, predictor=SOLVERS["dopri5"]).evaluations is None


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: euler_maruyama("sigm"), "(?s)unknown diffusion 'sigm'.*did you mean 'sigma'"),
        (lambda: euler_maruyama(scale=-1.0), "scale -1"),
        (lambda: stochastic_heun(scale=float("nan")), "scale nan"),
        (lambda: ddpm(1.5), "eta 1.5"),
        (lambda: churn(float("nan")), "churn nan"),
        (lambda: churn(interval=(0.6, 0.5)), "interval \\(0.6, 0.5\\)"),
        (lambda: langevin(0), "0 Langevin"),
        (lambda: langevin(snr=1.0), "ratio 1.0"),
    ],
)
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "times", "message"),
    [
        (euler_maruyama("constant"), [1.0, 0.5], r"(?s)score is infinite at t = 1 .*'sigma'.*0\.999"),
        (stochastic_heun("constant"), [0.5, 1.0], "score is infinite at t = 1 "),
        (euler_maruyama("sbdm"), [0.0, 0.5], "(?s)g\\^2 is inf at t = 0 on CondOT.*'ddpm'"),
        (euler_maruyama(lambda path, t: -t), [0.5, 0.6], "g\\^2 is -0.5 at t = 0.5"),
        (euler_maruyama(lambda path, t: t * math.nan), [0.5, 0.6], "g\\^2 is nan at t = 0.5"),
    ],
)
def test_a_score_term_that_is_not_determined_is_named(velocity, draw, solver, times, message) -> None:
    with pytest.raises(UserError, match=message):
        integrate(velocity, draw(4, 2), times, solver)


@pytest.mark.parametrize("diffusion", ["sigma", "linear", "decreasing", "increasing-decreasing", "sbdm"])
def test_the_score_term_has_its_limit_at_the_data(velocity, draw, diffusion) -> None:
    """At t = 1, sigma = 0: as a step that starts just before."""
    x = draw(64, 2)
    at, before = (
        integrate(velocity, x, [t, 0.9], euler_maruyama(diffusion), generator=seeded())
        for t in (1.0, 1.0 - 1e-5)
    )
    assert (at - x).abs().max() > 1e-3
    assert (at - before).abs().max() < 1e-2


def test_a_bad_score_is_named(velocity, draw) -> None:
    x, solver = draw(4, 2), euler_maruyama("constant")
    with pytest.raises(ValueError, match=r"the score returned shape \(4, 1\)"):
        integrate(velocity, x, [0, 0.5], solver, score=lambda x, t: x[:, :1])
    with pytest.raises(UserError, match=r"the score at t = 0 is not finite"):
        integrate(velocity, x, [0, 0.5], solver, score=lambda x, t: x / 0)
    for name in ("ddpm", "churn"):
        with pytest.raises(UserError, match=f"'{name}'.*no separate score"):
            integrate(velocity, x, [0, 0.5], name, score=lambda x, t: x)
