"""Which precision a device is fast in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["no", "bf16", "fp16"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware. A CPU that only emulates it is slower than in
    float32, by a factor of up to 70."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The type that matrix products run in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        resolve(mixed_precision, device)
    ]


def resolve(mixed_precision: str, device: torch.device) -> Precision:
    """``mixed_precision`` as asked for; "auto" is bf16 where it is fast, else no."""
    if mixed_precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "no"
    return mixed_precision  # type: ignore[return-value]


def uncached_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is on ``device`` now, without its memory of weights in lower precision.

    For what is computed without gradients in the middle of a training step, or with other weights in their place:
    what the memory kept of those, the step would take for its own.
    """
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )
