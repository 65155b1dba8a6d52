"""Training a velocity network on latents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...autoencoder import masked_source
from ...config import FlowConfig
from ...flow import PathSample, UniformTimes, loss_factor
from ...models import Condition
from ..loop.data_order import Draw, SampleRandom, seeded
from ..loop.distributed import uncached_autocast
from ..loop.ema import WeightAverage
from ..loop.loader import by_group, groups_of, numbered, to_device
from .alignment import Alignment, Teacher
from .latent_data import LatentData
from .masking import Masking
from .routing import Routing

_VALIDATION_TIMES = 4  # noises and times per validation image


class Times(NamedTuple):
    """The training times of a batch, each (B,) float64.

    Attributes:
        t: where the network is evaluated.
        end: of the interval that starts there; None without intervals.
        u: the uniform numbers that t comes from.
        late: bool, whose times are uniform.
    """

    t: Tensor
    end: Tensor | None
    u: Tensor
    late: Tensor


class Losses(NamedTuple):
    """Per-sample losses, each (B,).

    Attributes:
        plain: what curves and validation show.
        trained: what is minimised: the same, or weighted by itself.
        distance: of the features, with an alignment.
    """

    plain: Tensor
    trained: Tensor
    distance: Tensor | None


class FlowStage(nn.Module):
    """The loss of the velocity network (and of the text encoder that is trained along).

    A batch holds ``latents`` (B, C, h, w), perhaps ``latents_std`` of the same shape, ``numbers`` (the draws), and
    what the condition needs: ``class_labels`` (B,), or ``input_ids`` and ``attention_mask`` (B, L), or ``text``
    (B, L, D) and ``text_mask`` (B, L), or ``sizes`` (B, 6); perhaps ``noise``, shaped like the latents, that they are
    coupled with; perhaps ``weights`` (B,), factors on the losses in their
    mean, of which ``per_sample`` holds the plain ones. With ``masking`` the network also gets what is known of each
    image, and the batch holds what `Masking` needs. With ``routing`` some tokens skip blocks while it is trained;
    with ``alignment`` a second loss is added, logged as ``alignment``, and the batch may have to hold ``pixels``.
    ``samples`` is how many draws the whole run has, which ``time_uniform_from`` is a share of, ``samples_per_step``
    those of a step over all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        config: FlowConfig,
        seed: int,
        text_encoder: PreTrainedModel | None = None,
        masking: Masking | None = None,
        routing: Routing | None = None,
        alignment: Alignment | None = None,
        samples: int | None = None,
        samples_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.text_encoder = text_encoder
        self.alignment = alignment
        self._average: WeightAverage | None = None
        self._config, self._seed, self._masking, self._routing = config, seed, masking, routing
        self._choices = config.choices()
        self._uniform = UniformTimes(shift=self._choices.density.shift)
        if samples is None and config.time_uniform_from < 1.0:
            raise ValueError("time_uniform_from is a share of the run: give the samples of the run")
        self._samples, self._samples_per_step = samples, samples_per_step
        self._uniform_from = math.inf if samples is None else config.time_uniform_from * samples

    @property
    def masked(self) -> bool:
        """Whether the network sees masked images."""
        return self._masking is not None

    @property
    def needs_pixels(self) -> bool:
        """Whether a batch must hold ``pixels``."""
        return self.masked or (self.alignment is not None and self.alignment.needs_pixels)

    @property
    def learns_from_average(self) -> bool:
        """Whether the loop must hand over the weight average (`use_average`)."""
        return self.alignment is not None and self.alignment.needs_average

    def use_average(self, average: WeightAverage) -> None:
        """Learn from this average of the stage's weights; without one, from the weights as they are."""
        self._average = average

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, choices = self._config, self._choices
        x1 = batch["latents"]
        random = SampleRandom(self._seed, batch["numbers"], x1.device)
        times = self._times(random, batch["numbers"])
        drop = random.uniform() < (config.condition_dropout if self.training else 0.0)
        x0 = batch["noise"] if "noise" in batch else random.normal(x1.shape[1:])
        if "latents_std" in batch:
            x1 = x1 + batch["latents_std"] * random.normal(x1.shape[1:])
        condition, source = self._told(batch, drop)
        x0 = source(x0)
        if "noise" not in batch:  # else they are pairs as they are
            x0 = choices.coupling(
                x0, x1, _for_coupling(condition), seeded(self._seed, 2, batch["numbers"][0])
            )
        sample = choices.path.sample(x0, x1, times.t.to(x1.dtype))
        losses = self._losses(batch, sample, condition, random, times)
        result = {"per_sample": losses.plain.detach(), "t": times.t.detach()}
        total = losses.trained
        if total is not losses.plain:
            result["error"] = losses.plain.detach().mean()
        if losses.distance is not None and self.alignment is not None:
            total = total + self.alignment.weight * losses.distance
            result["alignment"] = losses.distance.detach().mean()
        return {"loss": (total * batch["weights"] if "weights" in batch else total).mean()} | result

    def _told(self, batch: dict[str, Any], drop: Tensor) -> tuple[Condition, Callable[[Tensor], Tensor]]:
        """The condition, with what is known of each image; and what makes of noise where the flow starts."""
        condition = self.condition(batch, drop)
        if self._masking is None:
            return condition, lambda noise: noise
        masked = self._masking(batch)
        condition = dataclasses.replace(condition, channels=masked.channels)
        if self._config.coupling != "data-dependent":
            return condition, lambda noise: noise
        return condition, lambda noise: masked_source(noise, masked.known, masked.hole)

    def _times(self, random: SampleRandom, numbers: list[int]) -> Times:
        """The training times: a pure function of the samples' running numbers."""
        u = random.uniform()
        late = self._late(numbers, u)
        return Times(self._quantile(u, late), None, u, late)

    def _quantile(self, u: Tensor, late: Tensor) -> Tensor:
        """(B,) the times of uniform numbers."""
        return torch.where(late, self._uniform.quantile(u), self._choices.density.quantile(u))

    def _losses(
        self,
        batch: dict[str, Any],
        sample: PathSample,
        condition: Condition,
        random: SampleRandom,
        times: Times,
    ) -> Losses:
        """What the objective says of the network at ``sample``."""
        config, choices = self._config, self._choices
        output, distance = self._predict(batch, sample, condition, random)
        per_sample = choices.objective(
            output,
            sample,
            path=choices.path,
            prediction=config.prediction,
            weight=self._weight(times.t, times.u, times.late),
            direction_weight=config.direction_weight,
            contrastive_weight=config.contrastive_weight if self.training and len(output) > 1 else 0.0,
        )
        return Losses(per_sample, per_sample, distance)

    def _predict(
        self,
        batch: dict[str, Any],
        sample: PathSample,
        condition: Condition,
        random: SampleRandom,
        **more: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The network's prediction, and (B,) how far its features are from what they shall be like, if anything.

        ``more`` is given to the network as it is.
        """
        given = self._choices.path.scale_input(sample.xt, sample.t), sample.t, condition
        if not self.training or (self._routing is None and self.alignment is None):
            return self.network(*given, **more), None
        route = None
        if self._routing is not None:
            route = self._routing(sample.xt.shape, random, batch["numbers"][0])
        if self.alignment is None:
            return self.network(*given, route=route, **more), None
        patch = self.alignment.patch_size
        grid = sample.xt.shape[2] // patch, sample.xt.shape[3] // patch
        teacher = self._teacher(batch, sample, condition)
        target = self.alignment.target(batch, sample.t, grid, random, teacher)
        output, features = self.network(*given, route=route, features=self.alignment.block, **more)
        return output, self.alignment(features, target, route)

    def _teacher(self, batch: dict[str, Any], sample: PathSample, condition: Condition) -> Teacher:
        """The averaged network, and text encoder, on the same pairs under the same conditions."""

        def features(t: Tensor, blocks: int) -> Tensor:
            average = self._average
            with (
                torch.no_grad(),
                uncached_autocast(t.device),
                average.applied() if average is not None else nullcontext(),
            ):
                averaged = self.condition(batch, condition.drop)
                averaged = dataclasses.replace(averaged, channels=condition.channels)
                path, t = self._choices.path, t.to(sample.xt.dtype)
                xt = path.scale_input(path.sample(sample.x0, sample.x1, t).xt, t)
                seen: Tensor = self.network(xt, t, averaged, features=blocks, only_features=True).features
                return seen

        return features

    def _late(self, numbers: list[int], u: Tensor) -> Tensor:
        """(B,) which draws have uniform times: of each by its own running number. None in validation."""
        return torch.tensor(
            [self.training and number >= self._uniform_from for number in numbers], device=u.device
        )

    def _weight(self, t: Tensor, u: Tensor, late: Tensor) -> Tensor | None:
        """(B,) factors on the squared errors; None for the plain loss."""
        path, weighting = self._choices.path, self._choices.weighting
        if weighting is None:
            return None
        slope = torch.where(late, self._uniform.slope(u), self._choices.density.slope(u))
        return loss_factor(weighting, path, self._config.prediction, t, slope)

    def condition(self, batch: dict[str, Any], drop: Tensor | None = None) -> Condition:
        """What the network is told of a batch; of ``drop`` (B,) rows the null."""
        text, mask = batch.get("text"), batch.get("text_mask")
        if self.text_encoder is not None and "input_ids" in batch:
            length = int(
                batch["attention_mask"].sum(1).max()
            )  # no work on columns that are padding in all rows
            ids, mask = batch["input_ids"][:, :length], batch["attention_mask"][:, :length]
            text = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            mask = mask.bool()
        return Condition(
            class_labels=batch.get("class_labels"),
            text=text,
            text_mask=mask,
            sizes=batch.get("sizes"),
            drop=drop,
        )


def _for_coupling(condition: Condition) -> Tensor | None:
    """What a condition-aware coupling compares rows by: labels (B,), or captions as their mean token (B, D)."""
    if condition.class_labels is not None or condition.text is None:
        return condition.class_labels
    text, mask = condition.text.detach().float(), condition.text_mask
    if mask is None:
        return text.mean(1)
    kept = mask[..., None].to(text)
    return (text * kept).sum(1) / kept.sum(1).clamp_min(1.0)


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
        for part in by_group(draws[start : start + batch_size], groups_of(data)):
            batch = numbered(data, part)
            total += float(stage(to_device(batch, device))["per_sample"].double().sum())
    return total / len(draws)
