from __future__ import annotations

import math

import numpy
import pytest
import scipy.optimize
import scipy.stats
import torch

from latentflow.errors import UserError
from latentflow.flow import (
    PREDICTIONS,
    WEIGHTINGS,
    Beta,
    CondOT,
    LogitNormal,
    Mode,
    Trigonometric,
    UniformTimes,
    convert,
    loss_factor,
    make,
)

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
LAMBDA = torch.linspace(-8, 8, 33, dtype=torch.float64)


def weighting(name, **options):
    return make(WEIGHTINGS, name, "weighting", **options)


def sech(x):
    return 1 / numpy.cosh(x)


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("flow-matching", {}, lambda x: numpy.exp(-x / 2)),
        ("cosine-velocity", {}, lambda x: numpy.exp(-x / 2)),
        ("cosine-noise", {}, lambda x: sech(x / 2)),
        ("edm", {}, lambda x: scipy.stats.norm.pdf(x, 2.4, 2.4) * (numpy.exp(-x) + 0.5**2) / 0.5**2),
        (
            "edm",
            {"mean": 0.4, "std": 0.7, "sigma_data": 1},
            lambda x: scipy.stats.norm.pdf(x, -0.8, 1.4) * (numpy.exp(-x) + 1),
        ),
        *(
            # Its training loop: log sigma ~ N(-1.2, 1.2^2), sigma = e^(-x/2), the data's squared error times
            # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; an error e of the data is one of e / sigma of the noise.
            (
                "edm",
                {"sigma_data": s},
                lambda x, s=s: (numpy.exp(-x) + s**2) / s**2 * scipy.stats.norm.pdf(-x / 2, -1.2, 1.2) / 2,
            )
            for s in (0.5, 1.0)
        ),
        ("min-snr", {}, lambda x: sech(x / 2) * numpy.minimum(1, 5 * numpy.exp(-x))),
        ("min-snr", {"gamma": 1}, lambda x: sech(x / 2) * numpy.minimum(1, numpy.exp(-x))),
        ("sigmoid", {}, lambda x: 1 / (1 + numpy.exp(x - 2))),
        ("sigmoid", {"bias": -1}, lambda x: 1 / (1 + numpy.exp(x + 1))),
        ("likelihood", {}, lambda x: 1.0 + 0 * x),
        (
            "sd3",
            {"mean": 0.5, "std": 0.8},
            # In t, their weight t/(1-t) and their density, turned round: t / (1 - t) is ours inverted.
            lambda x: (
                numpy.exp(-x / 2)
                * scipy.stats.norm.pdf(x / 2, 0.5, 0.8)
                / (1 / (1 + numpy.exp(-x / 2)) * (1 / (1 + numpy.exp(x / 2))))
            ),
        ),
    ],
)
def test_formulas_of_the_papers(name, options, formula) -> None:
    expected = formula(LAMBDA.numpy()).reshape(3, 11)
    numpy.testing.assert_allclose(weighting(name, **options)(LAMBDA.reshape(3, 11)), expected, rtol=1e-12)


def test_plain_losses_are_what_their_weightings_say() -> None:
    """A weighting that is named after a plain loss has a constant factor on that very setting."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    density = LogitNormal(0.4, 0.8)
    factor = loss_factor(weighting("flow-matching"), CondOT(), "velocity", torch.linspace(0, 1, 101))
    torch.testing.assert_close(factor, torch.ones_like(factor), atol=1e-10, rtol=0)  # at the ends too
    sd3 = weighting("sd3", mean=0.4, std=0.8)
    factor = loss_factor(sd3, CondOT(), "velocity", density.quantile(u), density.slope(u))
    torch.testing.assert_close(factor, torch.ones_like(factor), atol=1e-10, rtol=0)
    # The trigonometric path is the cosine schedule: e.g. lambda = 2 log tan(pi t / 2), |lambda'| = 2 pi / sin(pi t).
    factor = loss_factor(weighting("cosine-velocity"), Trigonometric(), "velocity", u)
    torch.testing.assert_close(factor, torch.full_like(factor, 2 / math.pi), atol=1e-10, rtol=0)
    factor = loss_factor(weighting("cosine-noise"), Trigonometric(), "noise", u)
    torch.testing.assert_close(factor, torch.full_like(factor, math.pi), atol=1e-10, rtol=0)
    factor = loss_factor(weighting("min-snr", gamma=5.0), Trigonometric(), "data", u)
    snr = torch.exp(Trigonometric().log_snr(u))
    torch.testing.assert_close(factor, math.pi * snr.clamp(max=5.0), atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_of_any_prediction_is_the_weighted_error_of_its_noise(path, prediction, draw) -> None:
    xt, right, wrong = draw(len(T), 3), draw(len(T), 3), draw(len(T), 3)
    noises = [convert(value, xt, T, path, prediction, "noise") for value in (right, wrong)]
    for name in WEIGHTINGS:
        w = weighting(name)
        noise_error = (noises[0] - noises[1]).square().mean(1)
        expected = 0.5 * w(path.log_snr(T)) * path.d_log_snr(T) * noise_error
        error = loss_factor(w, path, prediction, T) * (right - wrong).square().mean(1)
        torch.testing.assert_close(error, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_factors_are_finite_up_to_the_ends(path, prediction) -> None:
    u = torch.tensor([0.0, 1e-300, 1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12, 1.0], dtype=torch.float64)
    for density in (UniformTimes(), Mode(), Beta(), LogitNormal()):
        t = density.quantile(u)
        for name in WEIGHTINGS:
            factor = loss_factor(weighting(name), path, prediction, t, density.slope(u))
            assert factor.isfinite().all(), (name, density)
            assert (factor >= 0).all()


def test_shapes_and_precision() -> None:
    w, path = weighting("sigmoid"), CondOT()
    rows = loss_factor(w, path, "data", T.float())
    assert rows.dtype == torch.float64 and rows.shape == T.shape
    single = loss_factor(w, path, "data", T.float()[3])
    assert single.shape == () and single == rows[3]
    assert torch.equal(loss_factor(w, path, "data", T.float(), 2.0), 2 * rows)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min_snr", {}, "(?s)unknown weighting 'min_snr'.*did you mean 'min-snr'"),
        ("likelihood", {"gamma": 5}, "option 'gamma' of weighting 'likelihood'"),
        *(
            (name, {option: bad}, f"{option} of the weighting is {bad}")
            for name, option, bad in (
                ("min-snr", "gamma", 0.0), ("edm", "std", -1.0), ("edm", "sigma_data", 0.0), ("edm", "mean", math.inf),
                ("sd3", "std", math.nan), ("sd3", "mean", math.nan), ("sigmoid", "bias", math.inf),
            )
        ),
    ],
)  # fmt: skip
def test_bad_weightings_are_named(name, options, message) -> None:
    with pytest.raises(UserError, match=message):
        weighting(name, **options)


def test_bad_factors_are_named() -> None:
    w = weighting("likelihood")
    with pytest.raises(UserError, match=r"(?s)unknown prediction 'epsilon'.*velocity"):
        loss_factor(w, CondOT(), "epsilon", T)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            loss_factor(w, CondOT(), "velocity", torch.tensor([0.5, bad]))
