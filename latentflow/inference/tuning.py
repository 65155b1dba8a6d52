"""Tuning the sampler of a checkpoint: its noises and conditions, and the error on others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..families import FlowModel, Rows
from ..families.few_steps import require_velocity
from ..flow import Solver, Velocity, integrate
from ..flow.tuning import FINE, Ends, cost, rms, tune
from ..pipeline.adapter_bases import fingerprint
from ..pipeline.tuned import TunedSolver, is_adapted
from ..utils.progress import progress_bar
from .sample import generators

#: prompts of pretrained models where none are given
PROMPTS = (
    "a photo of a cat on a sofa", "a portrait of an old man, oil on canvas", "a red sports car in the rain at night",
    "a mountain lake at sunrise", "a bowl of fruit on a wooden table", "a watercolour of a village by the sea",
    "an astronaut riding a horse", "a white ceramic vase on a grey background", "a crowded street market in Asia",
    "a logo of a fox, flat design", "a close-up of a bee on a flower", "a modern kitchen with large windows",
    "a pencil sketch of a hand", "an isometric drawing of a small house", "a poster that says HELLO",
    "a snowy forest seen from above",
)  # fmt: skip
# Between the seeds of the noises that are fitted and those that are held out.
_APART = 1_000_000
#: Heun's steps, of two evaluations each, whose error is reported beside the others
HEUN_STEPS = 20


def usual_prompts(model: FlowModel, seed: int) -> list[str]:
    """Return prompts for a model that takes some: pairs of its words, of a model that knows only the words of its
    captions."""
    if not model.trains_text:
        return [*PROMPTS]
    words = sorted(word for word in model.pipeline.tokenizer.get_vocab() if not word.startswith(("[", "##")))
    chosen = random.Random(seed)
    return [" ".join(chosen.sample(words, 2)) for _ in range(1000)] if len(words) > 1 else words


def tune_samplers(
    model: FlowModel,
    steps: Sequence[int] = (8,),
    guidance: float | None = None,
    *,
    prompts: Sequence[str] = (),
    count: int = 128,
    held_out: int = 64,
    batch_size: int = 32,
    rounds: int = 1,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> list[TunedSolver]:
    """Fit a solver of each number of evaluations to a model, and measure it on noises that it was not fitted to.

    Fine trajectories are followed once for all numbers of steps whose grids begin and end at the same times.

    Args:
        steps: numbers of steps, each of one evaluation.
        guidance: guidance scale; None: the model's own.
        prompts: of the images that they are fitted to; default: `usual_prompts`. Of classes all are taken.
        count, held_out: noises to fit to, and to measure on.
        rounds: Gauss-Newton steps on each batch.
        height, width: in pixels; default: as trained.

    Raises:
        UserError: see `check_tunable`; the model does not say its size.
    """
    check_tunable(model)
    native = model.native_size or (None, None)
    height, width = height or native[0], width or native[1]
    if height is None or width is None:
        raise UserError("this checkpoint does not say its size", "Give --height and --width.")
    scale = model.guidance(guidance)
    pool: Sequence[Any] = prompts or (usual_prompts(model, seed) if model.takes_text else model.classes)

    def batches(first: int, number: int, times: Tensor) -> Iterator[Ends]:
        for begin in range(first, first + number, batch_size):
            seeds = range(begin, min(begin + batch_size, first + number))
            rows = condition_rows(
                model, [pool[random.Random(seed).randrange(len(pool))] for seed in seeds if pool], len(seeds)
            )
            each = generators(begin, len(seeds))
            rows = model.with_latent_variable(rows, each)  # drawn before the noise, as in a call
            noise = model.noise(len(seeds), height, width, each)
            velocity = _counted(model.velocity(rows, scale), bar)
            yield Ends.of(velocity, model.begin(noise, times), times.tolist())

    def along(grid: Tensor, solver: str | Solver, batch: Ends) -> Tensor:
        return rms(integrate(batch.velocity, batch.start, grid, solver) - batch.end)

    images = [min(batch_size, count - begin) for begin in range(0, count, batch_size)]
    grids = {number: model.time_grid(number, height, width) for number in steps}
    spans = {(float(grid[0]), float(grid[-1])): grid for grid in grids.values()}
    total = len(spans) * ((count + held_out) * FINE + held_out * 2 * HEUN_STEPS)
    total += sum(cost(number, images, rounds) + held_out * 2 * number for number in grids)
    heun, network, found = model.time_grid(HEUN_STEPS, height, width), fingerprint(model.network), {}
    bar = progress_bar(total=total, desc="evaluations")
    with torch.no_grad(), bar:
        for span, times in spans.items():
            fitted, others = [*batches(seed, count, times)], [*batches(seed + _APART, held_out, times)]
            by_heun = [along(heun, "heun", batch) for batch in others]
            for number, grid in grids.items():
                if (float(grid[0]), float(grid[-1])) != span:
                    continue
                numbers, usual = tune(fitted, grid, rounds=rounds), model.usual_grid(number, height, width)
                errors = {
                    "tuned": [batch.errors(numbers) for batch in others],
                    "usual": [along(usual, model.usual_solver, batch) for batch in others],
                    "heun": by_heun,
                }
                figures = {"noises": float(held_out)}
                for name, parts in errors.items():
                    figures[f"{name}_mean"] = float(torch.cat(parts).mean())
                    figures[f"{name}_median"] = float(torch.cat(parts).median())
                found[number] = TunedSolver(numbers, scale, height, width, network, figures)
    return [found[number] for number in grids]


def check_tunable(model: FlowModel) -> None:
    """Refuse a model for which no solver can be tuned.

    Raises:
        UserError: it has no velocity or draws in few steps, has adapters, or needs images.
    """
    if model.draws_tokens:
        require_velocity(model)
    if model.few_steps or not model.has_velocity:
        raise UserError(
            "this checkpoint draws in a few steps of its own", "Tune the one it was distilled from."
        )
    if is_adapted(model):
        raise UserError(
            "adapters change this network",
            "Write a checkpoint with them merged, and tune that: latentflow export CHECKPOINT --lora FILE -o FOLDER",
        )
    model.check_image_input()


def condition_rows(model: FlowModel, conditions: Sequence[Any], count: int) -> Rows:
    """Return ``count`` rows of prompts, of classes, or of no condition where there are none."""
    if not conditions:
        return model.unlabelled(count)
    return model.encode_prompt(conditions) if model.takes_text else model.encode_class(conditions)


def _counted(velocity: Velocity, bar: Any) -> Velocity:
    """Return the velocity, each image of which moves the bar by one."""

    def counted(x: Tensor, t: Tensor) -> Tensor:
        bar.update(len(x))
        return velocity(x, t)

    return counted
