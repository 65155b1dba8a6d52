"""The checks that every velocity network makes before it is built, and before it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from .condition import Condition


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
