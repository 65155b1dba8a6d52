"""Schrodinger bridges without simulation: Brownian bridges between entropically coupled ends.

[SF]2M, Tong et al. 2023 (arXiv:2307.03672): regress a velocity and a score on the samples drawn here; then sample by
the ODE with the velocity, or by the SDE dx = (velocity + sigma^2/2 score) dt + sigma dW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .couplings import Sinkhorn
from .tensors import compute_dtype, expand_t, normal_like


class BridgeSample(NamedTuple):
    """A point on a Brownian bridge, its regression targets, and what it was made from; all (B, ...) but ``t``."""

    xt: Tensor
    velocity: Tensor
    score: Tensor
    x0: Tensor
    x1: Tensor
    t: Tensor
    noise: Tensor


@dataclass(frozen=True)
class SchrodingerBridge:
    """The bridge whose reference is Brownian motion of diffusion ``sigma``: x_t ~ N((1-t) x0 + t x1, sigma^2 t (1-t)).

    For pairs from ``coupling`` the mixture of these bridges is the Schrodinger bridge; with other pairs the targets
    still lead from source to data, by another process.

    With s = sigma sqrt(t (1-t)) and x_t = (1-t) x0 + t x1 + s z, the targets are
    velocity = ds/dt z + x1 - x0 and score = -z / s. Both grow without bound towards t = 0 and 1, where the targets
    (not the functions they average to) have no limit: there s and ds/dt are those of t clipped to ``interval``.

    Raises:
        UserError: ``sigma`` is not positive.
    """

    sigma: float = 1.0

    #: Where s and ds/dt are evaluated.
    interval: ClassVar[tuple[float, float]] = (1e-5, 1 - 1e-5)

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(
                f"sigma must be positive, not {self.sigma}",
                "Without noise use the path 'condot' and the coupling 'ot'.",
            )

    @property
    def coupling(self) -> Sinkhorn:
        """The static bridge between the ends: the entropic plan at regularization 2 sigma^2 of the squared distance."""
        return Sinkhorn(regularization=2 * self.sigma**2, relative=False)

    def sample(
        self,
        x0: Tensor,
        x1: Tensor,
        t: Tensor | float,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> BridgeSample:
        """A point at ``t`` of a Brownian bridge from ``x0`` to ``x1``, with its targets.

        Args:
            x0, x1: (B, ...) of equal shape, already paired.
            t: a scalar or (B,), in [0, 1].
            generator: decides the noise where none is given.
            noise: z, standard normal, (B, ...).

        Returns:
            ``xt``, ``velocity`` and ``score`` in the dtype of x0 and x1; half precision is calculated in float32.

        Raises:
            ValueError: the shapes differ, t has a wrong shape or range, or both noise and generator are given.
        """
        if x0.shape != x1.shape:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)} but x1 has shape {tuple(x1.shape)}: "
                "pair each data row with one source row"
            )
        dtype, precision = torch.promote_types(x0.dtype, x1.dtype), compute_dtype(x0, x1)
        if noise is None:
            noise = normal_like(x1.to(precision), generator)
        elif generator is not None:
            raise ValueError("both noise and a generator to draw it with are given: pass one of them")
        elif noise.shape != x1.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)} but x1 has shape {tuple(x1.shape)}")
        source, data, z = x0.to(precision), x1.to(precision), noise.to(precision)
        wide = expand_t(t, data)
        inside = wide.clamp(*self.interval)
        xt = source + wide.to(data) * (data - source) + self.std(wide).to(data) * z
        velocity = self.d_std(inside).to(data) * z + data - source
        score = -z / self.std(inside).to(data)
        times = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        return BridgeSample(xt.to(dtype), velocity.to(dtype), score.to(dtype), x0, x1, times, noise)

    def std(self, t: Tensor) -> Tensor:
        """s = sigma sqrt(t (1-t)), elementwise."""
        return self.sigma * (t * (1 - t)).sqrt()

    def d_std(self, t: Tensor) -> Tensor:
        """ds/dt, elementwise; infinite at t = 0 and 1."""
        return self.sigma * (1 - 2 * t) / (2 * (t * (1 - t)).sqrt())

    def score_weight(self, t: Tensor | float, x: Tensor) -> Tensor:
        """lambda(t) = s, ready to multiply ``x``: with it the score's target becomes -z, unit noise at every t."""
        return self.std(expand_t(t, x).clamp(*self.interval)).to(x.device, compute_dtype(x))


def bridge_matching_loss(
    velocity: Tensor, score: Tensor, sample: BridgeSample, bridge: SchrodingerBridge
) -> Tensor:
    """|velocity - target|^2 + lambda^2 |score - target|^2, averaged over everything but the rows: (B,).

    Tong et al. 2023 (arXiv:2307.03672), the [SF]2M objective, with lambda = sigma sqrt(t (1-t)). Their
    2 sqrt(t (1-t)) / sigma is the same for a network whose output is sigma^2/2 score.

    Args:
        velocity, score: (B, ...), from two networks or the two heads of one, at ``sample.xt`` and ``sample.t``.
        sample: from ``bridge.sample``.

    Raises:
        ValueError: an output is not shaped like the sample.
    """
    for name, output in (("velocity", velocity), ("score", score)):
        if output.shape != sample.xt.shape:
            raise ValueError(
                f"the {name} has shape {tuple(output.shape)} but the sample {tuple(sample.xt.shape)}"
            )
    precision = compute_dtype(velocity, score)
    weight = bridge.score_weight(sample.t, score)
    of_velocity = velocity.to(precision) - sample.velocity
    of_score = weight * (score.to(precision) - sample.score)
    return (of_velocity.square() + of_score.square()).flatten(1).mean(1)
