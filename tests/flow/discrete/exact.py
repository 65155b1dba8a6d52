"""Token data that is a table, on every path: posteriors, marginals and rates over all states, in float64."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from latentflow.flow.discrete import (
    KAPPAS,
    SOURCES,
    DiscretePath,
    MetricPath,
    MixturePath,
    PolynomialKappa,
)

VOCABULARY = 4
_EMBEDDINGS = torch.tensor([[0.0, 0.0], [0.4, 0.1], [1.0, 0.3], [0.2, 1.1]], dtype=torch.float64)

#: Every pair of a kappa and a source, and metric paths.
EVERY_PATH: dict[str, DiscretePath] = {
    **{
        f"{kappa}-{source}": MixturePath(VOCABULARY, KAPPAS[kappa](), SOURCES[source]())
        for kappa, source in product(KAPPAS, SOURCES)
    },
    "polynomial-3-uniform": MixturePath(VOCABULARY, PolynomialKappa(3.0), SOURCES["uniform"]()),
    "metric": MetricPath(_EMBEDDINGS),
    "metric-slow-start": MetricPath(_EMBEDDINGS, scale=2.0, exponent=1.5, power=1.0),
    "metric-steep-start": MetricPath(_EMBEDDINGS, exponent=0.9),
}
#: One path of each kind, for what takes longer.
KINDS = {
    name: EVERY_PATH[full]
    for name, full in (("mask", "linear-mask"), ("uniform", "linear-uniform"), ("metric", "metric"))
}


def table(positions: int) -> Tensor:
    """Probabilities of all (V,) * positions data, far from independent."""
    generator = torch.Generator().manual_seed(3)
    q = torch.rand((VOCABULARY,) * positions, generator=generator, dtype=torch.float64)
    q = q**3 + torch.eye(VOCABULARY, dtype=torch.float64) if positions == 2 else q + 0.05
    return q / q.sum()


def all_states(path: DiscretePath, positions: int) -> Tensor:
    """(states^positions, positions) int64, in the order of the flattened table of states."""
    return torch.cartesian_prod(*[torch.arange(path.states)] * positions).reshape(-1, positions)


class Exact:
    """The exact posterior of a table of data on a path; calling it returns logits, -inf for what is impossible."""

    def __init__(self, path: DiscretePath, q: Tensor) -> None:
        self.path, self.q = path, q

    def joint(self, x: Tensor, t: Tensor | float) -> Tensor:
        """p(x1) p_t(x | x1) of every x1: (B, V, ...)."""
        data = torch.arange(VOCABULARY).expand(len(x), -1)
        conditional = self.path.probabilities(data, t)  # (B, V, states)
        joint = self.q.expand(len(x), *self.q.shape)
        for i in range(x.shape[1]):
            factor = conditional.gather(2, x[:, None, i, None].expand(-1, VOCABULARY, 1))[..., 0]
            shape = [len(x)] + [VOCABULARY if j == i else 1 for j in range(x.shape[1])]
            joint = joint * factor.reshape(shape)
        return joint

    def marginal(self, x: Tensor, t: Tensor | float) -> Tensor:
        """p_t(x): (B,)."""
        return self.joint(x, t).flatten(1).sum(1)

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        joint, dims = self.joint(x, t), range(1, x.shape[1] + 1)
        one = (
            [joint.sum([other for other in dims if other != own]) for own in dims]
            if len(dims) > 1
            else [joint]
        )
        marginals = torch.stack(one, 1)  # (B, D, V)
        total = marginals.sum(-1, keepdim=True)
        # A state that the path never reaches at t (a mask at t = 1) has no posterior.
        return torch.where(total > 0, marginals / total, 1.0 / VOCABULARY).log()


def generator_matrix(exact: Exact, x: Tensor, t: float, rates) -> Tensor:
    """U_t over all states ``x``: (N, N), rows sum to 0. ``rates``: the path's method, (x, x1, t) -> (..., states)."""
    posterior = exact(x, t).exp()  # (N, D, V)
    size, positions = exact.path.states, x.shape[1]
    matrix = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i in range(positions):
        data = torch.arange(VOCABULARY).expand(len(x), -1)
        here = x[:, i, None].expand(-1, VOCABULARY)
        rate = (posterior[:, i, :, None] * rates(here, data, t)).sum(1)  # (N, states)
        stride = size ** (positions - 1 - i)
        target = torch.arange(len(x))[:, None] + (torch.arange(size)[None] - x[:, i, None]) * stride
        matrix.scatter_add_(1, target, rate)
    return matrix - torch.diag(matrix.sum(1))


def total_variation(x: Tensor, q: Tensor) -> float:
    """Total variation between samples (B, D) of data tokens and the table ``q``."""
    place = torch.zeros(len(x), dtype=torch.int64)
    for i in range(x.shape[1]):
        place = place * VOCABULARY + x[:, i]
    share = torch.bincount(place, minlength=q.numel()).double() / len(x)
    return float(0.5 * (share - q.flatten()).abs().sum())
