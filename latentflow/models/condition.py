"""The condition of a velocity network: class, text, sizes, and channels beside the noisy latent.

Its shapes are checked here, with the sizes that every network is built of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The condition of a batch; every field is optional, and all have the same B.

    Attributes:
        class_labels: (B,) int64, in [0, num_classes).
        text: (B, L, D) token embeddings of a text encoder.
        text_mask: (B, L) bool, True = token, False = padding. None = every position is a token.
        channels: (B, C', H, W), placed beside the channels of the latent (masks, masked images, ...).
        sizes: (B, 6), in pixels: height and width of the original image; what was cut off at the top and on the left
            after resizing; height and width of the result (arXiv:2307.01952, section 2.2).
        drop: (B,) bool. True = the class and the text of this row are replaced, inside the network, by its
            learned null (classifier-free guidance, arXiv:2207.12598). ``channels`` and ``sizes`` are never
            dropped.
    """

    class_labels: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    channels: Tensor | None = None
    sizes: Tensor | None = None
    drop: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, or 0 when nothing is set."""
        return next((value.shape[0] for value in self._tensors().values()), 0)

    def unconditional(self) -> Condition:
        """Return the same condition with every row dropped."""
        given = next(iter(self._tensors().values()), None)
        if given is None:
            return self
        return replace(self, drop=torch.ones(given.shape[0], dtype=torch.bool, device=given.device))

    @staticmethod
    def cat(a: Condition, b: Condition) -> Condition:
        """The rows of ``a``, then those of ``b``; the shorter text is padded (and masked) to the longer.

        Raises:
            ValueError: only one of the two has class labels, text, channels or sizes.
        """
        for name in ("class_labels", "text", "channels", "sizes"):
            if (getattr(a, name) is None) != (getattr(b, name) is None):
                raise ValueError(
                    f"only one of the two conditions has {name}: give it to both, "
                    "with drop=True for the rows that should not see it"
                )
        length = max((c.text.shape[1] for c in (a, b) if c.text is not None), default=0)
        a, b = a._padded(length), b._padded(length)
        if a.drop is not None or b.drop is not None:
            a, b = a._with_drop(), b._with_drop()
        pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Condition)}
        return Condition(**{name: None if x is None else torch.cat([x, y]) for name, (x, y) in pairs.items()})

    def repeat_interleave(self, n: int) -> Condition:
        """Every row ``n`` times, copies of one row next to one another: (B * n, ...)."""
        return self._map(lambda value: value.repeat_interleave(n, dim=0))

    def rows(self, index: Tensor) -> Condition:
        """The rows of ``index``, (K,) int64 or (B,) bool."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move to ``device``; cast text and channels to ``dtype``, but not sizes, which half precision would change."""
        moved = self._map(lambda value: value.to(device, dtype if value.is_floating_point() else None))
        return moved if self.sizes is None else replace(moved, sizes=self.sizes.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: function(value) for name, value in self._tensors().items()})

    def _padded(self, length: int) -> Condition:
        if self.text is None:
            return self
        mask = self.text_mask
        if mask is None:
            mask = torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)
        missing = length - self.text.shape[1]
        return replace(self, text=F.pad(self.text, (0, 0, 0, missing)), text_mask=F.pad(mask, (0, missing)))

    def _with_drop(self) -> Condition:
        if self.drop is not None:
            return self
        device = next(iter(self._tensors().values())).device
        return replace(self, drop=torch.zeros(self.batch_size, dtype=torch.bool, device=device))


def check_sizes(sample_size: int | Sequence[int] | None, **sizes: float | None) -> None:
    """Refuse sizes that are not above 0, and a ``sample_size`` that is not one or two sides; None is not checked.

    Raises:
        UserError: a size is refused; it is named.
    """
    if sample_size is not None:
        sides = [sample_size] * 2 if isinstance(sample_size, int) else [*sample_size]
        if len(sides) != 2 or min(sides) <= 0:
            raise UserError(f"sample_size is {sample_size}", "It must be one side, or (height, width).")
    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise UserError(f"{name} is {size}", "It must be above 0.")


def check_inputs(config: Any, x: Tensor, cond: Condition, multiple: int = 1) -> None:
    """Refuse a call that does not fit the network's ``config``. Only shapes are read: nothing waits for the device.

    Raises:
        ValueError: a shape does not fit; the message says which, and what to do.
    """
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: this network takes (B, {config.in_channels}, H, W); for another "
            "number of channels, make one with in_channels="
        )
    batch, _, height, width = x.shape
    if height % multiple or width % multiple:
        raise ValueError(f"a latent of {height}x{width} does not divide into patches of {multiple}: pad it")
    needs = {
        "class_labels": "num_classes",
        "text": "text_dim",
        "channels": "condition_channels",
        "sizes": "size_conditioning",
    }
    for name, key in needs.items():
        if getattr(cond, name) is not None and not getattr(config, key):
            raise ValueError(f"the condition has {name}, but the network has no {key}: leave {name} out")
    expected = {
        "class_labels": (batch,),
        "drop": (batch,),
        "text": (batch, None, config.text_dim),
        "text_mask": (batch, None if cond.text is None else cond.text.shape[1]),
        "channels": (batch, config.condition_channels, height, width),
        "sizes": (batch, 6),
    }
    for name, shape in expected.items():
        value = getattr(cond, name)
        if value is None:
            continue
        if value.ndim != len(shape) or any(
            b not in (None, a) for a, b in zip(value.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(f"the condition's {name} has shape {tuple(value.shape)}: it must be ({wanted})")
