"""Train a generator on a folder of images: `latentflow train DATA -o runs/cats`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from latentflow.cli import given, parse, run, write_config
from latentflow.config import PRESETS, RunConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator on a folder of images."""
    config = parse(RunConfig, argv, prog="latentflow train", presets=PRESETS)
    if warning := config.unused_flags(given(RunConfig, argv, flags_only=True)):
        print(warning, file=sys.stderr)

    from latentflow.training import resumable, resume_line
    from latentflow.training.fine_tune.pretrained_base import is_pretrained
    from latentflow.training.loop.run_folder import run_lock
    from latentflow.training.train import train
    from latentflow.training.train_joint import train_joint
    from latentflow.training.train_pretrained import train_pretrained

    line = resume_line("train", argv)
    with nullcontext() if config.dry_run else run_lock(config.output), resumable(line):
        run_of = train_pretrained if is_pretrained(config.init_from) else train
        run_of = train_joint if config.joint.joint else run_of
        run_of(config, line, given(RunConfig, argv), write_config)


if __name__ == "__main__":
    run(main)
