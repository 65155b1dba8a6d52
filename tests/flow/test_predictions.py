from __future__ import annotations

import itertools

import pytest
import torch

from latentflow.errors import UserError
from latentflow.flow import (
    PREDICTIONS,
    CondOT,
    Polynomial,
    SqrtPath,
    VariancePreserving,
    as_velocity,
    change_path,
    convert,
    integrate,
)

from .closed_forms import EVERY_PATH

EVERY_PAIR = [
    pytest.param(old, new, id=f"{first}-to-{second}")
    for (first, old), (second, new) in itertools.permutations(EVERY_PATH.items(), 2)
]


#: kind -> (mixture, path, x, t broadcast against x) -> the exact prediction; none is made from another
EXACT = {
    "velocity": lambda mixture, *where: mixture.velocity(*where),
    "data": lambda mixture, *where: mixture.ends(*where)[0],
    "noise": lambda mixture, *where: mixture.ends(*where)[1],
    "score": lambda mixture, *where: mixture.score(*where),
}


def exact(mixture, path, x, t) -> dict[str, torch.Tensor]:
    """All four predictions at x (B, D) and t (B,)."""
    return {kind: make(mixture, path, x, t[:, None]) for kind, make in EXACT.items()}


@pytest.mark.parametrize("source", PREDICTIONS)
def test_predictions_of_a_mixture_are_one_another(mixture, draw, path, source) -> None:
    """They are converted by `convert`, and as the velocity of a network."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    if isinstance(path, Polynomial):
        t = t.clamp(min=0.08)  # earlier, alpha < 1 / 200
    x = 2 * draw(25, 25)  # B == width: a t along the wrong dimension cannot hide
    truth = exact(mixture, path, x, t)
    for target in PREDICTIONS:
        torch.testing.assert_close(
            convert(truth[source], x, t, path, source, target), truth[target], atol=1e-8, rtol=1e-8
        )
    velocity = as_velocity(
        lambda x, t: EXACT[source](mixture, path, x, t.expand(len(x))[:, None]), path, source
    )
    torch.testing.assert_close(velocity(x, t), truth["velocity"], atol=1e-8, rtol=1e-8)


def determined(path, t: float, source: str, target: str) -> bool:
    """Return True if ``source`` at the end ``t`` of the path determines ``target`` there."""
    end = torch.tensor(t, dtype=torch.float64)
    if source == target:
        return True
    if t == 0.0:
        needs_alpha = {"noise": ("data", "velocity"), "score": ("data", "velocity")}
        if isinstance(path, Polynomial) and "velocity" in (source, target):
            return False  # it vanishes, and is clipped
        return path.alpha(end) > 0 or target not in needs_alpha.get(source, ())
    if path.d_sigma(end).isinf() and "velocity" in (source, target):
        return False  # sigma' E[x0 | x] is infinity times 0
    return path.sigma(end) > 0 or (source != "data" and target != "score")


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_conversions_agree_at_the_ends_where_they_are_determined(mixture, draw, path, t) -> None:
    x, time = 2 * draw(3, 5), torch.full((3,), t, dtype=torch.float64)
    truth = exact(mixture, path, x, time)
    pairs = [pair for pair in itertools.product(PREDICTIONS, PREDICTIONS) if determined(path, t, *pair)]
    assert len(pairs) >= 7
    for source, target in pairs:
        torch.testing.assert_close(
            convert(truth[source], x, time, path, source, target), truth[target], atol=1e-8, rtol=1e-8
        )
    # The velocity of ``sample`` holds both ends of the path at every t, clipped derivatives or not.
    x0, x1 = draw(3, 5), draw(3, 5)
    sample = path.sample(x0, x1, t)
    for target, end in (("data", x1), ("noise", x0)):
        found = convert(sample.velocity, sample.xt, t, path, "velocity", target)
        torch.testing.assert_close(found, end, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("t", "source", "target", "divisor"),
    [
        (1.0, "velocity", "score", "sigma"),
        (1.0, "noise", "score", "sigma"),
        (1.0, "data", "score", "sigma"),
        (1.0, "data", "velocity", "sigma"),
        (1.0, "data", "noise", "sigma"),
        (0.0, "noise", "velocity", "alpha"),
        (0.0, "score", "data", "alpha"),
    ],
)
def test_what_is_not_determined_is_refused(path, t, source, target, divisor) -> None:
    """The conversion divides by 0 on every path whose alpha or sigma is 0 there; elsewhere it is finite."""
    x = torch.ones(2, 3)
    if getattr(path, divisor)(torch.tensor(t)) > 0:
        assert convert(x, x, t, path, source, target).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"divides by {divisor}, which is 0"):
            convert(x, x, t, path, source, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 2, 4, 4)])
def test_half_precision_is_calculated_in_float32_and_t_belongs_to_rows(draw, dtype, shape, path) -> None:
    seen = []

    def network(x, t):
        seen.append((x.dtype, x.shape, t.shape))
        return torch.full_like(x, 3.0)

    x, t = draw(*shape).to(dtype), torch.linspace(0.25, 0.75, 4, dtype=torch.float64)
    for function in (
        change_path(network, path, SqrtPath()),
        as_velocity(network, path, "noise"),
        *(
            lambda x, t, pair=pair: convert(torch.full_like(x, 3.0), x, t, path, *pair)
            for pair in itertools.permutations(PREDICTIONS, 2)
        ),
    ):
        half = function(x, t)
        assert half.dtype == dtype and half.shape == shape
        assert torch.equal(half, function(x.float(), t).to(dtype))
        for row in range(4):
            torch.testing.assert_close(half[row : row + 1], function(x[row : row + 1], t[row]))
    assert seen[0] == seen[6] == (dtype, shape, t.shape)


@pytest.mark.parametrize("source", PREDICTIONS)
def test_a_network_of_any_prediction_samples_from_end_to_end(gaussian, draw, path, source) -> None:
    """Heun evaluates both ends of time. The exact map is affine: x at 1 = m + c (x at 0 - alpha m) / std.

    From data alone, the step into t = 1 is one of DDIM, whose error is of the order of sigma^2 / c at its start.
    """

    def network(x, t):
        return EXACT[source](gaussian, path, x, t)

    start = path.start(draw(4, 3))
    times = torch.linspace(0, 1, 81, dtype=torch.float64)
    (mean,), (std,) = gaussian.means, gaussian.stds
    (a0, a1), (s0, s1) = path.alpha(times[[0, -1]]), path.sigma(times[[0, -1]])
    moved = torch.hypot(a1 * std, s1) / torch.hypot(a0 * std, s0) * (start - a0 * mean)
    ended = integrate(as_velocity(network, path, source), start, times, "heun", path=path)
    last = float(path.sigma(times[-2]) ** 2 / std) if source == "data" else 0.0
    torch.testing.assert_close(ended, a1 * mean + moved, atol=0.02 + last, rtol=0)


@pytest.mark.parametrize(("old", "new"), EVERY_PAIR)
def test_the_changed_velocity_is_that_of_the_new_path(mixture, draw, old, new) -> None:
    t = torch.linspace(0.1, 0.9, 25, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = old.log_snr(ends)
    t = t[(new.log_snr(t) >= first) & (new.log_snr(t) <= last)]
    assert len(t) >= 15
    x = 2 * draw(len(t), len(t))
    changed = change_path(lambda x, t: mixture.velocity(old, x, t[:, None]), old, new)
    torch.testing.assert_close(changed(x, t), mixture.velocity(new, x, t[:, None]), atol=1e-9, rtol=1e-9)
    # At both ends it is finite, and near the truth where the old path reaches as far.
    x = draw(2, 100)
    x[0] = new.start(x[0])
    value, truth = changed(x, ends), mixture.velocity(new, x, ends[:, None])
    assert value.isfinite().all()
    assert changed(x.float(), ends.float()).isfinite().all()
    first, last = old.log_snr(ends) - new.log_snr(ends)
    for row, beyond in enumerate((first > 0, last < 0)):
        if not beyond:
            torch.testing.assert_close(value[row], truth[row], atol=0.02, rtol=0.01)


def test_beyond_its_range_the_old_path_answers_at_its_nearest_end() -> None:
    asked = []

    def velocity(x, t):
        asked.append((x, t))
        return x

    x = torch.ones(1, 2, dtype=torch.float64)
    change_path(velocity, VariancePreserving(), CondOT())(x, torch.zeros(1))
    change_path(velocity, CondOT(sigma_min=0.5), CondOT())(x, torch.ones(1))
    assert [t.item() for _, t in asked] == [0.0, 1.0]
    torch.testing.assert_close(asked[0][0], x)  # both paths have alpha^2 + sigma^2 = 1 there
    torch.testing.assert_close(asked[1][0], x * 1.25**0.5)


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(UserError, match=r"(?s)unknown prediction 'velocty'.*did you mean 'velocity'"):
        convert(x, x, 0.5, CondOT(), "velocty", "data")
    for unknown in (
        lambda: convert(x, x, 0.5, CondOT(), "velocity", "epsilon"),
        lambda: as_velocity(lambda x, t: x, CondOT(), "epsilon"),
    ):
        with pytest.raises(
            UserError, match=r"(?s)unknown prediction 'epsilon'.*Choices: velocity, data, noise"
        ):
            unknown()
    for velocity in (
        lambda x, t: convert(x, x, t, CondOT(), "velocity", "data"),
        as_velocity(lambda x, t: x, CondOT(), "data"),
        change_path(lambda x, t: x, CondOT(), SqrtPath()),
    ):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            velocity(x, torch.tensor(1.5))
        with pytest.raises(ValueError, match=r"t has shape \(3,\) but x has shape \(2, 3\)"):
            velocity(x, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 1\) but xt has shape \(2, 3\)"):
        as_velocity(lambda x, t: x[:, :1], CondOT(), "data")(x, torch.tensor(0.5))
