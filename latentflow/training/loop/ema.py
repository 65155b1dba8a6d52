"""Moving averages of the weights, and averages of any length made after training from snapshots of a few.

Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3 and appendix C. A power-function average weighs the weights of
time tau <= t in proportion to tau^gamma, so it grows with the run. Its length (sigma_rel) is the standard deviation of
that profile as a share of t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import UserError
from .distributed import local

Array = NDArray[np.float64]

LONGEST = 12.0**-0.5  # gamma = 0: the plain mean of the whole run


def exponent(length: float) -> float:
    """Return gamma of the profile tau^gamma that has a relative ``length``.

    The length is sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)): a cubic equation in gamma.

    Raises:
        UserError: there is none; the length is not above 0 and at most `LONGEST`.
    """
    if not 0.0 < length <= LONGEST:
        raise UserError(
            f"a weight average of relative length {length}",
            f"Use above 0 to {LONGEST:.3f} (the mean of the whole run); 0.05 to 0.1 are usual.",
        )
    roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
    return max(0.0, float(roots.real.max()))


def warmed_up(decay: float) -> Callable[[int], float]:
    """Return the decay min(decay, (1 + step) / (10 + step)), so that initial weights do not rule short runs."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_function(length: float) -> Callable[[int], float]:
    """Return the decay of an average whose profile is a power of time: Karras et al. 2024 (EDM2), section 3.1.

    Args:
        length: relative; see `exponent`.
    """
    power = exponent(length) + 1.0
    return lambda step: (1.0 - 1.0 / step) ** power


class WeightAverage:
    """Moving average of a module's trainable parameters, kept in float32 beside them.

    Args:
        decay: step (1-based) -> the share of the average that stays; see `warmed_up` and `power_function`.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        self.decay = decay
        named = module.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the averages towards the current weights, after ``step`` (1-based) updates.

        Args:
            instead: parameter -> the tensor to average in its place, or this process's part of it.
        """
        averages = [local(average) for average in self.averages.values()]
        weights = [
            local((instead or {}).get(parameter, parameter)) for parameter in self._parameters.values()
        ]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Restore the averages from a checkpoint."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the module's weights are the averages; afterwards they are the live ones again.

        Not for a sharded module, whose weights' place in memory must stay.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            live = parameter.data
            parameter.data = self.averages[name]
            self.averages[name] = live


def coefficients(snapshots: Sequence[tuple[float, int]], length: float, step: int) -> tuple[Array, float]:
    """Return factors that mix snapshots into the average of another length: least squares of profiles (appendix C).

    The mix weighs all steps by 1 in total, so that weights that never moved are met exactly.

    Args:
        snapshots: (relative length, step) of each.
        length, step: of the average that is wanted.

    Returns:
        (N,) factors, and the distance of the mixed profile from the wanted one, relative to it in the L2 norm.

    Raises:
        UserError: a length that no profile has.
    """
    gammas = np.array([exponent(known) for known, _ in snapshots])
    steps = np.array([float(taken) for _, taken in snapshots])
    wanted, now = np.array([exponent(length)]), np.array([float(step)])
    products = _products(gammas, steps, gammas, steps)
    targets = _products(gammas, steps, wanted, now)[:, 0]
    (norm,) = _products(wanted, now, wanted, now)[0]
    # In units of each profile's norm: later profiles are wider and lower. The last row and column hold the sum to 1.
    scale = 1.0 / np.sqrt(np.diag(products))
    system = np.zeros((len(scale) + 1, len(scale) + 1))
    system[:-1, :-1] = products * np.outer(scale, scale)
    system[-1, :-1] = system[:-1, -1] = scale / scale.max()
    right = np.append(targets * scale, 1.0 / scale.max())
    factors: Array = np.linalg.lstsq(system, right, rcond=1e-14)[0][:-1] * scale
    residual = norm - 2.0 * factors @ targets + factors @ products @ factors
    return factors, float(np.sqrt(max(0.0, residual) / norm))


def _products(gamma_a: Array, step_a: Array, gamma_b: Array, step_b: Array) -> Array:
    """Return inner products (A, B) of the profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], in closed form."""
    a, ta, b, tb = gamma_a[:, None], step_a[:, None], gamma_b[None], step_b[None]
    shared = np.minimum(ta, tb)
    # The powers as logarithms: t^gamma alone overflows.
    powers = (a + b + 1) * np.log(shared) - (a + 1) * np.log(ta) - (b + 1) * np.log(tb)
    return np.asarray((a + 1) * (b + 1) / (a + b + 1) * np.exp(powers))
