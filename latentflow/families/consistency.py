"""Consistency models: from anywhere on a path they jump to the data, and noise is added again between their steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import CONSISTENCY_STEPS, Solver, Velocity
from ..flow.tensors import expand_t
from .diffusion import StableDiffusionModel
from .few_steps import FewSteps, require_velocity
from .model import Rows
from .pretrained import PretrainedModel


class ConsistencyModel(PretrainedModel):
    """Family whose network predicts the data at the end of the path (Song et al. 2023, arXiv:2303.01469).

    `predict` returns the average velocity from x to that data; the velocity at x is not known, so that `velocity` needs
    a grid. The guidance scale is an input of the network.
    """

    has_velocity = False
    embeds_guidance = True
    few_steps = FewSteps(average=True, consistency=True)

    @property
    def usual_solver(self) -> Solver:
        """The steps that jump to the data and add noise again."""
        return CONSISTENCY_STEPS

    def time_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return ``steps`` + 1 times, float64, from the noisiest of the scheduler's timesteps to 1.

        Raises:
            UserError: ``steps`` is no number of steps, or the scheduler has fewer.
        """
        config = self.pipeline.scheduler.config
        most = config.get("original_inference_steps", config.num_train_timesteps)
        if steps is not None and steps > most:
            raise UserError(f"{steps} steps of a consistency model", f"Its scheduler has {most} at most.")
        return super().time_grid(steps, height, width)

    def _bound(self, rows: Rows, times: Tensor | None, scale: float) -> Velocity:
        if times is None:
            require_velocity(self)
        return super()._bound(rows, times, scale)


class LatentConsistencyModel(ConsistencyModel, StableDiffusionModel):
    """Flow model of Stable Diffusion 1 and 2 as a latent consistency model (Luo et al. 2023, arXiv:2310.04378).

    The guidance scale is an input of the network. Its rows have embeds (B, L, D).

    Raises:
        UserError: the network or the scheduler is that of another model.
    """

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):
            raise UserError(
                f"the scheduler is a {type(scheduler).__name__}, which knows no consistency model",
                "Put LCMScheduler into scheduler/scheduler_config.json and model_index.json.",
            )
        if self.network is not None and self.network.config.get("time_cond_proj_dim") is None:
            raise UserError(
                "the network has no input for the guidance scale: it is no latent consistency model",
                "Name StableDiffusionPipeline in its model_index.json.",
            )

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network, and scale what it predicts so that at the data it is x; see `FlowModel.predict`."""
        pipeline, dim = self.pipeline, self.network.config.time_cond_proj_dim
        strength = torch.full((len(x),), guidance_scale - 1.0)  # 0 is none, as in their paper
        embedded = pipeline.get_guidance_scale_embedding(strength, embedding_dim=dim)
        condition = {**condition, "guidance": embedded.to(x)}
        wide, time = x.float(), expand_t(t, x)
        data = wide + (1.0 - time) * super().predict(x, t, condition, end, guidance_scale)
        timestep = self.timestep_of(t).reshape(time.shape)
        skip, out = pipeline.scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        jumped: Tensor = out * data + skip * wide / self._norm(time)
        return (jumped - wide) / (1.0 - time)

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        predicted: Tensor = self.evaluate(
            x, timestep, timestep_cond=condition["guidance"], encoder_hidden_states=condition["embeds"]
        )
        return predicted
