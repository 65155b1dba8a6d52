from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import guide, guide_batched, integrate, time_grid

from .closed_forms import gaussian_velocity


class Spy:
    """Velocities of known value that remember how often, and when, they are evaluated."""

    def __init__(self, conditional: float = 5.0, unconditional: float = 2.0) -> None:
        self.values = {"conditional": conditional, "unconditional": unconditional}
        self.calls: list[str] = []
        self.times: list[Tensor] = []

    def named(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            self.calls.append(name)
            self.times.append(t)
            return torch.full_like(x, self.values[name])

        return velocity

    def batched(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append("batched")
        self.times.append(t)
        first, second = x.chunk(2)
        assert torch.equal(first, second)
        return torch.cat([torch.full_like(first, value) for value in self.values.values()])


FORMS = {
    "guide": lambda spy, *a, **k: guide(spy.named("conditional"), spy.named("unconditional"), *a, **k),
    "guide_batched": lambda spy, *a, **k: guide_batched(spy.batched, spy.named("conditional"), *a, **k),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_formula_and_order(form) -> None:
    expected = {4.0: 14.0, 1.0: 5.0, 0.0: 2.0, 0.5: 3.5, -1.0: -1.0}  # swapped arguments give 5 - 3 scale
    for scale, value in expected.items():
        assert form(Spy(), scale)(torch.zeros(3, 2), torch.tensor(0.5)).unique() == value
    rows = form(Spy(), torch.tensor(list(expected)))(torch.zeros(5, 5, 2), torch.tensor(0.5))  # B == channels
    assert rows.flatten(1).tolist() == [[value] * 10 for value in expected.values()]
    spy, t = Spy(), torch.tensor([0.1, 0.5, 0.9])
    value = form(spy, 4.0, (0.2, 0.8))(torch.zeros(3, 3), t)  # B == width
    assert value.tolist() == [[5.0] * 3, [14.0] * 3, [5.0] * 3]
    assert all(torch.equal(seen[:3], t) and torch.equal(seen[-3:], t) for seen in spy.times)


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.parametrize(
    ("scale", "interval", "t", "guided"),
    [
        *((scale, (0.0, 1.0), 0.5, False) for scale in (1.0, torch.ones(2), torch.tensor(1.0))),
        *((3.0, (0.2, 0.8), t, False) for t in (0.1, 0.9)),
        *((3.0, (0.2, 0.8), t, True) for t in (0.2, 0.8)),
        *((3.0, (0.0, 1.0), t, True) for t in (0.0, 1.0)),
    ],
)
def test_unguided_calls_evaluate_only_the_conditional(form_name, scale, interval, t, guided) -> None:
    spy = Spy()
    value = FORMS[form_name](spy, scale, interval)(torch.zeros(2, 3), torch.tensor(t, dtype=torch.float64))
    both = ["conditional", "unconditional"] if form_name == "guide" else ["batched"]
    assert spy.calls == (both if guided else ["conditional"])
    assert value.unique() == (11.0 if guided else 5.0)


def test_half_precision_keeps_its_dtype_and_is_calculated_in_float32(form) -> None:
    x, t = torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor(0.5)
    value = form(Spy(conditional=1.0, unconditional=0.99609375), 3.3)(x, t)
    assert value.dtype == torch.bfloat16
    assert value == torch.tensor(1 + 2.3 * (1 - 0.99609375)).bfloat16()


def test_rescale_brings_the_std_of_each_row_back_to_the_conditional_ones(draw) -> None:
    c, u, scales = draw(4, 3, 5), draw(4, 3, 5), torch.tensor([1.0, 2.0, 5.0, -1.0])
    x, t = torch.zeros_like(c), torch.tensor(0.5)
    plain, full, half = (
        guide(lambda x, t: c, lambda x, t: u, scales, rescale=rescale)(x, t) for rescale in (0.0, 1.0, 0.5)
    )
    assert torch.allclose(full.flatten(1).std(1), c.flatten(1).std(1))
    assert not torch.allclose(plain.flatten(1).std(1)[1:], c.flatten(1).std(1)[1:], rtol=0.05)
    # It only scales each row: same direction, and half the way is the mean of both.
    assert torch.allclose(torch.cosine_similarity(full.flatten(1), plain.flatten(1)), torch.ones(4).double())
    assert torch.allclose(half, (plain + full) / 2)
    assert torch.equal(full[0], c[0])  # at scale 1 exactly the conditional
    for shape in ((3, 1), (3, 2, 2), (3,)):  # rows that do not vary stay as they are
        value = guide(lambda x, t: x + 5.0, lambda x, t: x + 2.0, 4.0, rescale=0.7)(torch.zeros(shape), t)
        assert value.unique() == 14.0


def test_optimized_scale_takes_the_nearest_multiple_of_the_unconditional(draw) -> None:
    c, u = draw(4, 3, 5), draw(4, 3, 5)
    x, t = torch.zeros_like(c), torch.tensor(0.5)
    guided = guide(lambda x, t: c, lambda x, t: u, 0.0, optimized_scale=True)(x, t)  # s u alone
    assert torch.allclose(((c - guided) * u).flatten(1).sum(1), torch.zeros(4).double(), atol=1e-12)
    s = guided / u
    assert torch.allclose(s, s[:, :1, :1].expand_as(s)) and s.std(0).min() > 0.01  # one number for each row
    # The unconditional's length cancels: two lengths, one result; at length 0 there is nothing to project on.
    first, second = (
        guide(lambda x, t: c, lambda x, t, k=k: k * u, 3.0, optimized_scale=True)(x, t) for k in (1, 7)
    )
    assert torch.allclose(first, second) and torch.allclose(first, 3 * c - 2 * guided)
    zero = guide(lambda x, t: c, lambda x, t: 0 * u, 3.0, optimized_scale=True)(x, t)
    assert torch.allclose(zero, 3 * c)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_zero_init_stands_still_at_first_without_an_evaluation(form, scale) -> None:
    spy = Spy()
    velocity = form(spy, scale, zero_init=0.2)
    assert not velocity(torch.zeros(2, 3), torch.tensor(0.1)).any() and spy.calls == []
    value = velocity(torch.zeros(3, 3), torch.tensor([0.1, 0.2, 0.9]))
    assert value[:, 0].tolist() == [0.0, 2 + 3 * scale, 2 + 3 * scale]
    # One Euler step of four is left out.
    assert integrate(velocity, torch.zeros(1, 1), time_grid(4), "euler").item() == 0.75 * (2 + 3 * scale)


def test_options_leave_rows_outside_the_interval_exactly_alone(draw) -> None:
    c, u = draw(3, 8).float(), draw(3, 8).float()
    options = {"rescale": 0.7, "optimized_scale": True}
    velocity = guide(lambda x, t: c, lambda x, t: u, torch.tensor([4.0, 4.0, 1.0]), (0.2, 0.8), **options)
    value = velocity(torch.zeros_like(c), torch.tensor([0.1, 0.5, 0.5]))
    assert torch.equal(value[[0, 2]], c[[0, 2]]) and not torch.allclose(value[1], c[1], atol=0.1)


@pytest.mark.parametrize(
    ("model", "weak", "scale", "mean", "std"),
    [
        # Equal variances: the flow to the mean m + (scale - 1) (m - m'), 1 + 2 * 0.5 here.
        ((1.0, 0.4), (0.5, 0.4), 3.0, 2.0, 0.4),
        # Autoguidance with a broader model: the velocities are x d/dt log std, so x1 = x0 c (c / b)^(scale - 1).
        ((0.0, 0.5), (0.0, 0.8), 2.5, 0.0, 0.5 * (0.5 / 0.8) ** 1.5),
    ],
)
def test_guidance_of_gaussians_has_its_closed_form(model, weak, scale, mean, std, draw) -> None:
    x0, velocity = draw(20, 2), guide(gaussian_velocity(*model), gaussian_velocity(*weak), scale)
    x1 = integrate(velocity, x0, [0, 1], "dopri5", rtol=1e-9, atol=1e-9)
    assert torch.allclose(x1, mean + std * x0, atol=1e-7)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"scale": scale}, "guidance scale") for scale in (NAN, float("inf"), torch.tensor([1.0, NAN]))),
        *(
            ({"interval": interval}, "guidance interval")
            for interval in ((0.8, 0.2), (-0.1, 1.0), (0.0, 1000.0), (NAN, 1.0))
        ),
        ({"rescale": 1.5}, "guidance rescale 1.5"),
        ({"rescale": NAN}, "guidance rescale"),
        ({"zero_init": 1.0}, "guidance zero_init 1.0"),
        ({"zero_init": -0.1}, "guidance zero_init"),
    ],
)
def test_options_out_of_range_are_refused(form, options, message) -> None:
    with pytest.raises(UserError, match=message):
        form(Spy(), **{"scale": 2.0} | options)
    with pytest.raises(ValueError, match=r"one per row, shape \(B,\)"):
        form(Spy(), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"shape \(2,\) for 3 rows"):
        form(Spy(), torch.tensor([2.0, 3.0]))(torch.zeros(3, 2), torch.tensor(0.5))
