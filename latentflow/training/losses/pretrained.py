"""The flow-matching loss of a pretrained model's network, with the times and weights of its family."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ...config import FlowConfig
from ...families import FlowModel
from ...families.model import Rows
from .flow import Density, FlowLoss


class PretrainedLoss(FlowLoss):
    """The loss of a pretrained model's network.

    A batch holds ``rows`` of the model, B of them, in the place of prompts; see `FlowLoss` for the rest. Where the
    config names no density of times and no weighting, those of the family count: see `FlowModel.training_density` and
    `FlowModel.loss_weight`.

    Args:
        model: the flow model; its network is trained.
        config, seed, options: see `FlowLoss`.
        guidance_scale: that a network with such an input is given; default: the family's.
        size: (height, width) in pixels of the images, on which the density of some families depends.
    """

    def __init__(
        self,
        model: FlowModel,
        config: FlowConfig,
        seed: int,
        *,
        guidance_scale: float | None = None,
        size: tuple[int, int],
        **options: Any,
    ) -> None:
        scale = model.training_guidance if guidance_scale is None else guidance_scale
        super().__init__(_Network(model, scale), config, seed, **options)
        self._null, self._loss_weight = model.null(1), model.loss_weight
        if config.time_density is None and config.weighting is None:
            density = model.training_density(*size)
            self.density = lambda sample_ids: density

    def prompts(self, batch: dict[str, Any], drop: Tensor | None = None) -> Any:
        """Return the rows of a batch; those where ``drop`` (B,) holds are the empty prompt."""
        rows: Rows = batch["rows"]
        if drop is None or not drop.any():
            return rows
        places = torch.arange(len(rows)) + len(rows) * drop.cpu()
        return Rows.cat([rows, self._null.repeat(len(rows))])[places]

    def compared_by(self, condition: Any) -> Tensor | None:
        """Return None: rows of different models have nothing in common that could be compared."""
        return None

    def weight(self, t: Tensor, u: Tensor, density: Density) -> Tensor | None:
        """Return factors (B,) on the squared errors; None: 1."""
        if self.choices.weighting is None:
            return self._loss_weight(t)
        return super().weight(t, u, density)

    def source(self, noise: Tensor, condition: Any) -> Tensor:
        """Return the noise: no pretrained model starts from anything else."""
        return noise


class _Network(nn.Module):
    """A model's network, called as those of our own are: network(xt, t, rows)."""

    def __init__(self, model: FlowModel, guidance_scale: float) -> None:
        super().__init__()
        self.network = model.network
        self._model, self._guidance_scale = model, guidance_scale

    def train(self, mode: bool = True) -> Self:
        """Leave the network in evaluation mode, but for the dropout of an adapter: HiDream's has another output in
        training mode, and no other network of diffusers a difference. As in diffusers' own training program, no
        gradient passes HiDream's routed experts then."""
        super().train(mode)
        self.network.eval()
        for name, part in self.network.named_modules():
            if "lora_dropout" in name:
                part.train(mode)
        return self

    def forward(self, xt: Tensor, t: Tensor, rows: Rows) -> Tensor:
        x, condition = xt.to(self._model.dtype), self._model.prepare(rows)
        output = self._model.predict(x, t.float(), condition, None, self._guidance_scale)
        return output.float()
