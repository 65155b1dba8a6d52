"""Training a velocity network on latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..autoencoder import known_source
from ..data.masks import DEFAULT_SHAPES, check_shapes
from ..errors import UserError, lookup, unknown
from ..flow import (
    COUPLINGS,
    OBJECTIVES,
    PATHS,
    PREDICTIONS,
    TIME_DENSITIES,
    WEIGHTINGS,
    Coupling,
    Path,
    TimeDensity,
    Weighting,
    loss_factor,
    make,
)
from ..models import Condition
from .batches import by_group, groups_of, numbered, to_device
from .latent_data import LatentData
from .masking import OWN, Masking
from .order import Draw, SampleRandom, seeded

_VALIDATION_TIMES = 4  # noises and times per validation picture


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """What the velocity network learns: one choice from each table of `latentflow.flow` (docs/design-space.md).

    Raises:
        UserError: an unknown name or option (the nearest is named), or choices that do not go together.
    """

    path: str = "condot"
    """Probability path from noise to data: condot, variance-preserving, variance-exploding, trigonometric,
    polynomial, sqrt."""
    path_options: dict[str, float] = field(default_factory=dict)
    """Its settings, such as `beta_max 12`."""
    prediction: str = "velocity"
    """What the network predicts: velocity, data, noise or score."""
    coupling: str = "independent"
    """How noise and data are paired: independent, ot, sinkhorn, conditional-ot; with --inpainting also data-dependent
    (a flow from the known part, with noise in the hole only). Those in the middle pair within a forward pass, so that
    its size is part of what is learnt."""
    coupling_options: dict[str, float] = field(default_factory=dict)
    """Its settings, such as `regularization 0.05`."""
    objective: str = "flow-matching"
    """Loss."""
    weighting: str | None = None
    """Weighting of the noise levels as a function of the log-SNR: flow-matching, edm, min-snr, sigmoid, ...
    Empty: the plain squared error of the prediction, weighted by the density of the times."""
    weighting_options: dict[str, float] = field(default_factory=dict)
    """Its settings, such as `bias 2`."""
    time_density: str | None = None
    """Density of the training times t: uniform, logit-normal, mode, cosine-map, beta, power. Empty: logit-normal;
    with a weighting uniform, where the density decides nothing but how noisy the loss is."""
    time_options: dict[str, float] = field(default_factory=dict)
    """Its settings, such as `mean 0.5 std 1`; `shift 3` leans towards the noise, as large images need."""
    direction_weight: float = 0.0
    """Weight of the velocity-direction (cosine) term."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive term (Delta-FM); 0.05 is usual."""
    condition_dropout: float = 0.1
    """Share of the samples whose condition is replaced by the learned null, for classifier-free guidance."""
    inpainting: bool = False
    """Learn to inpaint as well, from what is left of each picture under random masks. On by itself if the data has
    masks of its own, or the checkpoint that is fine-tuned has learnt it."""
    mask_shapes: dict[str, float] = field(default_factory=dict)
    """Shares of the masks: rectangle, strokes, ellipse, half-plane, frame (outpainting), full (nothing is known: plain
    generation), none, and data (the picture's own mask). Empty: some of each but none; if the data has masks, these
    are half of all."""

    def __post_init__(self) -> None:
        choices = self.choices()
        if self.coupling == "data-dependent" and not self.inpainting:
            raise UserError(
                "coupling 'data-dependent' starts from the known part of a picture",
                "Add --inpainting; for another source use latentflow.flow.DataDependent from Python.",
            )
        check_shapes(self.shapes(has_masks=True), more=[OWN])
        if self.direction_weight and self.prediction != "velocity":
            raise UserError(
                f"direction_weight with prediction '{self.prediction}'",
                "Only velocities have a direction to learn.",
            )
        if not 0.0 <= self.contrastive_weight < 1.0:
            raise UserError(
                f"contrastive_weight {self.contrastive_weight}", "Use 0 to below 1; 0.05 is usual."
            )
        if self.weighting_options and choices.weighting is None:
            raise UserError("weighting_options are given without a weighting", "Name one with --weighting.")

    def shapes(self, has_masks: bool) -> dict[str, float]:
        """Shares of the shapes of masks, for data that have masks of their own or have not."""
        return self.mask_shapes or {
            **DEFAULT_SHAPES,
            **({OWN: sum(DEFAULT_SHAPES.values())} if has_masks else {}),
        }

    def choices(self) -> Choices:
        """The entries of the tables that this config names."""
        if self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, PREDICTIONS)
        weighting = None
        if self.weighting is not None:
            weighting = make(WEIGHTINGS, self.weighting, "weighting", **self.weighting_options)
        density = self.time_density or ("logit-normal" if weighting is None else "uniform")
        return Choices(
            path=make(PATHS, self.path, "path", **self.path_options),
            coupling=make(COUPLINGS, self.coupling, "coupling", **self.coupling_options),
            objective=lookup(OBJECTIVES, self.objective, "objective"),
            density=make(TIME_DENSITIES, density, "time density", **self.time_options),
            weighting=weighting,
        )


class Choices(NamedTuple):
    """One entry of each table."""

    path: Path
    coupling: Coupling
    objective: Callable[..., Tensor]
    density: TimeDensity
    weighting: Weighting | None


class FlowStage(nn.Module):
    """The loss of the velocity network (and of the text encoder that is trained along).

    A batch holds ``latents`` (B, C, h, w), perhaps ``latents_std`` of the same shape, ``numbers`` (the draws), and
    what the condition needs: ``class_labels`` (B,), or ``input_ids`` and ``attention_mask`` (B, L), or ``text``
    (B, L, D) and ``text_mask`` (B, L), or ``sizes`` (B, 6); perhaps ``weights`` (B,), factors on the losses in their
    mean, of which ``per_sample`` holds the plain ones. With ``masking`` the network also gets what is known of each
    picture, and the batch holds what `Masking` needs.
    """

    def __init__(
        self,
        network: nn.Module,
        config: FlowConfig,
        seed: int,
        text_encoder: PreTrainedModel | None = None,
        masking: Masking | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.text_encoder = text_encoder
        self._config, self._seed, self._masking = config, seed, masking
        self._choices = config.choices()

    @property
    def masked(self) -> bool:
        """Whether the network sees masked pictures, and a batch must hold ``pixels``."""
        return self._masking is not None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, choices = self._config, self._choices
        x1 = batch["latents"]
        random = SampleRandom(self._seed, batch["numbers"], x1.device)
        u = random.uniform()
        t = choices.density.quantile(u)
        drop = random.uniform() < (config.condition_dropout if self.training else 0.0)
        x0 = random.normal(x1.shape[1:])
        if "latents_std" in batch:
            x1 = x1 + batch["latents_std"] * random.normal(x1.shape[1:])
        condition = self._condition(batch, drop)
        if self._masking is not None:
            masked = self._masking(batch)
            condition = dataclasses.replace(condition, channels=masked.channels)
            if config.coupling == "data-dependent":
                x0 = known_source(x0, masked.known, masked.hole)
        x0 = choices.coupling(x0, x1, _for_coupling(condition), seeded(self._seed, 2, batch["numbers"][0]))
        sample = choices.path.sample(x0, x1, t.to(x1.dtype))
        output = self.network(choices.path.scale_input(sample.xt, sample.t), sample.t, condition)
        per_sample = choices.objective(
            output,
            sample,
            path=choices.path,
            prediction=config.prediction,
            weight=self._weight(t, u),
            direction_weight=config.direction_weight,
            contrastive_weight=config.contrastive_weight if self.training and len(x1) > 1 else 0.0,
        )
        weighted = per_sample * batch["weights"] if "weights" in batch else per_sample
        return {"loss": weighted.mean(), "per_sample": per_sample.detach(), "t": t.detach()}

    def _weight(self, t: Tensor, u: Tensor) -> Tensor | None:
        """(B,) factors on the squared errors; None for the plain loss."""
        path, weighting = self._choices.path, self._choices.weighting
        if weighting is None:
            return None
        return loss_factor(weighting, path, self._config.prediction, t, self._choices.density.slope(u))

    def _condition(self, batch: dict[str, Any], drop: Tensor) -> Condition:
        text, mask = batch.get("text"), batch.get("text_mask")
        if self.text_encoder is not None:
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
