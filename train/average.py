"""Average a run's weights over another length: `latentflow average runs/cats --ema-length 0.08 -o runs/cats-0.08`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Make a pipeline from the weights of a run, averaged over a length that is chosen after training.

    The run must have been trained with --ema-lengths, and be finished.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder of `latentflow train`."""
    ema_length: float
    """Relative length of the average: the standard deviation of its weights over time, as a share of the run. Choose it
    near or between the lengths that were tracked."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Pipeline folder to write."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make a pipeline of averaged weights."""
    config = parse(AverageConfig, argv, prog="latentflow average")

    from latentflow.training import log_to
    from latentflow.training.average import averaged_pipeline

    log = log_to(None)
    averaged_pipeline(Path(config.run), config.ema_length, Path(config.output))
    log.info(f"done: {config.output}")


if __name__ == "__main__":
    run(main)
