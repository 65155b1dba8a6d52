"""Probability paths of tokens, p_t(x | x1), from a source (t = 0) to the data (t = 1), position by position.

A path is a probability of every state given the data token, and rates of jumps that move it along. What a sampler
needs of them stays sparse: a target and one number for each position (``Jump``). The data token x1 is drawn from the
network's posterior first; averaged over it, the rates are those of the marginal path (Campbell et al. 2024,
arXiv:2402.04997; Gat et al. 2024, arXiv:2407.15595):

    d p_t / dt = p_t U_t,  U_t(x -> y) = sum over positions i and tokens x1 of p(x1_i | x) u_t(x_i -> y_i | x1_i).

A new path is one subclass of ``DiscretePath``, and one line in ``PATHS`` (table.py).

Rates that are infinite at an end of time (that of the jump to the data at t = 1, that back to the source at t = 0) are
taken a little before it, as ``Path.clip`` does: everything is finite on [0, 1]. Random numbers come from the caller, as
numbers in [0, 1): so each sample's may come from its own seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError, whole
from ..tensors import expand_t, time_dtype
from .kappas import Kappa, LinearKappa, checked_kappa
from .sources import MaskSource, Source


class Jump(NamedTuple):
    """A jump of each position: its ``target`` token, and the ``rate`` or the probability at which it happens.

    A target may be the present token: then nothing happens. Both are shaped like x, (B, ...).
    """

    target: Tensor
    rate: Tensor


class DiscreteSample(NamedTuple):
    """Tokens ``xt`` on a path, (B, ...), and what they were made from."""

    xt: Tensor
    x1: Tensor
    t: Tensor


class DiscretePath(ABC):
    """A path of tokens. x, x1 and uniform numbers are (B, ...), t is a scalar or (B,), in [0, 1].

    Attributes:
        vocabulary: V; tokens of the data are 0 to V - 1.
        states: V, and 1 more where the source has a mask, the token V.
        masked: whether the source is the mask.
    """

    vocabulary: int

    @property
    def states(self) -> int:
        return self.vocabulary

    @property
    def masked(self) -> bool:
        return False

    @property
    def interval(self) -> tuple[float, float]:
        """Times (first, last) between which all rates are finite."""
        return 1e-6, 1.0 - 1e-6

    @abstractmethod
    def progress(self, t: Tensor) -> Tensor:
        """The clock of the corrector and of the orders, from 0 at t = 0 to 1 at t = 1: kappa, where there is one."""

    def remainder(self, t: Tensor) -> Tensor:
        """1 - progress(t)."""
        return 1.0 - self.progress(t)

    @abstractmethod
    def probabilities(self, x1: Tensor, t: Tensor | float) -> Tensor:
        """p_t(. | x1): (B, ..., states). A tensor over all states: for checks and small vocabularies."""

    @abstractmethod
    def forward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """Rates of the jumps from x towards the data x1, (B, ..., states), 0 at x itself; for checks as well."""

    @abstractmethod
    def backward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """Rates of the jumps of the same path in reversed time, (B, ..., states), 0 at x itself.

        Both together, the forward rates and these, leave p_t as it is: the divergence-free part.
        """

    @abstractmethod
    def draw(self, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Tensor:
        """Return tokens of p_t(. | x1), as ``uniform`` decides."""

    @abstractmethod
    def forward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        """A jump towards the data x1: the law of ``forward_rates`` with the target drawn."""

    @abstractmethod
    def backward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        """A jump in reversed time: the law of ``backward_rates`` with the target drawn."""

    @abstractmethod
    def leap(self, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
        """The whole step from t to t_next given x1, with a *probability* in the place of the rate.

        It takes p_t(. | x1) to p_t_next(. | x1) exactly, with the fewest jumps: a token x stays with probability
        min(1, p_t_next(x) / p_t(x)), the others land where p grows.
        """

    def known(self, x: Tensor) -> Tensor:
        """Return the positions (bool) whose data token is x itself, whatever a network says: none here."""
        return torch.zeros_like(x, dtype=torch.bool)

    def clip(self, t: Tensor) -> Tensor:
        """Move ``t`` into ``interval``."""
        return t.clamp(*self.interval)

    def time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return ``t`` ready to broadcast along the rows of ``x``, in float64 on its device."""
        wide = expand_t(t, x)
        return wide.to(time_dtype(x.device)).to(x.device)

    def start(self, uniform: Tensor) -> Tensor:
        """Return tokens of the source, as the numbers ``uniform`` in [0, 1) decide, (B, ...)."""
        return self.draw(torch.zeros_like(uniform, dtype=torch.int64), 0.0, uniform)

    def sample(self, x1: Tensor, t: Tensor | float, uniform: Tensor) -> DiscreteSample:
        """Return tokens at ``t`` of the path that ends at the data ``x1``.

        Args:
            x1: (B, ...) tokens, int64, in [0, vocabulary).
            t: a scalar or (B,), in [0, 1].
            uniform: (B, ...) numbers in [0, 1), best in float64: one for each position decides its token.

        Raises:
            UserError: x1 holds no whole numbers, or numbers outside of the vocabulary.
            ValueError: the shapes differ, or t has a wrong shape or range.
        """
        check_tokens(x1, self.vocabulary, "the data x1")
        if uniform.shape != x1.shape:
            raise ValueError(
                f"the uniform numbers have shape {tuple(uniform.shape)} but x1 has shape {tuple(x1.shape)}: "
                "draw one number per token"
            )
        times = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        return DiscreteSample(self.draw(x1, t, uniform), x1, times)


def check_tokens(x: Tensor, states: int, what: str) -> None:
    """Refuse a tensor that holds no tokens.

    Raises:
        UserError: it is a single number, or not int64; or, where it is on the CPU, holds numbers outside of [0, states)
            (a GPU would have to be waited for).
    """
    if not x.ndim:
        raise UserError(f"{what} is a single token", "Pass a batch of them, (B, ...): for one row `x[None]`.")
    if x.dtype != torch.int64:
        raise UserError(f"{what} has dtype {x.dtype}", "Tokens are whole numbers: pass int64 (`.long()`).")
    if x.numel() and x.device.type == "cpu":
        low, high = (int(end) for end in x.aminmax())
        if low < 0 or high >= states:
            raise UserError(
                f"{what} holds tokens from {low} to {high}, but there are {states} states, 0 to {states - 1}",
                "Use the tokenizer that belongs to this path; only where the source is 'mask' does a path have the "
                "mask as a further state.",
            )


@dataclass(frozen=True)
class MixturePath(DiscretePath):
    """p_t(x | x1) = kappa(t) [x = x1] + (1 - kappa(t)) p_0(x): the data token, or still the source's.

    Gat et al. 2024 (arXiv:2407.15595). With k = kappa(t), the rates given x1 are

        forward    k' / (1 - k)  to x1,
        backward   k' / k        to a draw from p_0,

    and their sum, k' / (k (1 - k)) to a draw from p_t(. | x1), leaves p_t alone. Proof of the first: p_t U_t at y is
    k' / (1 - k) ([y = x1] - p_t(y)) = k' ([y = x1] - p_0(y)) = d p_t(y) / dt.

    Args:
        vocabulary: tokens of the data.
        kappa: an entry of ``KAPPAS``.
        source: an entry of ``SOURCES``.

    Raises:
        UserError: no vocabulary of at least 2; kappa is not 0 at t = 0 or not 1 at t = 1, or falls.
    """

    vocabulary: int
    kappa: Kappa = LinearKappa()
    source: Source = MaskSource()

    def __post_init__(self) -> None:
        whole("the vocabulary", self.vocabulary, 2, fix="Give the number of codes of the tokenizer.")
        checked_kappa(self.kappa)

    @property
    def states(self) -> int:
        return self.vocabulary + self.source.extra

    @property
    def masked(self) -> bool:
        return isinstance(self.source, MaskSource)

    def progress(self, t: Tensor) -> Tensor:
        return self.kappa(t)

    def remainder(self, t: Tensor) -> Tensor:
        return self.kappa.remainder(t)

    def rate(self, t: Tensor) -> Tensor:
        """k' / (1 - k), elementwise: the rate of the jump to the data token."""
        inner = self.clip(t)
        return self.kappa.derivative(inner) / self.kappa.remainder(inner)

    def backward_rate(self, t: Tensor) -> Tensor:
        """k' / k, elementwise: the rate of the jump to the source in reversed time."""
        inner = self.clip(t)
        return self.kappa.derivative(inner) / self.kappa(inner)

    def probabilities(self, x1: Tensor, t: Tensor | float) -> Tensor:
        time = self.time(t, x1)[..., None]
        data = torch.nn.functional.one_hot(x1, self.states)
        start = self.source.probabilities(self.vocabulary).to(time)
        return self.kappa(time) * data + self.kappa.remainder(time) * start

    def forward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        data = torch.nn.functional.one_hot(x1, self.states)
        rates = self.rate(self.time(t, x)[..., None]) * data
        return rates.scatter(-1, x[..., None], 0.0)

    def backward_rates(self, x: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        time = self.time(t, x)[..., None]
        start = self.source.probabilities(self.vocabulary).to(time)
        rates = (self.backward_rate(time) * start).expand(*x.shape, self.states)
        return rates.scatter(-1, x[..., None], 0.0)

    def draw(self, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Tensor:
        time = self.time(t, x1)
        k, rest = self.kappa(time), self.kappa.remainder(time)
        # What is left of a number that is not below kappa is uniform again: it draws from the source.
        left = ((uniform.to(k) - k) / rest).nan_to_num(nan=0.0).clamp(0.0, 1.0)
        return torch.where(uniform < k, x1, self.source.draw(left, self.vocabulary))

    def forward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        rate = self.rate(self.time(t, x))
        return Jump(x1, torch.where(x == x1, 0.0, rate))

    def backward(self, x: Tensor, x1: Tensor, t: Tensor | float, uniform: Tensor) -> Jump:
        target = self.source.draw(uniform, self.vocabulary)
        return Jump(target, torch.where(x == target, 0.0, self.backward_rate(self.time(t, x))))

    def leap(self, x: Tensor, x1: Tensor, t: float, t_next: float, uniform: Tensor) -> Jump:
        before, after = (self.remainder(self.time(time, x)) for time in (t, t_next))
        return Jump(x1, torch.where(x == x1, 0.0, ((before - after) / before).nan_to_num(nan=0.0)))

    def known(self, x: Tensor) -> Tensor:
        # The mask is in no data: what is not masked is the data token already.
        return x < self.vocabulary if self.masked else super().known(x)
