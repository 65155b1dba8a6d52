"""Sampling of tokens: the settings of their jumps, and tokens that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..families.tokens import TokenModel
from ..flow import SOLVERS
from ..flow.discrete import SAMPLERS, Posterior, simulate
from ..flow.discrete.simulate import checked_sampler
from .steps import AfterStep, Interrupted, Sampler, last_part

if TYPE_CHECKING:
    from ..families import FlowModel
    from ..families.model import Generators


class JumpSettings(NamedTuple):
    """Arguments of a call that draws tokens; see ``LatentFlowPipeline``."""

    temperature: float = 1.0
    corrector: float = 0.0

    def check(self, model: FlowModel) -> None:
        """Refuse settings that would do nothing.

        Raises:
            UserError: they are given for a model that does not take them.
        """
        given = [name for name, value in self._asdict().items() if value != self._field_defaults[name]]
        given = [name for name in given if name not in model.jump_settings]
        if given:
            raise UserError(
                f"{given[0]} is {getattr(self, given[0]):g}, and this checkpoint draws no tokens",
                "Leave it out: it is of checkpoints that were trained with --tokens"
                f"{' or --prediction codes' if given[0] == 'temperature' else ''}.",
            )


def check_solver(model: FlowModel, solver: Any) -> None:
    """Refuse a sampler of tokens for a model that draws none, and any other for one that does.

    Raises:
        UserError: names what the model takes; a sampler for masks, and the source has none.
    """
    name = solver if isinstance(solver, str) else type(solver).__name__
    if isinstance(model, TokenModel):
        checked_sampler(name, model.token_path)
    elif name in SAMPLERS and name not in SOLVERS:
        raise UserError(
            f"solver '{name}' is of checkpoints of tokens, and this one draws none",
            f"Use one of {', '.join(SOLVERS)}.",
        )


def sample_tokens(
    pipe: Any,
    logits: Posterior,
    x0: Tensor,
    steps: int | None,
    solver: Any,
    generator: Generators | None,
    after_step: AfterStep,
    strength: float,
    x1: Tensor | None,
    sampler: Sampler,
) -> Tensor:
    """Go from the source's tokens to the data's; end early once interrupted. See `SamplingMixin.sample`.

    Args:
        pipe: a pipeline of a `TokenModel`.
        logits: under its conditions.
        x0: (B, h, w) tokens of the source.
        sampler: called as ``simulate`` is.

    Raises:
        UserError: there is no such sampler of tokens.
    """
    model = pipe.model
    method = model.usual_solver if solver is None else solver
    check_solver(model, method)
    height, width = (side * pipe.vae_scale_factor for side in x0.shape[-2:])
    times = last_part(model.time_grid(steps, height, width), strength)
    pipe._num_timesteps = len(times) - 1
    x = x0 if x1 is None else model.mixed(x0, x1, times[0], generator)
    if pipe._num_timesteps == 0:
        return x
    try:
        return sampler(
            logits,
            x,
            times,
            method,
            path=model.token_path,
            **pipe._jumps._asdict(),
            callback=lambda i, t, x: after_step(i, times[i], x),
            progress=pipe.progress_bar,
            generator=generator,
        )
    except Interrupted as interrupted:
        return interrupted.latents


def keeping(known: Tensor, hole: Tensor) -> Sampler:
    """Return a sampler of tokens, called as ``integrate`` is, that keeps what is known.

    Args:
        known: (B, h, w) tokens.
        hole: (B, 1, h, w), above 0 where they are drawn.
    """
    kept = hole[:, 0] == 0

    def run(posterior: Posterior, x: Tensor, times: Tensor, solver: Any, **options: Any) -> Tensor:
        return simulate(posterior, torch.where(kept, known, x), times, solver, known=kept, **options)

    return run
