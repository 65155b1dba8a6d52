from __future__ import annotations

import itertools

import pytest
import torch

from latentflow.errors import UserError
from latentflow.flow import PREDICTIONS, CondOT, convert

PATHS = [pytest.param(CondOT(), id="condot"), pytest.param(CondOT(sigma_min=0.1), id="sigma-min")]


def exact(mixture, path, x, t) -> dict[str, torch.Tensor]:
    """All four predictions at x (B, D) and t (B,), none of them made from another."""
    rows = t[:, None]
    data, noise = mixture.ends(path, x, rows)
    return {
        "velocity": mixture.velocity(path, x, rows),
        "data": data,
        "noise": noise,
        "score": mixture.score(path, x, rows),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("source", "target"), [*itertools.product(PREDICTIONS, PREDICTIONS)])
def test_conversions_agree_on_a_mixture(mixture, draw, path, source, target) -> None:
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    x = 2 * draw(25, 25)  # B == width: a t along the wrong dimension cannot hide
    truth = exact(mixture, path, x, t)
    torch.testing.assert_close(
        convert(truth[source], x, t, path, source, target), truth[target], atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", ["data", "noise"])
def test_velocity_gives_both_ends_of_the_path_at_both_ends_of_time(mixture, draw, path, target) -> None:
    x, t = draw(2, 5), torch.tensor([0.0, 1.0], dtype=torch.float64)
    truth = exact(mixture, path, x, t)
    torch.testing.assert_close(convert(truth["velocity"], x, t, path, "velocity", target), truth[target])


def test_all_sixteen_are_finite_at_both_ends_where_the_path_keeps_noise_and_data_apart(mixture, draw) -> None:
    path, x, t = CondOT(sigma_min=0.1), draw(1, 5), torch.tensor([1.0], dtype=torch.float64)
    truth = exact(mixture, path, x, t)
    for source, target in itertools.product(PREDICTIONS, PREDICTIONS):
        torch.testing.assert_close(convert(truth[source], x, t, path, source, target), truth[target])


@pytest.mark.parametrize(
    ("t", "source", "target", "divisor"),
    [
        (1.0, "velocity", "score", "sigma"),
        (1.0, "data", "velocity", "sigma"),
        (1.0, "data", "noise", "sigma"),
        (0.0, "noise", "velocity", "alpha"),
        (0.0, "score", "data", "alpha"),
    ],
)
def test_what_is_not_determined_is_refused(t, source, target, divisor) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"divides by {divisor}, which is 0"):
        convert(x, x, t, CondOT(), source, target)


def test_noise_and_score_need_no_data_at_t_0() -> None:
    x = torch.full((2, 3), 2.0)
    assert torch.equal(convert(x, x, 0.0, CondOT(), "noise", "score"), -x)
    assert torch.equal(convert(-x, x, 0.0, CondOT(), "score", "noise"), x)


def test_half_precision_keeps_its_dtype_and_is_calculated_in_float32(draw) -> None:
    value, x, t = (
        draw(4, 4).bfloat16(),
        draw(4, 4).bfloat16(),
        torch.rand(4, dtype=torch.float64) * 0.5 + 0.25,
    )
    half = convert(value, x, t, CondOT(), "velocity", "score")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, convert(value.float(), x.float(), t, CondOT(), "velocity", "score").bfloat16())


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(UserError, match=r"(?s)unknown prediction 'velocty'.*did you mean 'velocity'"):
        convert(x, x, 0.5, CondOT(), "velocty", "data")
    with pytest.raises(
        UserError, match=r"(?s)unknown prediction 'epsilon'.*Choices: velocity, data, noise, score"
    ):
        convert(x, x, 0.5, CondOT(), "velocity", "epsilon")
    with pytest.raises(ValueError, match=r"\(2, 3\) but xt has shape \(2, 1\)"):
        convert(x, x[:, :1], 0.5, CondOT(), "velocity", "data")
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        convert(x, x, 500, CondOT(), "velocity", "data")
