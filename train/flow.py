"""Train a generator on a folder of images: `latentflow train DATA -o runs/cats`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from latentflow.cli import given, parse, run, write_config
from latentflow.training import resume_line
from latentflow.training.config import RunConfig as Config
from latentflow.training.loop.run_folder import run_lock
from latentflow.training.presets import PRESETS
from latentflow.training.train import train


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator on a folder of images."""
    config = parse(Config, argv, prog="latentflow train", presets=PRESETS)
    with nullcontext() if config.dry_run else run_lock(config.output):
        train(config, resume_line("train", argv), given(Config, argv), write_config)


if __name__ == "__main__":
    run(main)
