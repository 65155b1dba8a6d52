"""Loss weightings: how much an error counts at each noise level, whatever the path, prediction and density of t.

In the convention of Kingma & Gao 2023 (arXiv:2303.00848), eq. 8, a weighting is a function w of the log-SNR
lambda = log(alpha^2 / sigma^2), and the loss is

    1/2 int w(lambda) E |noise - predicted noise|^2 d lambda.

``loss_factor`` turns w into the factor on a network's own squared error; the density of t is then importance
sampling only. A weighting matters up to a constant factor; the constants here are those of the formulas in the
docstrings. A new one is one class, and one line in ``WEIGHTINGS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import finite
from .paths import Path
from .predictions import convert
from .tensors import expand_t
from .times import check_positive

# Factors are taken at a t no nearer than this to 0 and 1, where log-SNRs are infinite.
_EDGE = 1e-5


class Weighting(Protocol):
    """w(lambda), elementwise."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        """(...) log-SNR -> (...) weight, >= 0."""
        ...


@dataclass(frozen=True)
class FlowMatchingWeighting:
    """e^(-lambda / 2): the plain velocity MSE on the straight path with uniform t (factor exactly 1 there).

    Also the velocity MSE on the cosine schedule (Salimans & Ho 2022, arXiv:2202.00512): Kingma & Gao, Table 1.
    """

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)


@dataclass(frozen=True)
class EDMWeighting:
    """N(lambda; -2 mean, (2 std)^2) (1 + e^(-lambda) / sigma_data^2): Kingma & Gao, Table 1, over sigma_data^2.

    Karras et al. 2022 (arXiv:2206.00364), Table 1: log sigma ~ N(``mean``, ``std``^2), sigma being sigma / alpha here.

    Raises:
        UserError: std or sigma_data is not positive, or mean not finite.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        finite("mean of the weighting", self.mean)
        check_positive("std of the weighting", self.std)
        check_positive("sigma_data of the weighting", self.sigma_data)

    def __call__(self, log_snr: Tensor) -> Tensor:
        return _normal(log_snr, -2.0 * self.mean, 2.0 * self.std) * (
            1 + torch.exp(-log_snr) / self.sigma_data**2
        )


@dataclass(frozen=True)
class CosineNoiseWeighting:
    """sech(lambda / 2): the noise MSE on the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672)."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return _sech(0.5 * log_snr)


@dataclass(frozen=True)
class MinSNR:
    """sech(lambda / 2) min(1, gamma e^(-lambda)): Min-SNR-gamma on the cosine schedule.

    Hang et al. 2023 (arXiv:2303.09556), eq. 8: the data MSE weighted by min(SNR, gamma).

    Raises:
        UserError: gamma is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_positive("gamma of the weighting", self.gamma)

    def __call__(self, log_snr: Tensor) -> Tensor:
        return _sech(0.5 * log_snr) * (self.gamma * torch.exp(-log_snr)).clamp(max=1.0)


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(bias - lambda): Kingma & Gao, sec. 5, whose bias is the default.

    Raises:
        UserError: bias is not finite.
    """

    bias: float = 2.0

    def __post_init__(self) -> None:
        finite("bias of the weighting", self.bias)

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(self.bias - log_snr)


@dataclass(frozen=True)
class Likelihood:
    """1: the evidence lower bound (Kingma & Gao, sec. 3)."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class SD3Weighting:
    """e^(-lambda / 2) q(t(lambda)): the effect of logit-normal times on the straight path, for times of any density.

    Esser et al. 2024 (arXiv:2403.03206), eq. 18-19; q is the logit-normal density with logit t = lambda / 2. A
    positive ``mean`` leans towards the data (their t = 1 is noise, so their location m is -mean).

    Raises:
        UserError: std is not positive, or mean not finite.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        finite("mean of the weighting", self.mean)
        check_positive("std of the weighting", self.std)

    def __call__(self, log_snr: Tensor) -> Tensor:
        # e^(-lambda/2) / (t (1 - t)) = (1 + e^(-lambda/2))^2
        return (1 + torch.exp(-0.5 * log_snr)) ** 2 * _normal(0.5 * log_snr, self.mean, self.std)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "flow-matching": FlowMatchingWeighting,
    "cosine-velocity": FlowMatchingWeighting,
    "cosine-noise": CosineNoiseWeighting,
    "edm": EDMWeighting,
    "min-snr": MinSNR,
    "sigmoid": Sigmoid,
    "likelihood": Likelihood,
    "sd3": SD3Weighting,
}


def loss_factor(
    weighting: Weighting, path: Path, prediction: str, t: Tensor, slope: Tensor | float = 1.0
) -> Tensor:
    """Return the factor on a network's squared error at t: w(lambda) |d lambda / dt| k^2 slope / 2.

    k is the error that an error of 1 in the prediction causes in the noise. With this factor, E over t of
    factor(t) |prediction error|^2 is the weighted loss at the head of this file.

    Args:
        weighting: an entry of ``WEIGHTINGS``.
        prediction: "velocity", "data", "noise" or "score".
        t: () or (B,), in [0, 1]. Nearer to an end than 1e-5 the factor at 1e-5 is taken, so that it is finite.
        slope: 1 / density of the t's, ``TimeDensity.slope(u)``; 1 for uniform t.

    Returns:
        Shaped like ``t``, float64.

    Raises:
        UserError: unknown prediction.
        ValueError: t has another shape, or is outside [0, 1].
    """
    inside = path.clip(expand_t(t, t).to(torch.float64).clamp(_EDGE, 1.0 - _EDGE))
    noise_error = convert(
        torch.ones_like(inside), torch.zeros_like(inside), inside, path, source=prediction, target="noise"
    )
    weight = weighting(path.log_snr(inside)) * path.d_log_snr(inside).abs()
    return 0.5 * weight * noise_error.square() * slope


def _sech(x: Tensor) -> Tensor:
    return 1.0 / torch.cosh(x)


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))
