from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from latentflow.errors import UserError
from latentflow.flow import (
    DDPM,
    CondOT,
    Path,
    Polynomial,
    SqrtPath,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from latentflow.flow.tensors import expand_t


def test_derivatives_are_those_of_the_schedules(path) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for value, slope in (
        (path.alpha, path.d_alpha), (path.sigma, path.d_sigma), (path.log_snr, path.d_log_snr),
    ):  # fmt: skip
        difference = (value(t + 1e-6) - value(t - 1e-6)) / 2e-6
        torch.testing.assert_close(slope(t), difference, atol=1e-7, rtol=1e-7)


def test_schedules_are_shaped_like_t_and_finite_at_both_ends(path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for t in (torch.tensor(0.3), torch.tensor([0.0, 0.5, 1.0]), torch.zeros(2, 1, 1)):
            t = t.to(dtype)
            for schedule in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
                value = schedule(t)
                assert value.shape == t.shape
                assert value.dtype == t.dtype
                infinite = schedule == path.d_sigma and isinstance(path, (VariancePreserving, SqrtPath, DDPM))
                assert torch.equal(value.isfinite(), ~((t == 1) & infinite))
                assert not value.isnan().any()


def test_alpha_grows_and_sigma_falls_between_the_right_ends(path) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (path.alpha(t).diff() >= 0).all()
    assert (path.sigma(t).diff() < 0).all()
    ends = torch.stack([path.alpha(t[[0, -1]]), path.sigma(t[[0, -1]])], dim=1).tolist()
    noisy = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).prod().item()  # alpha-bar of DDPM
    truth = {
        "CondOT": [[0.0, 1.0], [1.0, getattr(path, "sigma_min", None)]],
        "VariancePreserving": [[math.exp(-10.05 / 2), math.sqrt(1 - math.exp(-10.05))], [1.0, 0.0]],
        "VarianceExploding": [[1.0, 50.0], [1.0, 0.01]],
        "DDPM": [[math.sqrt(noisy), math.sqrt(1 - noisy)], [1.0, 0.0]],
    }.get(type(path).__name__, [[0.0, 1.0], [1.0, 0.0]])
    for end, expected in zip(ends, truth, strict=True):
        assert end == pytest.approx(expected, rel=1e-12, abs=0)  # abs = 0: what is 0 is exactly 0
    assert torch.equal(path.start(torch.ones(2, 3)), torch.full((2, 3), truth[0][1]))


@pytest.mark.parametrize(
    ("path", "x0", "x1", "t", "xt", "velocity"),
    [
        (CondOT(), 2.0, 10.0, 0.25, 4.0, 8.0),
        (CondOT(sigma_min=0.5), 2.0, 10.0, 0.5, 6.5, 9.0),  # 0.5 x1 + 0.75 x0
        (Polynomial(3.0), 2.0, 10.0, 0.5, 3.0, 6.0),  # 1/8 x1 + 7/8 x0, 3/4 (x1 - x0)
        (SqrtPath(), 0.5, 1.0, 0.6, 1.0, 0.625),
    ],
)
def test_samples_by_hand(path, x0, x1, t, xt, velocity) -> None:
    x0, x1, time = (torch.tensor([value], dtype=torch.float64) for value in (x0, x1, t))
    sample = path.sample(x0, x1, time)
    assert (sample.xt.item(), sample.velocity.item()) == pytest.approx((xt, velocity), abs=1e-14)
    assert sample.x0 is x0 and sample.x1 is x1 and sample.t.tolist() == [t]


@pytest.mark.parametrize("path", [VariancePreserving(), Trigonometric(), SqrtPath()])
def test_circular_paths_keep_the_variance(path) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    total = path.alpha(t) ** 2 + path.sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), atol=1e-15, rtol=0)


def test_a_network_sees_data_whose_scale_does_not_explode(path, draw) -> None:
    xt, t = draw(3, 2), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    exploding = isinstance(path, VarianceExploding)
    expected = xt / (1 + path.sigma(t) ** 2).sqrt()[:, None] if exploding else xt
    torch.testing.assert_close(path.scale_input(xt, t), expected)
    assert path.scale_input(xt.bfloat16(), t).dtype == torch.bfloat16


def test_variance_preserving_is_the_limit_of_discrete_diffusion() -> None:
    steps = 200_000
    kept = (1 - torch.linspace(0.1, 20.0, steps, dtype=torch.float64) / steps).cumprod(0)  # alpha-bar
    t = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(VariancePreserving().alpha(t) ** 2, kept, atol=0, rtol=2e-3)


def test_variance_exploding_is_geometric() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    sigma = VarianceExploding(sigma_min=0.1, sigma_max=1000.0).sigma(t)
    torch.testing.assert_close(sigma, torch.tensor([1000.0, 100.0, 10.0, 1.0, 0.1], dtype=torch.float64))


def test_log_snr_is_its_definition_and_its_inverse_inverts_it(path) -> None:
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    value = path.log_snr(t)
    torch.testing.assert_close(value, (path.alpha(t) ** 2 / path.sigma(t) ** 2).log(), atol=1e-9, rtol=0)
    torch.testing.assert_close(path.inverse_log_snr(value), t, atol=1e-9, rtol=0)
    assert path.inverse_log_snr(value[0].float()).dtype == torch.float32


def test_inverse_log_snr_far_out_and_beyond_the_range(path) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    infinity = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for beyond in (infinity, torch.tensor([-1e4, 1e4], dtype=torch.float64), infinity.float()):
        assert torch.equal(path.inverse_log_snr(beyond), ends.to(beyond.dtype))
    first, last = path.log_snr(ends).tolist()
    assert first < last
    assert (path.d_log_snr(ends) > 0).all()  # +infinity is allowed, NaN is not
    value = torch.linspace(max(first, -60.0), min(last, 16.0), 200, dtype=torch.float64)
    torch.testing.assert_close(path.log_snr(path.inverse_log_snr(value)), value, atol=1e-7, rtol=0)
    bisected = Path.inverse_log_snr(path, value)  # what a path without a closed form has
    torch.testing.assert_close(path.inverse_log_snr(value), bisected, atol=1e-9, rtol=0)


def test_derivatives_are_clipped_in_one_place_and_nothing_else_is(path) -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    c, inner = path.at(t, x), path.clip(t)
    exact = path.alpha(t), path.sigma(t), path.d_alpha(inner), path.d_sigma(inner)
    assert all(torch.equal(found[:, 0], value) for found, value in zip(c, exact, strict=True))
    assert (inner - t).abs().max() <= 1e-4
    assert (inner[1], *path.interval) == (0.5, inner[0], inner[2])


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 2, 4, 4)])
def test_t_belongs_to_rows_even_where_batch_equals_width(path, shape, draw) -> None:
    x0, x1, t = draw(*shape), draw(*shape), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    together = path.sample(x0, x1, t)
    assert together.xt.shape == together.velocity.shape == shape
    for row in range(4):
        alone = path.sample(x0[row : row + 1], x1[row : row + 1], float(t[row]))
        torch.testing.assert_close(together.xt[row : row + 1], alone.xt, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(together.velocity[row : row + 1], alone.velocity, atol=1e-14, rtol=1e-14)


def test_expand_t_shapes() -> None:
    x = torch.zeros(4, 2, 4, 4)
    assert expand_t(0.5, x).shape == ()
    assert expand_t(torch.rand(4), x).shape == (4, 1, 1, 1)
    assert expand_t(torch.rand(4), torch.zeros(4)).shape == (4,)
    assert expand_t(torch.rand(4, dtype=torch.float64), x).dtype == torch.float64
    assert expand_t(torch.rand(4).bfloat16(), x).dtype == torch.float32
    for shape in ((3,), (4, 1), (1, 4), (4, 1, 1, 1), (2, 4)):
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            expand_t(torch.full(shape, 0.5), x)


@pytest.mark.parametrize("t", [-0.01, 1.01, 999.0, float("nan"), torch.tensor([0.5, 0.5, 0.5, 2.0])])
def test_misfits_are_refused(t) -> None:
    x = torch.zeros(4, 2, 4, 4)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        CondOT().sample(x, x, t)
    with pytest.raises(ValueError, match=r"x0 has shape \(1, 2\) but x1 has shape \(3, 2\)"):
        CondOT().sample(torch.zeros(1, 2), torch.zeros(3, 2), 0.5)


@pytest.mark.parametrize(
    "settings", [{}, {"steps": 10}, {"beta_start": 0.02}, {"beta_start": 8.5e-4, "beta_end": 0.012}]
)
def test_ddpm_is_discrete_diffusion_at_its_timesteps(settings) -> None:
    """As diffusers' scheduler has it, at every timestep."""
    path = DDPM(**settings)
    count = int(path.steps)
    scheduler = DDPMScheduler(count, path.beta_start, path.beta_end)
    kept = (1 - torch.linspace(path.beta_start, path.beta_end, count, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(kept.float(), scheduler.alphas_cumprod, atol=0, rtol=5e-5)
    t = 1 - torch.arange(1, count + 1, dtype=torch.float64) / count
    torch.testing.assert_close(path.alpha(t), kept.sqrt(), atol=0, rtol=1e-10)
    torch.testing.assert_close(path.sigma(t), (1 - kept).sqrt(), atol=0, rtol=2e-9)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("path", "settings", "name"),
    [
        *((CondOT, (value,), "sigma_min") for value in (-0.1, 1.0, NAN)),
        *((Polynomial, (value,), "degree") for value in (0.5, NAN, INFINITY)),
        *((VariancePreserving, pair, "beta_min") for pair in ((0.0, 20.0), (3.0, 2.0), (0.1, INFINITY))),
        *((VarianceExploding, pair, "sigma_min") for pair in ((0.0, 50.0), (1.0, 1.0), (0.01, INFINITY))),
        *((DDPM, pair, "beta_start") for pair in ((0.0, 0.02), (0.3, 0.2), (0.1, 1.0))),
    ],
)
def test_settings_out_of_range_are_refused(path, settings, name) -> None:
    with pytest.raises(UserError, match=rf"{name} .* not {' and '.join(map(str, settings))}\nUsual values"):
        path(*settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_keep_their_dtype_and_are_calculated_in_float32_or_better(path, dtype, draw) -> None:
    x0, x1 = draw(64, 8).to(dtype), draw(64, 8).to(dtype)
    t = torch.linspace(0, 1, 64, dtype=torch.float64)  # does not promote the sample
    sample = path.sample(x0, x1, t)
    wide = torch.promote_types(dtype, torch.float32)
    for value, expected in zip(sample[:2], path.sample(x0.to(wide), x1.to(wide), t)[:2], strict=True):
        assert value.dtype == dtype and value.isfinite().all()
        assert torch.equal(value, expected.to(dtype))
    assert path.sample(x0, x1, t.to(dtype)).velocity.isfinite().all()


@pytest.mark.parametrize("t", [0.1, 0.35, 0.6, 0.9])
def test_continuity_equation(path, t, mixture) -> None:
    """dp/dt + d(p u)/dx = 0 by central differences; their error is about 1e-8 of the largest dp/dt."""
    time = torch.tensor(t, dtype=torch.float64)
    x = torch.linspace(-8.0, 8.0, 801).double() * torch.hypot(path.alpha(time), path.sigma(time))
    h, width = 1e-5, 1e-5 * path.sigma(time)

    def flux(x):
        return mixture.log_density(path, x, time).exp() * mixture.velocity(path, x, time)

    later, earlier = (mixture.log_density(path, x, time + step).exp() for step in (h, -h))
    growth = (later - earlier) / (2 * h)
    divergence = (flux(x + width) - flux(x - width)) / (2 * width)
    scale = growth.abs().max().item()
    torch.testing.assert_close(growth, -divergence, atol=1e-6 * scale, rtol=0)
