"""The path of tokens by way of their neighbours: its probabilities fall with the distance from the data token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ..tensors import time_dtype
from .categorical import draw_by_rows
from .paths import DiscretePath, Jump


@dataclass(frozen=True, eq=False)
class MetricPath(DiscretePath):
    """p_t(x | x1) = softmax over x of -beta(t) d(x, x1), from uniform to x1 by way of the tokens near x1.

    Shaul et al. 2024 (arXiv:2412.03487): d(x, x1) = |e(x) - e(x1)|^power for embeddings e (the codebook of a
    tokenizer), beta(t) = scale (t / (1 - t))^exponent. Their kinetic-optimal rates given x1,

        forward    beta'(t) p_t(y | x1) max(d(x, x1) - d(y, x1), 0)  to y,

    never lead away from x1. They move p_t: what flows into y less what flows out is
    beta' p_t(y) sum_z p_t(z) (d(z) - d(y)) = d p_t(y) / dt. In reversed time the difference has the other sign.

    Args:
        embeddings: (V, E), one row for each token.
        scale, exponent: of beta. Below an exponent of 1 the rate is infinite at t = 0, and is taken after it.
        power: of the distance.

    Raises:
        UserError: fewer than two embeddings, or not (V, E), not finite, or two that are equal (the path would not end
            at the data); scale, exponent or power is not positive and finite.
    """

    embeddings: Tensor
    scale: float = 3.0
    exponent: float = 1.0
    power: float = 2.0

    def __post_init__(self) -> None:
        e = self.embeddings
        if e.ndim != 2 or len(e) < 2:
            raise UserError(
                f"the embeddings have shape {tuple(e.shape)}", "Pass the codebook, (tokens, channels)."
            )
        if not bool(e.isfinite().all()):
            raise UserError("the embeddings are not all finite", "Look at the tokenizer's codebook.")
        different = len(e.unique(dim=0))
        if different < len(e):
            raise UserError(
                f"{len(e) - different} of {len(e)} embeddings are equal to others, so their distance is 0",
                "A codebook with equal codes has collapsed: train its tokenizer with dead codes restarted.",
            )
        for name in ("scale", "exponent", "power"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise UserError(f"{name} {value} of the metric path", "Use a positive, finite number.")

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        return len(self.embeddings)

    def progress(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        """The inverse temperature: 0 at t = 0, grows without bound (here to 1e30, which is enough) towards t = 1."""
        return (self.scale * (t / (1.0 - t)) ** self.exponent).clamp(max=1e30)

    def d_beta(self, t: Tensor) -> Tensor:
        """d beta / dt, at the clipped t."""
        t = self.clip(t)
        return self.scale * self.exponent * (t / (1.0 - t)) ** (self.exponent - 1.0) / (1.0 - t) ** 2

    def distances(self, x1: Tensor) -> Tensor:
        """d(., x1): (..., V), exactly 0 at x1."""
        e = self.embeddings.to(x1.device, time_dtype(x1.device))
        flat = torch.cdist(e[x1.flatten()], e, compute_mode="donot_use_mm_for_euclid_dist") ** self.power
        return flat.reshape(*x1.shape, -1)

    def probabilities(self, x1: Tensor, t: Tensor | float) -> Tensor:
        return self._softmax(self.distances(x1), self.time(t, x1)[..., None])

    def forward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        return self._rates(x, x1, self.time(t, x)[..., None], 1.0)

    def backward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        return self._rates(x, x1, self.time(t, x)[..., None], -1.0)

    def draw(self, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Tensor:
        flat, time = x1.flatten(), self.time(t, x1).expand(x1.shape).flatten()
        rows = torch.arange(len(flat), device=x1.device)
        weights = lambda i: self._softmax(self.distances(flat[i]), time[i, None])  # noqa: E731
        return draw_by_rows(weights, rows, self.vocabulary, uniform.flatten()).place.reshape(x1.shape)

    def forward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        return self._jump(x, x1, t, uniform, 1.0)

    def backward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        return self._jump(x, x1, t, uniform, -1.0)

    def leap(self, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
        flat, data = x.flatten(), x1.flatten()
        before, after = (self.time(time, x) for time in (t, t_next))
        stays = torch.empty(flat.shape, dtype=before.dtype, device=x.device)

        def growth(i: Tensor) -> Tensor:
            distance = self.distances(data[i])
            p, p_next = (self._softmax(distance, time) for time in (before, after))
            here, after_here = (value.gather(1, flat[i, None])[:, 0] for value in (p, p_next))
            stays[i] = (after_here / here).nan_to_num(nan=1.0).clamp(max=1.0)
            return p_next.sub_(p).clamp_(min=0.0)

        rows = torch.arange(len(flat), device=x.device)
        target = draw_by_rows(growth, rows, self.vocabulary, uniform.flatten()).place
        return Jump(target.reshape(x.shape), (1.0 - stays).reshape(x.shape))

    def _softmax(self, distance: Tensor, time: Tensor) -> Tensor:
        return (-self.beta(time) * distance).softmax(-1)

    def _rates(self, x: Tensor, x1: Tensor, time: Tensor, sign: float) -> Tensor:
        distance = self.distances(x1)
        nearer = (sign * (distance.gather(-1, x[..., None]) - distance)).clamp_(min=0.0)
        return self.d_beta(time) * self._softmax(distance, self.clip(time)) * nearer

    def _jump(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor, sign: float) -> Jump:
        flat, data, time = x.flatten(), x1.flatten(), self.time(t, x).expand(x.shape).flatten()
        rows = torch.arange(len(flat), device=x.device)
        weights = lambda i: self._rates(flat[i], data[i], time[i, None], sign)  # noqa: E731
        drawn = draw_by_rows(weights, rows, self.vocabulary, uniform.flatten())
        target = torch.where(drawn.total > 0, drawn.place, flat)
        return Jump(target.reshape(x.shape), drawn.total.reshape(x.shape))
