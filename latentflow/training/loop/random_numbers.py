"""Random numbers of samples: pure functions of the seed, the sample's id and the number's place.

So neither the batch, the order of the samples, the device nor the number of processes changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...flow.tensors import time_dtype
from .data_order import Stream, seeded

Device = torch.device | str
Shape = torch.Size | tuple[int, ...]


class SampleRandom(Protocol):
    """Random numbers for a batch; a row of what is drawn depends only on the seed and its sample's id."""

    def normal(self, shape: Shape) -> Tensor:
        """Draw (B, *shape) standard normal float32, on the device of the batch."""

    def uniform(self, device: Device | None = None) -> Tensor:
        """Draw (B,) of `time_dtype`, in the open interval (0, 1); on ``device``, by default that of the batch."""

    def uniforms(self, shape: Shape) -> Tensor:
        """Draw (B, *shape) of `time_dtype`, in the open interval (0, 1), on the device of the batch: for tokens."""


#: (seed, ids of the samples, device of the batch) -> their random numbers
MakeRandom = Callable[[int, list[int], Device], SampleRandom]


# ---------------------------------------------------------------- by a counter

Words = TypeVar("Words", np.ndarray[Any, Any], Tensor)

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round
_LOW = 0xFFFFFFFF
_TOKENS = 1 << 31  # draws of tokens are counted from here


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> list[Words]:
    """Return four random words for each counter: Philox4x32-10 (Salmon et al. 2011, section 4.3).

    Only integers are multiplied and shifted: the bits are the same on every device.

    Args:
        counter: four words of 32 bits as int64 arrays or tensors, which broadcast.
        key: two words.

    Returns:
        Four int64 arrays or tensors, in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products overflow to the right 64 bits. Their lower half is cut out only where it is needed by itself.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & _LOW, p1, ((p0 >> 32) ^ (c3 ^ k1)) & _LOW, p0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1 & _LOW, c2, c3 & _LOW]


def box_muller(first: Words, second: Words) -> tuple[Words, Words]:
    """Map pairs of 32-bit words to pairs of independent standard normal float32, at most 6.77 in size."""
    xp: Any = torch if isinstance(first, Tensor) else np
    radius, angle = (xp.asarray(words, dtype=xp.float32) for words in (first, second))
    radius = xp.sqrt(-2.0 * xp.log((radius + 0.5) * 2.0**-32))
    angle = angle * (2.0 * math.pi * 2.0**-32)
    return radius * xp.cos(angle), radius * xp.sin(angle)


def middles(high: Words, low: Words) -> Tensor:
    """Map pairs of 32-bit words to numbers in (0, 1): the middles of 2^52 equal intervals, in `time_dtype`."""
    words = torch.as_tensor(high << 20 | low >> 12)
    return _below_one(words.to(time_dtype(words.device)).add(0.5).mul(2.0**-52))


def _below_one(uniform: Tensor) -> Tensor:
    """Return numbers in (0, 1) that float32 may have rounded to 1."""
    return uniform if uniform.dtype == torch.float64 else uniform.clamp(max=1.0 - 2.0**-24)


def _sent(uniform: Tensor, device: torch.device) -> Tensor:
    """Return float64 numbers in (0, 1) on ``device``, in the precision of times there."""
    return sent(_below_one(uniform.to(time_dtype(device))), device)


class CounterRandom:
    """`SampleRandom` by `philox`, of which every number is drawn by itself; normal numbers on the batch's device.

    The key is the seed; a counter is the number's place among four (normal) or two (uniform) times as many, the number
    of the draw (0: single uniform ones; those of `uniforms` count from 2^31 on), and the sample's id. So how often
    other kinds were drawn before changes nothing. Uniform numbers have the same bits on every device, normal ones
    differ by the rounding of logarithm and cosine.

    Args:
        seed: of the run.
        sample_ids: one for each row, from 0 to below 2^63.
        device: of the batch.
    """

    def __init__(self, seed: int, sample_ids: list[int], device: Device = "cpu") -> None:
        self._key = seed & _LOW, (seed >> 32) & _LOW
        self._ids: Any = np.array(sample_ids, dtype=np.int64)[:, None]
        self._device = torch.device(device)
        self._normals = self._uniforms = self._tokens = 0
        self._ready: list[Tensor] = []

    def normal(self, shape: Shape) -> Tensor:
        self._normals += 1
        size = math.prod(shape)
        a, b, c, d = self._words(-(-size // 4), self._normals)
        rows = torch.stack([torch.as_tensor(part) for part in (*box_muller(a, b), *box_muller(c, d))], -1)
        return rows.flatten(1)[:, :size].reshape(-1, *shape)

    def uniforms(self, shape: Shape) -> Tensor:
        self._tokens += 1
        size = math.prod(shape)
        a, b, c, d = self._words(-(-size // 2), _TOKENS + self._tokens)
        return torch.stack([middles(a, b), middles(c, d)], -1).flatten(1)[:, :size].reshape(-1, *shape)

    def _words(self, count: int, draw: int) -> list[Any]:
        """Return four words (B, count) of the draw with this number, on the batch's device."""
        xp: Any = np
        ids = self._ids
        if self._device.type != "cpu":
            xp, ids = torch, sent(torch.from_numpy(ids), self._device)
        blocks = xp.arange(count, **({"device": self._device} if xp is torch else {}))[None]
        return philox((blocks, blocks[:, :1] * 0 + draw, ids & _LOW, ids >> 32), self._key)

    def uniform(self, device: Device | None = None) -> Tensor:
        if not self._ready:  # four words are two numbers
            block = np.full((1, 1), self._uniforms)
            words = philox((block, block * 0, self._ids & _LOW, self._ids >> 32), self._key)
            for high, low in (words[:2], words[2:]):
                self._ready.append(middles(high, low)[:, 0])
            self._uniforms += 1
        return _sent(self._ready.pop(0), torch.device(device or self._device))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor of the CPU on ``device``; nobody waits until it is there."""
    if device.type == "cuda":  # from other memory the copy may wait for what the GPU still has to do
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------- as before November 2026


class TwisterRandom:
    """`SampleRandom` by a Mersenne Twister for each row, on the CPU: runs of earlier versions go on with it."""

    def __init__(self, seed: int, sample_ids: list[int], device: Device = "cpu") -> None:
        self._generators = [seeded(seed, Stream.NOISE, sample_id) for sample_id in sample_ids]
        self._device = device

    def normal(self, shape: Shape) -> Tensor:
        rows = torch.empty(len(self._generators), *shape)
        for row, generator in zip(rows, self._generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(self._device, non_blocking=True)

    def uniforms(self, shape: Shape) -> Tensor:
        rows = [torch.rand(shape, dtype=torch.float64, generator=generator) for generator in self._generators]
        return _sent(torch.stack(rows).clamp(1e-9, 1 - 1e-9), torch.device(self._device))

    def uniform(self, device: Device | None = None) -> Tensor:
        rows = [torch.rand((), dtype=torch.float64, generator=generator) for generator in self._generators]
        return _sent(torch.stack(rows).clamp(1e-9, 1 - 1e-9), torch.device(device or self._device))


RANDOM_NUMBERS: dict[str, MakeRandom] = {"philox": CounterRandom, "mersenne-twister": TwisterRandom}
