from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import guide, guide_batched, integrate


class Spy:
    """Velocities of known value that count how often, and on how many rows, they are evaluated."""

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
        return torch.cat(
            [
                torch.full_like(first, self.values["conditional"]),
                torch.full_like(second, self.values["unconditional"]),
            ]
        )


FORMS = {
    "guide": lambda spy, *rest: guide(spy.named("conditional"), spy.named("unconditional"), *rest),
    "guide_batched": lambda spy, *rest: guide_batched(spy.batched, spy.named("conditional"), *rest),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.mark.parametrize(
    ("scale", "expected"), [(4.0, 14.0), (1.0, 5.0), (0.0, 2.0), (0.5, 3.5), (-1.0, -1.0)]
)
def test_formula_and_order(form, scale, expected) -> None:
    value = form(Spy(), scale)(torch.zeros(3, 2), torch.tensor(0.5))
    assert (
        value.tolist() == [[expected, expected]] * 3
    )  # 2 + scale (5 - 2): swapped arguments give 5 - 3 scale


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.parametrize(
    ("scale", "interval", "t", "guided"),
    [
        (1.0, (0.0, 1.0), 0.5, False),
        (3.0, (0.2, 0.8), 0.1, False),
        (3.0, (0.2, 0.8), 0.9, False),
        (3.0, (0.2, 0.8), 0.2, True),
        (3.0, (0.2, 0.8), 0.8, True),
        (3.0, (0.0, 1.0), 0.0, True),
        (3.0, (0.0, 1.0), 1.0, True),
    ],
)
def test_unguided_calls_evaluate_only_the_conditional(form_name, scale, interval, t, guided) -> None:
    spy = Spy()
    value = FORMS[form_name](spy, scale, interval)(torch.zeros(2, 3), torch.tensor(t, dtype=torch.float64))
    both = ["conditional", "unconditional"] if form_name == "guide" else ["batched"]
    assert spy.calls == (both if guided else ["conditional"])
    assert value.unique().tolist() == [2 + scale * 3.0 if guided else 5.0]


def test_rows_with_their_own_t_are_guided_on_their_own(form) -> None:
    spy, t = Spy(), torch.tensor([0.1, 0.5, 0.9])
    value = form(spy, 4.0, (0.2, 0.8))(torch.zeros(3, 3), t)  # B == width
    assert value.tolist() == [[5.0] * 3, [14.0] * 3, [5.0] * 3]
    assert all(torch.equal(seen[:3], t) and torch.equal(seen[-3:], t) for seen in spy.times)


def test_both_forms_agree_with_the_same_evaluations_of_integrate(draw) -> None:
    x = draw(4, 2, 4, 4)

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return (1 + t) * x.sin()

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return -t * x

    def batched(x2: Tensor, t: Tensor) -> Tensor:
        return torch.cat([conditional(x2[:4], t), unconditional(x2[4:], t)])

    one = integrate(guide(conditional, unconditional, 3.0, (0.3, 1.0)), x, [0, 0.25, 0.5, 1.0])
    two = integrate(guide_batched(batched, conditional, 3.0, (0.3, 1.0)), x, [0, 0.25, 0.5, 1.0])
    assert torch.equal(one, two)


def test_half_precision_keeps_its_dtype_and_is_calculated_in_float32() -> None:
    spy = Spy(conditional=1.0, unconditional=0.99609375)
    value = guide(spy.named("conditional"), spy.named("unconditional"), 3.3)(
        torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor(0.5)
    )
    assert value.dtype == torch.bfloat16
    assert value == torch.tensor(1 + 2.3 * (1 - 0.99609375)).bfloat16()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(form, scale) -> None:
    with pytest.raises(UserError, match="guidance scale"):
        form(Spy(), scale)


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1.0), (0.0, 1000.0), (float("nan"), 1.0)])
def test_an_interval_that_is_none_is_refused(form, interval) -> None:
    with pytest.raises(UserError, match="guidance interval"):
        form(Spy(), 2.0, interval)
