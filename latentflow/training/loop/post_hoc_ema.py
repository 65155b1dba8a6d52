"""Averages of the weights of any length, made after training from snapshots of a few.

Karras et al. 2024 (EDM2, arXiv:2312.02696), section 3 and appendix C. A power-function average weighs the weights of
time tau <= t in proportion to tau^gamma, so it grows with the run. Its length (sigma_rel) is the standard deviation of
that profile as a share of t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError

Array = NDArray[np.float64]

LONGEST = 12.0**-0.5  # gamma = 0: the plain mean of the whole run


def exponent(length: float) -> float:
    """gamma of the profile tau^gamma that has a relative ``length``.

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


def coefficients(snapshots: Sequence[tuple[float, int]], length: float, step: int) -> tuple[Array, float]:
    """How to mix snapshots into the average of another length: least squares between profiles (appendix C).

    The mix is made to weigh all steps by 1 in total, so that weights that never moved are met exactly.

    Args:
        snapshots: (relative length, step) of each.
        length: of the average that is wanted.
        step: at which it is wanted.

    Returns:
        (N,) factors, and by how much the mixed profile differs from the wanted one, relative to it in the L2 norm.

    Raises:
        UserError: a length that no profile has.
    """
    gammas = np.array([exponent(one) for one, _ in snapshots])
    steps = np.array([float(one) for _, one in snapshots])
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
    """(A, B): inner products of the profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], in closed form."""
    a, ta, b, tb = gamma_a[:, None], step_a[:, None], gamma_b[None], step_b[None]
    shared = np.minimum(ta, tb)
    # The powers as logarithms: t^gamma alone overflows.
    powers = (a + b + 1) * np.log(shared) - (a + 1) * np.log(ta) - (b + 1) * np.log(tb)
    return np.asarray((a + 1) * (b + 1) / (a + b + 1) * np.exp(powers))
