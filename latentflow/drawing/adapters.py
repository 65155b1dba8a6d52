"""Adapters (LoRA) that a program puts onto the checkpoint it opens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """Which adapters, and how much of each."""

    fast: bool = False
    """Draw in a few evaluations, by the adapter that the checkpoint brings for that (its folder `fast`)."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER[:WEIGHT]")] = ()
    """An adapter (LoRA): folder, file, run folder or hub id, and how much of it, such as runs/hats:0.8. Several: once
    more for each."""
    lora_any_base: bool = False
    """Take adapters also if they were made for another base of the same architecture."""


def add_adapters(pipe: Any, choice: AdapterChoice, checkpoint: str) -> None:
    """Put the adapters into the pipeline's weights, each times its weight.

    Args:
        checkpoint: folder or hub id that the pipeline comes from.

    Raises:
        UserError: one cannot be loaded, see ``load_lora_weights``, or its weight is no finite number; the checkpoint
            brings none for ``fast``.
    """
    if choice.fast:
        if Path(checkpoint).is_dir() and not (Path(checkpoint) / "fast").is_dir():
            raise UserError(
                f"--fast: {checkpoint} brings no adapter for few steps (a folder `fast`)",
                "Make a student: latentflow distill CHECKPOINT DATA -o runs/fast --lora-rank 32, and draw with it: "
                "--lora runs/fast. A student of all weights is a checkpoint of its own: --checkpoint runs/fast.",
            )
        pipe.merge_lora_weights(checkpoint, any_base=choice.lora_any_base, subfolder="fast")
    if not choice.lora:
        return
    wanted = [_split(text) for text in choice.lora]
    names = [f"adapter-{number}" for number in range(len(wanted))]
    for name, (source, _) in zip(names, wanted, strict=True):
        pipe.load_lora_weights(source, adapter_name=name, any_base=choice.lora_any_base)
    pipe.set_adapters(names, [weight for _, weight in wanted])
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _split(text: str) -> tuple[str, float]:
    """``runs/hats:0.8`` -> where its adapter is, 0.8."""
    source, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        source = ""
    if not source or Path(text).exists():  # no colon, or one of the path's own
        source, weight = text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"--lora {text}: the weight is {weight}", "It must be a number such as 0.8.")
    inside_run = Path(source) / "adapter"
    if inside_run.is_dir():
        return str(inside_run), weight
    if not Path(source).exists() and len(Path(source).parts) != 2:
        raise UserError(f"--lora {source}: no such folder or file", "A run's adapter is in RUN/adapter.")
    return source, weight
