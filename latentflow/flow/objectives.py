"""Training objectives: per-sample losses. A new one is one function, and one line in ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, lookup
from .few_step.average_velocity import AverageObjective, average_velocity_loss
from .few_step.consistency import Consistency
from .few_step.mean_flow import AlphaFlow, MeanFlow
from .few_step.shortcut import Progressive, Shortcut
from .paths import CondOT, Path, PathSample
from .tensors import compute_dtype

_STRAIGHT = CondOT()


def flow_matching_loss(
    output: Tensor,
    sample: PathSample,
    *,
    path: Path = _STRAIGHT,
    prediction: str = "velocity",
    weight: Tensor | None = None,
    direction_weight: float = 0.0,
    contrastive_weight: float = 0.0,
) -> Tensor:
    """||output - target||^2, averaged over everything but the rows.

    With the velocity it is flow matching: Lipman et al. 2022 (arXiv:2210.02747), eq. 9. With the noise on the
    variance-preserving path it is DDPM's simple loss: Ho et al. 2020 (arXiv:2006.11239), eq. 14.

    Args:
        output: the network's prediction, (B, C, ...), at ``sample.xt`` and ``sample.t``.
        sample: from ``path.sample``.
        path: the path of the sample; only "score" and the contrastive term look at it.
        prediction: what the network predicts, and the target: "velocity" (``sample.velocity``), "data" (x1), "noise"
            (x0) or "score" (-x0 / sigma, for a standard normal source; sigma counts as 1e-3 where it is less).
        weight: (B,) factors on the squared errors, from ``loss_factor``.
        direction_weight: times 1 - cos(velocity, target), the cosine over channels, averaged over positions, is
            added: Yao et al. 2024 (FasterDiT, arXiv:2410.10356), also in LightningDiT (arXiv:2501.01423).
        contrastive_weight: times ||output - another row's target||^2 is subtracted: Stoica et al. 2025 (Delta-FM,
            arXiv:2506.05350), who use 0.05. The other row is the one before, its target taken at this row's t. The
            optimum is (target - weight * mean target) / (1 - weight), no longer the velocity of the data itself.

    Returns:
        (B,), float32 or better.

    Raises:
        UserError: unknown prediction; a direction for something else than velocities; contrastive_weight outside
            [0, 1), where the loss has no minimum.
        ValueError: the output is not shaped like the target, or the weight not (B,); one row has no other to
            contrast.
    """
    target = _target(sample, path, prediction)
    if output.shape != target.shape:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for a {prediction} of shape "
            f"{tuple(target.shape)}: its out_channels must equal the latent channels"
        )
    output = output.to(compute_dtype(output, target))
    loss = _squared_error(output, target)
    if contrastive_weight:
        _check_contrast(contrastive_weight, len(output))
        x0, x1 = sample.x0.roll(1, 0), sample.x1.roll(1, 0)
        other = _target(path.sample(x0, x1, sample.t), path, prediction)
        loss = loss - contrastive_weight * _squared_error(output, other)
    if weight is not None:
        if weight.shape != loss.shape:
            raise ValueError(
                f"the weight has shape {tuple(weight.shape)}: pass one per row, {tuple(loss.shape)}"
            )
        loss = weight.to(loss) * loss
    if direction_weight:
        if prediction != "velocity":
            raise UserError(
                f"direction weight {direction_weight} for a network that predicts the {prediction}",
                "It compares velocities: predict the velocity, or set the direction weight to 0.",
            )
        misdirection = 1.0 - torch.cosine_similarity(output, target.to(output), dim=1)  # (B, ...)
        loss = loss + direction_weight * misdirection.reshape(len(output), -1).mean(1)
    return loss


_SMALLEST_SIGMA = 1e-3  # the score's target -x0 / sigma is infinite at t = 1


def _target(sample: PathSample, path: Path, prediction: str) -> Tensor:
    targets: dict[str, Callable[[], Tensor]] = {
        "velocity": lambda: sample.velocity,
        "data": lambda: sample.x1,
        "noise": lambda: sample.x0,
        "score": lambda: -sample.x0 / path.at(sample.t, sample.x0).sigma.clamp(min=_SMALLEST_SIGMA),
    }
    return lookup(targets, prediction, "prediction")()


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target.to(output)).square().flatten(1).mean(1)


def _check_contrast(weight: float, rows: int) -> None:
    if not 0.0 <= weight < 1.0:
        raise UserError(f"contrastive weight {weight}", "Use at least 0 and less than 1; 0.05 is usual.")
    if rows < 2:
        raise ValueError(f"{rows} row: the contrastive term needs another; use batches of at least 2 rows")


def _no_settings() -> None:
    """An objective without settings of its own."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An entry of ``OBJECTIVES``; called, it is its loss.

    Attributes:
        loss: (output, sample, ...) -> (B,): of what the network returned at ``sample``.
        settings: makes the settings of its own from the options that a user wrote.
        average: whether the network learns average velocities: its output is that of an interval, and the settings,
            an ``AverageObjective``, say what that should be.
    """

    loss: Callable[..., Tensor]
    settings: Callable[..., Any] = _no_settings
    average: bool = False

    def __call__(self, output: Tensor, sample: PathSample, **options: Any) -> Tensor:
        return self.loss(output, sample, **options)


def _averages(settings: type[AverageObjective]) -> Objective:
    """The objective with these settings: its targets are theirs, its loss is ``average_velocity_loss``."""

    def loss(output: Tensor, sample: PathSample, *, target: Tensor, **weight: float) -> Tensor:
        return average_velocity_loss(output, target, **weight)

    return Objective(loss=loss, settings=settings, average=True)


OBJECTIVES: dict[str, Objective] = {
    "flow-matching": Objective(loss=flow_matching_loss),
    **{
        settings.name: _averages(settings)
        for settings in (MeanFlow, AlphaFlow, Shortcut, Consistency, Progressive)
    },
}
