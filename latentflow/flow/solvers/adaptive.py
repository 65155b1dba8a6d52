"""Adaptive solvers, by torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor

from latentflow.errors import UserError

from ..tensors import time_dtype
from .base import Field, SolverOptions, Step


def dormand_prince(options: SolverOptions) -> Step:
    """Dormand & Prince 1980, by torchdiffeq: as many inner steps as the tolerances ask for.

    It lands on t_next and evaluates nothing beyond. The error is the root mean square over the whole batch,
    so a row's result may depend, within the tolerance, on the rows beside it.
    """
    from torchdiffeq import odeint  # imported here: it brings scipy with it

    first_step = 0.05  # torchdiffeq's own first guess would evaluate beyond the interval

    def step(field: Field, x: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal first_step
        accepted: list[float] = []
        span, sign, (low, high) = abs(t_next - t), (1.0 if t_next > t else -1.0), sorted((t, t_next))

        def rightwards(s: Tensor, y: Tensor) -> Tensor:  # s runs from 0 to span, whichever way t runs
            return sign * field(y, min(max(t + sign * float(s), low), high))

        setattr(rightwards, "callback_accept_step", lambda s, y, ds: accepted.append(float(ds)))  # noqa: B010
        ends = torch.tensor([0.0, span], dtype=time_dtype(x.device), device=x.device)
        # step_t clips the last step to the end, where the default oversteps it and interpolates back.
        inner = {"first_step": min(first_step, span), "step_t": ends[1:], "dtype": ends.dtype}
        try:
            x = odeint(
                rightwards, x, ends, rtol=options.rtol, atol=options.atol, method="dopri5", options=inner
            )[-1]
        except AssertionError as error:  # torchdiffeq's way to say that the step size underflowed
            if "underflow in dt" not in str(error):
                raise
            raise UserError(
                f"dopri5 cannot meet rtol {options.rtol:g} and atol {options.atol:g} on [{t:g}, {t_next:g}]",
                "Use larger tolerances, float32 in place of half precision, or a fixed-step solver ('heun').",
            ) from error
        first_step = max(accepted)
        return x

    return step
