"""The border to diffusers' schedulers: the one module that knows their conventions.

Theirs: ``sigma = 1 - t`` (sigma = 1 is noise), ``timestep = 1000 sigma``, ``model_output = -velocity``.
Everything else in latentflow speaks of t in [0, 1] with t = 1 the data, and of the velocity dx/dt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, finite, shown
from ..flow.tensors import NOT_FINITE, require_finite
from ..utils.components import library_reads

Velocity = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
# Multistep schedulers take log(1 - sigma): the first sigma stays this far from 1.
LARGEST_LOG_SIGMA = 1.0 - 1e-6


def to_timestep(t: Tensor) -> Tensor:
    """Return our time t as diffusers' timestep, 1000 (1 - t), in the dtype of ``t``."""
    return 1000.0 * (1.0 - t)


def times_from_sigmas(sigmas: Sequence[float]) -> Tensor:
    """Return our grid for diffusers' ``sigmas``: N values, the final 0 implied, are N + 1 float64 times up to 1.

    Raises:
        UserError: ``sigmas`` is empty, leaves (0, 1] or does not decrease.
    """
    return 1.0 - torch.tensor([*checked_sigmas(sigmas), 0.0], dtype=torch.float64)


def checked_sigmas(sigmas: Any) -> list[float]:
    """Return diffusers' ``sigmas`` (a list, array or tensor) as numbers, without the final 0.

    Raises:
        UserError: empty, no numbers, not finite, outside (0, 1], or not decreasing, in float32 either: diffusers'
            schedulers compute in it.
    """
    rows = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    fix = "Pass values that decrease within (0, 1], such as [1.0, 0.75, 0.5]; the final 0 is implied."
    if not isinstance(rows, list | tuple):
        raise UserError(f"sigmas is {shown(sigmas)}", fix)
    values = [finite("a value of sigmas", row, fix=fix) for row in rows]
    if len(values) > 1 and values[-1] == 0.0:
        values.pop()  # the final 0 may be written or left out
    times = 1.0 - torch.tensor([*values, 0.0], dtype=torch.float32)  # that none of them becomes the last one
    falling = all(high > low for high, low in pairwise(values)) and bool((times.diff() > 0).all())
    if not values or not falling or values[0] > 1.0 or values[-1] <= 0.0:
        raise UserError(f"sigmas = {shown(values)} is no grid from noise (1) to data (0)", fix)
    return values


def check_scheduler(scheduler: Any) -> None:
    """Refuse a diffusers scheduler that cannot step a flow.

    Raises:
        UserError: it does not read the network's output as a velocity, needs a shift that we cannot know, or is one of
            diffusers' inverses, which go from data to noise.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if not (name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"):
        raise UserError(
            f"the scheduler {name} takes prediction_type={config.get('prediction_type')!r}, not a velocity",
            f"Use a FlowMatch... scheduler or, where it has them, {name}.from_config(pipe.scheduler.config, "
            "prediction_type='flow_prediction', use_flow_sigmas=True); pipe.scheduler = None: our solvers.",
        )
    if not name.startswith("FlowMatch") and not config.get("use_flow_sigmas", False):
        raise UserError(
            f"the scheduler {name} predicts a flow, but on the noise levels of a diffusion",
            f"Build it as {name}(prediction_type='flow_prediction', use_flow_sigmas=True).",
        )
    if config.get("use_dynamic_shifting", False):
        raise UserError(
            f"the scheduler {name} shifts by the resolution (use_dynamic_shifting=True)",
            "Set use_dynamic_shifting=False and choose a fixed shift.",
        )
    if not hasattr(scheduler, "set_begin_index"):
        raise UserError(
            f"the scheduler {name} does not step from noise to data",
            "Use a FlowMatch... scheduler, UniPCMultistepScheduler or DPMSolverMultistepScheduler.",
        )


def set_grid(
    scheduler: Any,
    steps: int,
    sigmas: Sequence[float] | None = None,
    device: torch.device | None = None,
    strength: float = 1.0,
) -> None:
    """Give a diffusers flow scheduler ``steps`` steps from sigma 1 to 0, or the grid ``sigmas``; its own
    shift applies.

    FlowMatch schedulers spend their last step on 0.001 -> 0 unless the grid is given, so they get 1, 1 - 1/N,
    ..., 1/N; the multistep ones keep their own grid. ``sigmas`` is honoured also where ``set_timesteps``
    does not take it. Of N steps the last N * ``strength``, rounded up, are to be taken, as in diffusers.

    Raises:
        UserError: see `check_scheduler`; or the grid that its settings make does not lead from noise to data.
    """
    check_scheduler(scheduler)
    count, name = steps if sigmas is None else len(checked_sigmas(sigmas)), type(scheduler).__name__
    asked: dict[str, Any] = {"num_inference_steps": count}
    grid = None
    if sigmas is not None or name.startswith("FlowMatch"):
        grid = np.linspace(1.0, 1.0 / steps, steps) if sigmas is None else np.array(checked_sigmas(sigmas))
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if grid is not None and takes_sigmas:
        asked = {"sigmas": grid}
    with library_reads(
        f"the scheduler {name}", "Check its settings, or set pipe.scheduler = None: our solvers."
    ):
        scheduler.set_timesteps(**asked, device=device)
    if grid is not None and not takes_sigmas:
        _overwrite_grid(scheduler, grid, device)
    _check_grid(scheduler)
    # Count the steps rather than look them up by timestep, which some schedulers round to an integer.
    skipped = count - math.ceil(count * strength - 1e-6)  # a product such as 0.07 * 100 is a little above 7
    scheduler.set_begin_index(skipped * scheduler.order)


def _check_grid(scheduler: Any) -> None:
    """Refuse the grid that a scheduler has made of its steps and settings if it does not lead from noise to data.

    Raises:
        UserError: its sigmas are not finite, leave [0, 1], rise, or do not end at the data (0).
    """
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64, device="cpu")
    inside = bool(((sigmas >= 0.0) & (sigmas <= 1.0)).all())
    # A level may come twice in a row: Heun visits it with two evaluations.
    if not inside or bool((sigmas.diff() > 0.0).any()) or not float(sigmas[0]) > float(sigmas[-1]) == 0.0:
        raise UserError(
            f"the scheduler {type(scheduler).__name__} does not step from noise (sigma 1) to data (sigma 0): "
            f"its sigmas go from {float(sigmas[0]):g} to {float(sigmas[-1]):g}",
            "Build it without invert_sigmas, with a positive shift, and with a grid that falls; "
            "pipe.scheduler = None: our solvers.",
        )


def remaining_steps(scheduler: Any) -> int:
    """Return the scheduler steps that the grid set by ``set_grid`` leaves to take; Heun's are two to a step."""
    return max(0, len(scheduler.timesteps) - int(scheduler.begin_index))


def start_time(scheduler: Any) -> float:
    """Return our time at which the grid set by ``set_grid`` begins."""
    return 1.0 - float(scheduler.sigmas[scheduler.begin_index]) if remaining_steps(scheduler) else 1.0


def _overwrite_grid(scheduler: Any, grid: np.ndarray[Any, Any], device: torch.device | None) -> None:
    config = scheduler.config
    shift = config.get("flow_shift", config.get("shift", 1.0))
    sigmas = torch.tensor(shift * grid / (1.0 + (shift - 1.0) * grid), dtype=torch.float64)
    if hasattr(scheduler, "state_in_first_order"):  # Heun visits every level but the first and the last twice
        sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
    else:
        sigmas = sigmas.clamp(max=LARGEST_LOG_SIGMA)
    scheduler.timesteps = to_timestep(1.0 - sigmas).to(device, torch.float32)
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)


def own_scheduler(chosen: Any, model: Any, steps: int, height: int, width: int) -> Any:
    """Return a copy of a pretrained model's own scheduler, or of ``chosen``, with its timesteps set.

    Raises:
        UserError: it does not take the model's noise levels.
    """
    scheduler = model.pipeline.scheduler if chosen is None else chosen
    with library_reads(f"the scheduler {type(scheduler).__name__}", "Choose one that this model can use."):
        return model.set_timesteps(scheduler, steps, height, width)


def sample_with_scheduler(
    model: Any, scheduler: Any, velocity: Velocity, noise: Tensor, **options: Any
) -> Tensor:
    """Bring noise (B, C, h, w) to data as the stock pipeline of a pretrained model does, step by step of a scheduler.

    Args:
        model: a ``PretrainedModel``; it carries states and velocities over to the scheduler's own form.
        scheduler: with timesteps, of ``model.set_timesteps``.
        options: as of `integrate_with_scheduler`; the x that ``callback`` sees is what the scheduler steps.

    Raises:
        UserError: as `integrate_with_scheduler`.
    """

    def evaluate(i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, state = model.on_path(scheduler, i, x)
        value = velocity(state, t)
        return t, value, model.model_output(scheduler, t, state, value)

    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # 1 of flows
    return _stepped(scheduler, scheduler.timesteps, evaluate, x, **options)


def integrate_with_scheduler(scheduler: Any, velocity: Velocity, x: Tensor, **options: Any) -> Tensor:
    """Bring ``x`` (B, C, H, W) from noise to data with a diffusers scheduler whose grid ``set_grid`` has set.

    The time of every evaluation is read from the scheduler's float sigmas, not from its timesteps, which
    several schedulers round to integers.

    Args:
        options: ``callback(i, t, x)``, which runs after each scheduler step that began at time t and may return a
            replacement for x; ``progress``; ``generator``, one or one for each image.

    Raises:
        UserError: the velocity, or x after a step, is not finite (the step is named).
    """
    begin = scheduler.begin_index

    def evaluate(i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = 1.0 - scheduler.sigmas[begin + i].to(torch.float64)
        value = velocity(x, t)
        return t, value, -value

    return _stepped(scheduler, scheduler.timesteps[begin:], evaluate, x, **options)


def _stepped(
    scheduler: Any,
    timesteps: Any,
    evaluate: Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    *,
    callback: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    progress: Progress = iter,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Step x along a scheduler's timesteps; see `integrate_with_scheduler`.

    Args:
        evaluate: (number of the step, x) -> its time, the velocity, and what the scheduler takes for it.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for i, timestep in enumerate(progress(timesteps)):
        t, value, output = evaluate(i, x)
        where = f"in step {i + 1} of {len(timesteps)}"
        require_finite(value, f"the velocity at t = {float(t):g} {where}", NOT_FINITE)
        x = scheduler.step(output, timestep, x, return_dict=False, **extra)[0]
        require_finite(
            x, f"x {where} of the scheduler {type(scheduler).__name__}", "Use another grid or scheduler."
        )
        replacement = callback(i, t, x) if callback is not None else None
        x = x if replacement is None else replacement
    return x
