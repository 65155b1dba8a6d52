"""Runs that fine-tune a tiny pretrained model on a few images: their data and flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..families.tiny import TINY, WITH_EXTRA_CHANNELS

#: a run without validation and previews, whose sums are the same on every machine
QUICK = [
    "--validation",
    "0",
    "--validation-steps",
    "0",
    "--preview-steps",
    "0",
    "--mixed-precision",
    "no",
    "--log-steps",
    "1",
]
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


def photos(
    folder: Path, side: int, count: int = 8, *, suffix: str = ".png", captions: bool = True, wide: int = 0
) -> Path:
    """Write images that are alike, a red ground under a blue sky; the last ``wide`` of them are twice as wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width = side * 2 if number >= count - wide else side
        pixels = np.full((side, width, 3), (200, 40, 60), np.uint8)
        pixels[: side // 2] = (10 * number, 90, 200)
        Image.fromarray(pixels).save(folder / f"{number}{suffix}")
        if captions:
            (folder / f"{number}.txt").write_text(f"a red apple {number}")
    return folder


def base_flags(name: str, folder: Path) -> list[Any]:
    """Return the flags that name a tiny checkpoint, the options that its size needs, and its resolution."""
    tiny = {**TINY, **WITH_EXTRA_CHANNELS}[name]
    options = [f"{key}={json.dumps(value)}" for key, value in tiny.call.items()]
    given = ["--family-options", *options] if options else []
    return ["--init-from", folder, *given, "--resolution", tiny.side]


def rows(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validated(run: Path) -> dict[int, float]:
    """Return the validation losses of a run by step."""
    return {int(row["step"]): row["val_loss"] for row in rows(run) if "val_loss" in row}


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter that a run has made."""
    return load_file(run / ADAPTER)
