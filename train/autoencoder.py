"""Train an autoencoder on a folder of images: `latentflow autoencoder DATA -o runs/autoencoder`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.autoencoder import AutoencoderConfig
from latentflow.cli import given, parse, run, write_config
from latentflow.data import find_source, readable, split
from latentflow.data.config import DataConfig
from latentflow.training import LoopConfig, Stop, log_to, resume_line
from latentflow.training.data import as_begun
from latentflow.training.loop.run_folder import run_lock
from latentflow.training.train_autoencoder import train_autoencoder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an autoencoder; the same line again resumes."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Run folder; the result is its subfolder `autoencoder`."""
    data: DataConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loop: LoopConfig = LoopConfig()


def main(argv: Sequence[str] | None = None) -> None:
    """Train an autoencoder."""
    config = parse(Config, argv, prog="latentflow autoencoder")
    with run_lock(config.output):
        train(config, resume_line("autoencoder", argv), given(Config, argv))


def train(config: Config, resume_command: str, given_keys: Collection[str]) -> None:
    """Train on the data of the settings, from top to bottom."""
    output = Path(config.output)
    log = log_to(output)

    # ---- data ----
    data = as_begun(config.data, output, given_keys)
    source = readable(find_source(data.data, condition="none", columns=data.columns, colours=data.colours))
    for note in source.notes:
        log.info(note)
    training, validation = (source.subset(rows) for rows in split(source, data.validation, config.loop.seed))
    log.info(f"{len(training)} images to train on, {len(validation)} held out")

    # ---- training ----
    write_config(replace(config, data=data), output / "config.yaml")
    stop = Stop()
    vae = train_autoencoder(
        training,
        validation,
        config.autoencoder,
        config.loop,
        output,
        data,
        resume_command=resume_command,
        stop=stop,
    )
    if vae is None:
        sys.exit(stop.status)
    log.info(f"done: {output / 'autoencoder'}")


if __name__ == "__main__":
    run(main)
