from __future__ import annotations

import math

import numpy
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from latentflow.errors import UserError
from latentflow.flow import (
    TIME_DENSITIES,
    TIME_GRIDS,
    Beta,
    CosineMap,
    LogitNormal,
    Mode,
    Power,
    UniformTimes,
    make,
    time_grid,
)
from latentflow.flow.times import shifted

U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
DENSITIES = [
    *(density() for density in TIME_DENSITIES.values()), *(density(shift=3.0) for density in TIME_DENSITIES.values()),
    LogitNormal(0.7, 0.5), Mode(-1.0), Mode(0.5, shift=0.4), Mode(1.7), Beta(3.0, 0.8, shift=1.5), Power(0.6),
]  # fmt: skip


def reference(density):
    """The density in t as its paper or textbook prints it, in our direction of t (1 is data)."""
    match density:
        case UniformTimes():
            return lambda t: 1.0
        case LogitNormal(mean=m, std=s):
            return lambda t: scipy.stats.norm.pdf(scipy.special.logit(t), m, s) / (t * (1 - t))
        case CosineMap():
            return lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
        case Beta(a=a, b=b):
            return lambda t: t ** (a - 1) * (1 - t) ** (b - 1) / scipy.special.beta(a, b)
        case Power(exponent=p):
            return lambda t: p * t ** (p - 1)
    return None


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_quantiles_increase_into_the_unit_interval(density) -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64).reshape(7, 143)
    t = density.quantile(u)
    assert (t.flatten().diff() > 0).all() and t[0, 0] == 0 and t[-1, -1] == 1
    slope = density.slope(u)
    assert slope.isfinite().all() and (slope >= 0).all()
    assert t.shape == slope.shape == u.shape
    # float32 numbers are widened
    assert t.dtype == slope.dtype == density.quantile(torch.rand(3)).dtype == torch.float64
    for bad in (-0.1, 1.1, math.nan):
        for method in (density.quantile, density.slope):
            with pytest.raises(ValueError, match=r"uniform numbers in \[0, 1\]"):
                method(torch.tensor([0.5, bad]))


@pytest.mark.parametrize("density", DENSITIES, ids=repr)
def test_the_slope_is_the_derivative_of_the_quantile(density) -> None:
    h = 1e-6
    difference = (density.quantile(U + h) - density.quantile(U - h)) / (2 * h)
    torch.testing.assert_close(density.slope(U), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("density", [d for d in DENSITIES if reference(d)], ids=repr)
def test_one_over_the_slope_is_the_density_of_the_paper(density) -> None:
    pdf, s = reference(density), density.shift
    t = density.quantile(U).numpy()
    plain = s * t / (1 + (s - 1) * t)  # the t before the shift
    change = s / (1 + (s - 1) * t) ** 2
    numpy.testing.assert_allclose(1 / density.slope(U).numpy(), pdf(plain) * change, rtol=1e-9)
    assert scipy.integrate.quad(pdf, 0, 1)[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.81, 1.29, 1.75])
def test_mode_is_that_of_sd3_with_t_turned_round(scale) -> None:
    theirs = 1 - U - scale * (torch.cos(math.pi / 2 * U) ** 2 - 1 + U)  # 1 is noise
    torch.testing.assert_close(Mode(scale).quantile(U), 1 - theirs, atol=1e-14, rtol=0)


def test_shifts_multiply() -> None:
    torch.testing.assert_close(shifted(shifted(U, 2.0), 3.0), shifted(U, 6.0), atol=1e-15, rtol=0)
    assert torch.equal(UniformTimes().quantile(U), U)  # without a shift not a bit is changed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logit_normal", {}, r"(?s)unknown time density 'logit_normal'.*did you mean 'logit-normal'"),
        ("uniform", {"mean": 0.0}, r"(?s)unknown option of time density 'uniform': 'mean'.*shift"),
        ("logit-normal", {"std": 0.0}, "std of the logit-normal density is 0"),
        ("logit-normal", {"mean": float("nan")}, "mean of the logit-normal density is nan"),
        ("mode", {"scale": 1.8}, "scale 1.8 of the mode density"),
        ("mode", {"scale": -1.1}, "scale -1.1 of the mode density"),
        ("beta", {"a": 0.0}, "a of the beta density is 0"),
        ("beta", {"b": -1.0}, "b of the beta density is -1"),
        ("power", {"exponent": float("inf")}, "exponent of the power density is inf"),
        ("cosine-map", {"shift": 0.0}, "time shift is 0"),
    ],
)
def test_bad_densities_are_named(name, options, message) -> None:
    with pytest.raises(UserError, match=message):
        make(TIME_DENSITIES, name, "time density", **options)


@pytest.mark.parametrize("kind", TIME_GRIDS)
@pytest.mark.parametrize("shift", [0.3, 1.0, 7.7])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_grids_run_from_0_to_1_and_are_shifted_as_in_sd3(kind, shift, steps) -> None:
    grid = time_grid(steps, shift, kind)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    sigma = 1 - time_grid(steps, kind=kind)
    torch.testing.assert_close(1 - grid, shift * sigma / (1 + (shift - 1) * sigma), atol=1e-14, rtol=0)
    assert torch.equal(time_grid(steps), torch.linspace(0, 1, steps + 1, dtype=torch.float64))


@pytest.mark.parametrize(("rho", "low", "high"), [(7.0, 0.002, 80.0), (3.0, 0.01, 50.0)])
def test_the_edm_grid_has_the_levels_of_its_paper(rho, low, high) -> None:
    n = 18
    i = numpy.arange(n)
    levels = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    grid = time_grid(n, kind="edm", rho=rho, sigma_min=low, sigma_max=high).numpy()
    numpy.testing.assert_allclose((1 - grid[1:-1]) / grid[1:-1], levels[1:], rtol=1e-12)
    assert levels[0] == pytest.approx(high)


def test_the_cosine_grid_takes_equal_steps_of_the_angle() -> None:
    grid = time_grid(10, kind="cosine")
    angle = torch.atan2(grid, 1 - grid)
    torch.testing.assert_close(angle.diff(), torch.full((10,), math.pi / 20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"steps": n}, f"the number of sampling steps is {n!r}") for n in (0, 2.5, "4", True, 10**9)),
        ({"steps": 10, "shift": 0.0}, "time shift is 0"),
        ({"steps": 10, "shift": float("nan")}, "time shift is nan"),
        ({"steps": 10, "kind": "cosin"}, "(?s)unknown time grid 'cosin'.*did you mean 'cosine'"),
        ({"steps": 10, "kind": "edm", "roh": 7}, "(?s)unknown option of time grid 'edm': 'roh'.*mean 'rho'"),
        ({"steps": 10, "kind": "edm", "rho": 0.0}, "rho of the EDM grid is 0"),
        ({"steps": 10, "kind": "edm", "sigma_min": 0.0}, "noise levels 0.0 to 80.0"),
        ({"steps": 10, "kind": "edm", "sigma_max": 0.001}, "noise levels 0.002 to 0.001"),
        ({"steps": 10, "rho": 7.0}, "(?s)unknown option of time grid 'uniform': 'rho'"),
    ],
)
def test_bad_grids_are_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        time_grid(**arguments)
