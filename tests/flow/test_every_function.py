"""Promises of every function that follows a velocity: what it calls, in which precision, and what decides its noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentflow.flow import (
    CONSISTENCY_STEPS,
    EDITING,
    INPAINTING,
    SOLVERS,
    CondOT,
    Counted,
    VariancePreserving,
    as_velocity,
    change_path,
    guide,
    guide_batched,
    integrate,
    log_likelihood,
    reflow_pairs,
    straightness,
    time_grid,
)
from latentflow.flow.solvers import BY_ROW

from .closed_forms import seeded

ROWS = 5  # as many as x is wide: a t of shape (B,) that broadcasts along the width would be silently wrong
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])


class Network(nn.Module):
    """A network as users train it on ``path.sample(x0, x1, t)`` with t of shape (B,)."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1] and t.dtype == x.dtype
        return self.slope * x * (1 - t[:, None])


def plain(slope: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: slope * x * (1 - (t[:, None].to(x) if t.ndim else t.to(x)))


def sampled(velocity: Any, x: Tensor, generator: Any = None, solver: Any = "heun", **options: Any) -> Tensor:
    if solver in ("dopri5", BY_ROW["dopri5"]):  # bfloat16 meets no tolerance of 1e-5
        options |= {"rtol": 1e-2, "atol": 1e-2}
    return integrate(velocity, x, time_grid(3), solver, generator=generator, **options)


def edited(name: str, **options: Any) -> Callable[[Any, Tensor, Any], Tensor]:
    def edit(make: Any, x: Tensor, generator: Any) -> Tensor:
        noise = {"generator": generator} if name == "flowedit" else {}
        return EDITING[name](make(-0.4), make(0.3), x, torch.linspace(0.2, 1, 4), **noise, **options)

    return edit


# name -> (slope -> velocity, x, generator) -> what comes out of it
FUNCTIONS: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    **{
        f"integrate {name}": lambda make, x, g, name=name: sampled(make(-0.4), x, g, name)  # type: ignore[misc]
        for name in SOLVERS
    },
    "consistency": lambda make, x, g: sampled(make(-0.4), x, g, CONSISTENCY_STEPS),
    "by row": lambda make, x, g: sampled(make(-0.4), x, g, BY_ROW["dopri5"]),
    **{f"edit {name}": edited(name) for name in EDITING},
    "edit flowedit, averaged and in part plain": edited("flowedit", draws=2, plain_from=0.5),
    **{
        f"inpaint {name}": lambda make, x, g, fill=fill: fill(  # type: ignore[misc]
            make(-0.4), x, -x, MASK, torch.linspace(0, 1, 7), generator=g
        )
        for name, fill in INPAINTING.items()
    },
    "a score": lambda make, x, g: integrate(
        make(-0.4), x, [0.1, 0.5, 0.9], "euler-maruyama", score=make(-1.0), generator=g
    ),
    "counted": lambda make, x, g: sampled(Counted(make(-0.4)), x),
    "guide": lambda make, x, g: sampled(guide(make(-0.4), make(0.3), 2.0), x),
    "guide_batched": lambda make, x, g: sampled(guide_batched(make(-0.4), make(-0.4), 2.0), x),
    "change_path": lambda make, x, g: sampled(change_path(make(-0.4), CondOT(), VariancePreserving()), x),
    "as_velocity": lambda make, x, g: sampled(as_velocity(make(-0.4), CondOT(), "data"), x),
    "as_velocity of a velocity": lambda make, x, g: sampled(as_velocity(make(-0.4), CondOT(), "velocity"), x),
    "log_likelihood": lambda make, x, g: log_likelihood(make(-0.4), x, solver="rk4", times=[1.0, 0.5, 0.0]),
    "log_likelihood by probes": lambda make, x, g: log_likelihood(
        make(-0.4), x, "hutchinson", probe="gaussian", solver="rk4", times=[1.0, 0.5, 0.0], generator=g
    ),
    "reflow_pairs": lambda make, x, g: reflow_pairs(make(-0.4), x, [0, 0.5, 1])[1],
    "reflow_pairs with noise": lambda make, x, g: reflow_pairs(
        make(-0.4), x, [0, 0.5, 1], "euler-maruyama", generator=g
    )[1],
    "straightness": lambda make, x, g: straightness(make(-0.4), x, [0, 0.5, 1]),
}
RANDOM = {
    *(f"integrate {name}" for name, solver in SOLVERS.items() if solver.stochastic),
    *("consistency", "edit flowedit", "edit flowedit, averaged and in part plain", "a score"),
    *(f"inpaint {name}" for name in INPAINTING if name != "replacement"),
    *("log_likelihood by probes", "reflow_pairs with noise"),
}
MEASURES = {"log_likelihood", "log_likelihood by probes", "straightness"}  # in float32 or better


@pytest.fixture(params=FUNCTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def x(draw) -> Tensor:
    return draw(ROWS, ROWS).float()


def test_a_network_gets_a_time_for_each_row_and_is_followed_as_its_formula_is(name: str, x: Tensor) -> None:
    of_network, of_formula = (FUNCTIONS[name](make, x, seeded()) for make in (Network, plain))
    assert torch.isfinite(of_network).all()
    torch.testing.assert_close(of_network, of_formula, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_x_keeps_its_dtype_and_the_network_sees_it(name: str, dtype: torch.dtype, x: Tensor) -> None:
    seen: set[tuple[torch.dtype, torch.Size]] = set()

    def spied(slope: float) -> Callable[[Tensor, Tensor], Tensor]:
        def velocity(y: Tensor, t: Tensor) -> Tensor:
            assert y.dtype == dtype
            seen.add((t.dtype, t.shape))
            return plain(slope)(y, t)

        return velocity

    out, wide = FUNCTIONS[name](spied, x.to(dtype), seeded()), torch.promote_types(dtype, torch.float32)
    assert out.dtype == (wide if name in MEASURES else dtype)
    assert all(of_t.itemsize >= 4 for of_t, _ in seen)  # half precision could not tell times apart
    if name.startswith("integrate"):  # a scalar, so that a formula is right for every shape of x
        assert seen == {(wide, torch.Size())}
    if dtype != torch.float64:  # whose noise is another
        expected = FUNCTIONS[name](plain, x.to(dtype).float(), seeded())
        torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.02)


def test_the_generator_alone_decides(name: str, x: Tensor) -> None:
    function = FUNCTIONS[name]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (function(plain, x, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) != (name in RANDOM)
    assert torch.equal(function(plain, x, None), first)  # torch's own generator, in the same state


@pytest.mark.parametrize(
    "name",
    # the steps of dopri5 suit the whole batch, and what draws for the whole batch takes one generator
    sorted(FUNCTIONS.keys() - {"integrate dopri5", "log_likelihood by probes", "reflow_pairs with noise"}),
)
def test_a_row_depends_on_itself_and_its_own_generator_alone(name: str, x: Tensor) -> None:
    function, rows = FUNCTIONS[name], [3, 0]
    together = function(plain, x, [seeded(row) for row in range(ROWS)])
    apart = function(plain, x[rows], [seeded(row) for row in rows])
    torch.testing.assert_close(together[rows], apart, rtol=1e-5, atol=1e-6)


def test_in_half_precision_a_network_gets_times_that_half_precision_could_not_tell_apart() -> None:
    seen = []

    class Half(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return torch.zeros_like(y)

    integrate(Half(), torch.zeros(2, 3, dtype=torch.bfloat16), [0.9, 0.9001, 0.9002], "euler")
    assert [t.dtype for t in seen] == [torch.float32] * 2
    assert float(seen[1][0] - seen[0][0]) == pytest.approx(1e-4, rel=1e-2)
