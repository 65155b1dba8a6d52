"""What the loop calls beside training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from .trained_module import Player

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the loop calls, always with the averaged weights in place and on the main process only.

    A validation or a preview that fails is a warning. ``export`` fills an empty folder that becomes ``export_to``, at
    the end of the run, when its last checkpoint is complete. A `RunError` of it is tried again, as when the disk is
    full; anything else that it raises ends the run.
    """

    validate: Callable[[], dict[str, float]] | None = None
    preview: Callable[[], Image.Image] | None = None
    export: Callable[[Path], None] | None = None
    export_to: Path | None = None


def with_averages(players: Sequence[Player], function: Callable[[], T]) -> T:
    """Call with averaged weights, in evaluation mode, without gradients; the run's random state is kept."""
    modes = [(module, module.training) for player in players for module in player.module.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with ExitStack() as stack, torch.random.fork_rng(), torch.no_grad():
            for player in players:
                stack.enter_context(player.averaged())
            return function()
    finally:
        for module, mode in modes:
            module.training = mode
