"""How fast this machine multiplies matrices: what a training's speed is compared with."""

from __future__ import annotations

import time

import torch


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product, a multiply-add being two: the best of many tries."""
    # On a CPU short ones, which other processes leave whole now and then.
    size, tries = (512, 20) if device.type == "cpu" else (8192, 5)
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))
