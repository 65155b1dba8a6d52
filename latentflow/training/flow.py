"""Training a velocity network on latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import LatentTable, Source
from ..errors import lookup
from ..flow import COUPLINGS, OBJECTIVES, PATHS, sample_times
from ..models import Condition
from .images import is_flipped
from .loop import to_device
from .order import Draw, SampleRandom

_VALIDATION_TIMES = 4  # noises and times per validation picture


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What the velocity network learns."""

    path: str = "condot"
    """Probability path from noise to data."""
    coupling: str = "independent"
    """How noise and data are paired."""
    objective: str = "flow-matching"
    """Loss."""
    time_density: str = "logit-normal"
    """Density of the training times t."""
    time_mean: float = 0.0
    """Mean of logit(t); above 0 leans towards the data."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    direction_weight: float = 0.0
    """Weight of the velocity-direction (cosine) term."""
    condition_dropout: float = 0.1
    """Share of the samples whose condition is replaced by the learned null, for classifier-free guidance."""


class FlowStage(nn.Module):
    """The loss of the velocity network (and of the text encoder that is trained along).

    A batch holds ``latents`` (B, C, h, w), perhaps ``latents_std`` of the same shape, ``numbers`` (the draws), and
    what the condition needs: ``class_labels`` (B,), or ``input_ids`` and ``attention_mask`` (B, L), or ``text``
    (B, L, D) and ``text_mask`` (B, L).
    """

    def __init__(
        self, network: nn.Module, config: FlowConfig, seed: int, text_encoder: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.text_encoder = text_encoder
        self._config, self._seed = config, seed
        self._path = lookup(PATHS, config.path, "path")()
        self._coupling = lookup(COUPLINGS, config.coupling, "coupling")()
        self._objective = lookup(OBJECTIVES, config.objective, "objective")

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self._config
        x1 = batch["latents"]
        random = SampleRandom(self._seed, batch["numbers"], x1.device)
        t = sample_times(config.time_density, random.uniform(), config.time_mean, config.time_std)
        drop = random.uniform() < (config.condition_dropout if self.training else 0.0)
        x0 = random.normal(x1.shape[1:])
        if "latents_std" in batch:
            x1 = x1 + batch["latents_std"] * random.normal(x1.shape[1:])
        sample = self._path.sample(self._coupling(x0, x1, batch.get("class_labels")), x1, t.to(x1.dtype))
        velocity = self.network(sample.xt, sample.t, self._condition(batch, drop))
        per_sample = self._objective(velocity, sample, direction_weight=config.direction_weight)
        return {"loss": per_sample.mean(), "per_sample": per_sample.detach(), "t": t.detach()}

    def _condition(self, batch: dict[str, Any], drop: Tensor) -> Condition:
        text, mask = batch.get("text"), batch.get("text_mask")
        if self.text_encoder is not None:
            length = int(
                batch["attention_mask"].sum(1).max()
            )  # no work on columns that are padding in all rows
            ids, mask = batch["input_ids"][:, :length], batch["attention_mask"][:, :length]
            text = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask.bool()
        return Condition(class_labels=batch.get("class_labels"), text=text, text_mask=mask, drop=drop)


class LatentData:
    """Cached latents in memory as training data.

    Args:
        source: the pictures, for their names.
        table: their latents.
        conditions: rows that go with them: ``class_labels`` (N,), ``input_ids`` and ``attention_mask`` (N, L), ...
    """

    def __init__(self, source: Source, table: LatentTable, conditions: Mapping[str, Tensor]) -> None:
        self._source, self._table, self._conditions = source, table, conditions

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        rows = torch.tensor([draw.index for draw in draws])
        versions = self._table.mean.shape[1]
        flips = torch.tensor([int(versions > 1 and is_flipped(draw.number)) for draw in draws])
        batch: dict[str, Any] = {"latents": self._table.mean[rows, flips]}
        if self._table.std is not None:
            batch["latents_std"] = self._table.std[rows, flips]
        return batch | {name: values[rows] for name, values in self._conditions.items()}

    def name(self, index: int) -> str:
        return self._source.examples[index].name


@torch.no_grad()
def validation_loss(stage: FlowStage, data: LatentData, device: torch.device, batch_size: int = 64) -> float:
    """Mean loss over held-out samples at fixed noises and fixed times, conditions in place.

    The training loss is noise from one t to the next; this one moves only when the network does.
    """
    draws = [
        Draw(index, index * _VALIDATION_TIMES + k)
        for index in range(len(data))
        for k in range(_VALIDATION_TIMES)
    ]
    total = 0.0
    for start in range(0, len(draws), batch_size):
        part = draws[start : start + batch_size]
        batch = data.__getitems__(part) | {"numbers": [draw.number for draw in part]}
        total += float(stage(to_device(batch, device))["per_sample"].double().sum())
    return total / len(draws)
