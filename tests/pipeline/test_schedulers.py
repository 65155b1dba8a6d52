"""diffusers' flow schedulers in the pipeline, against our solvers and against the exact end of the flow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import integrate, time_grid
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline import scheduler as border

from .conftest import close

Noise = Callable[[int], Tensor]
MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpm": lambda: DPMSolverMultistepScheduler(**MULTISTEP),
    "unipc": lambda: UniPCMultistepScheduler(**MULTISTEP),
}


def draw(pipe: LatentFlowPipeline, x0: Tensor, **call: Any) -> Tensor:
    """Draw latents, of class 0 unless asked otherwise."""
    out: Tensor = pipe(**{"class_labels": 0, "latents": x0, "output_type": "latent"} | call).images
    return out


def error(pipe: LatentFlowPipeline, x0: Tensor, **call: Any) -> float:
    """Root mean square distance from the exact end of the flow."""
    out = draw(pipe, x0, class_labels=[0, 2], guidance_scale=2.0, **call)
    network = pipe.transformer.requires_grad_(False)
    end = network.end(network.null + 2.0 * (network.means[[0, 2]] - network.null), x0)
    return float((out - end).square().mean().sqrt())


def test_euler_is_our_euler(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    for grid in ({"num_inference_steps": 7}, {"sigmas": [1.0, 0.8, 0.1]}):
        theirs, ours = (
            draw(class_pipe, x0(2), class_labels=[0, 1], **grid, solver=s) for s in (None, "euler")
        )
        close(theirs, ours, 1e-5)


def test_heun_is_our_heun_with_an_euler_step_at_the_end(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    class_pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    theirs = draw(class_pipe, x0(1), class_labels=1, guidance_scale=1.0, num_inference_steps=6)
    times = [t for _, t, _ in class_pipe.transformer.calls]
    assert times == pytest.approx([0.0, *(i / 6 for i in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5))], abs=1e-6)

    velocity = class_pipe.model.velocity(class_pipe.model.encode_class([1]), 1.0)
    grid = time_grid(6)
    with torch.no_grad():
        ours = integrate(velocity, integrate(velocity, x0(1), grid[:-1], "heun"), grid[-2:], "euler")
    close(theirs, ours, 1e-5)


def test_the_schedulers_own_shift_is_our_shifted_grid(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    sigmas = (1.0 - time_grid(5, shift=3.0)).tolist()
    ours = draw(class_pipe, x0(1), class_labels=1, sigmas=sigmas, solver="euler")
    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    close(draw(class_pipe, x0(1), class_labels=1, num_inference_steps=5), ours, 1e-5)


# Root mean square error after so many steps, on states of size 1 to 6 (measured, with a margin).
@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [("euler", 20, 0.08), ("heun", 20, 0.03), ("dpm", 20, 0.03), ("unipc", 20, 0.005)],
)
def test_every_scheduler_finds_the_end_of_the_flow(
    class_pipe: LatentFlowPipeline, x0: Noise, name: str, steps: int, tolerance: float
) -> None:
    class_pipe.scheduler = SCHEDULERS[name]()
    coarse = error(class_pipe, x0(2), num_inference_steps=steps)
    assert coarse < tolerance
    assert error(class_pipe, x0(2), num_inference_steps=4 * steps) < coarse / 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigmas_are_honoured_by_every_scheduler(class_pipe: LatentFlowPipeline, x0: Noise, name: str) -> None:
    class_pipe.scheduler = SCHEDULERS[name]()
    first = draw(class_pipe, x0(1), sigmas=[1.0, 0.6, 0.1])
    times = {round(t, 4) for _, t, _ in class_pipe.transformer.calls}
    assert times == {0.0, 0.4, 0.9}
    assert torch.equal(draw(class_pipe, x0(1), sigmas=[1.0, 0.6, 0.1]), first)  # nothing of a call stays


def test_half_precision_stays_inside_the_network(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    full = draw(class_pipe, x0(1), num_inference_steps=3)
    class_pipe.transformer.to(torch.bfloat16)
    half = draw(class_pipe, x0(1), num_inference_steps=3)
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())
    close(half, full, 0.1)


def test_a_named_solver_wins_over_the_scheduler(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    ours = draw(class_pipe, x0(1), solver="rk4")
    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(draw(class_pipe, x0(1), solver="rk4"), ours)


def test_callback_and_interrupt_with_a_scheduler(class_pipe: LatentFlowPipeline) -> None:
    seen: list[float] = []

    def stop(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(float(t))
        pipe._interrupt = i == 2
        return {"latents": torch.full_like(tensors["latents"], 7.0)}

    class_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    out = class_pipe(
        class_labels=0, num_inference_steps=4, output_type="latent", callback_on_step_end=stop
    ).images
    assert seen == pytest.approx([1000.0, 750.0, 500.0], abs=1e-3)
    assert class_pipe.num_timesteps == 4
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "takes prediction_type='epsilon'"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=False"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "does not step from noise.*go from 0 to"),
        (FlowMatchEulerDiscreteScheduler(shift=0.0), "does not step from noise"),
        (FlowMatchEulerDiscreteScheduler(shift=-0.5), "does not step from noise"),
        (FlowMatchEulerDiscreteScheduler(shift=float("nan")), "does not step from noise"),
        (UniPCMultistepScheduler(**MULTISTEP, final_sigmas_type="sigma_min"), "does not step from noise"),
        (DPMSolverMultistepInverseScheduler(**MULTISTEP), "does not step from noise to data"),
    ],
)
def test_schedulers_that_cannot_step_a_flow_are_refused(
    class_pipe: LatentFlowPipeline, scheduler: Any, message: str
) -> None:
    class_pipe.scheduler = scheduler
    with pytest.raises(UserError, match=message):
        class_pipe(class_labels=0)
    assert not class_pipe.transformer.calls


def test_a_scheduler_that_was_set_is_saved(class_pipe: LatentFlowPipeline, x0: Noise, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    class_pipe.scheduler = UniPCMultistepScheduler(**MULTISTEP, flow_shift=2.0)
    class_pipe.save_pretrained(folder)
    loaded = LatentFlowPipeline.from_pretrained(folder, transformer=class_pipe.transformer)
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler)
    assert loaded.scheduler.config.flow_shift == 2.0
    class_pipe.scheduler = None
    class_pipe.save_pretrained(folder)
    assert LatentFlowPipeline.from_pretrained(folder, transformer=class_pipe.transformer).scheduler is None


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        (DDIMScheduler, {}, "takes prediction_type='epsilon'"),
        (FlowMatchEulerDiscreteScheduler, {"shift": float("nan")}, "does not step from noise"),
        (FlowMatchEulerDiscreteScheduler, {"shift": "3"}, "cannot be read"),
        (
            FlowMatchEulerDiscreteScheduler,
            {"num_train_timesteps": 10**12},
            "num_train_timesteps is 1000000000000",
        ),
        (FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
    ],
)
def test_a_checkpoint_whose_scheduler_cannot_step_a_flow_is_refused_as_it_is_opened(
    dit_folder: Path, tmp_path: Path, scheduler: Any, changes: dict[str, Any], message: str
) -> None:
    pipe = LatentFlowPipeline.from_pretrained(dit_folder)
    pipe.scheduler = scheduler()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message) as raised:
        LatentFlowPipeline.from_pretrained(tmp_path)
    assert str(tmp_path / "scheduler") in str(raised.value)


def test_times_at_the_border() -> None:
    times = border.times_from_sigmas([1.0, 0.25])
    assert times.tolist() == [0.0, 0.75, 1.0]
    assert times.dtype == torch.float64
    assert border.to_timestep(times).tolist() == [1000.0, 250.0, 0.0]
