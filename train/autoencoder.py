"""Train an autoencoder on a folder of images: `latentflow autoencoder DATA -o runs/autoencoder`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import given, parse, run, write_config
from latentflow.config import AutoencoderConfig, DataConfig, LoopConfig
from latentflow.errors import UserError
from latentflow.utils.flags import flag_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train an autoencoder; run again, the same line resumes."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Run folder. The result is its subfolder `autoencoder`."""
    data: DataConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loop: LoopConfig = LoopConfig()


#: Settings of the loop that are a generator's -> the autoencoder's own, if it has one.
GENERATORS_OWN = {
    "train_batch_size": "--autoencoder-batch-size",
    "gradient_accumulation_steps": "",
    "learning_rate": "--autoencoder-learning-rate",
    "optimizer": "--autoencoder-optimizer",
    "lr_scheduler": "",
    "lr_decay_share": "",
    "lr_layer_decay": "",
    "lr_embeddings": "",
    "ema_lengths": "",
    "ema_snapshot_steps": "",
    "early_stop": "",
    "shard": "",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train an autoencoder on a folder of images."""
    config = parse(Config, argv, prog="latentflow autoencoder")
    if not (Path(config.output) / "config.yaml").is_file():  # the line of an earlier version goes on
        refuse_generators_flags(sys.argv[1:] if argv is None else argv)

    from latentflow.training import resumable, resume_line
    from latentflow.training.loop.run_folder import run_lock

    line = resume_line("autoencoder", argv)
    with run_lock(config.output), resumable(line):
        train(config, line, given(Config, argv))


def refuse_generators_flags(argv: Sequence[str]) -> None:
    """Refuse flags that would change nothing. A config file may hold such settings: one recipe is for both programs.

    Raises:
        UserError: there is one; its counterpart is named.
    """
    flags = given(Config, [word for word in argv if word.partition("=")[0] != "--config"])
    for name, own in GENERATORS_OWN.items():
        if name in flags:
            raise UserError(
                f"{flag_of(name)} is a setting of generators, which changes nothing here",
                f"The autoencoder's is {own}."
                if own
                else "Leave it out: the autoencoder has no such setting.",
            )


def train(config: Config, resume_command: str, given_keys: Collection[str]) -> None:
    """Load the data, and train the autoencoder on them."""
    from latentflow.data import find_source, readable, split
    from latentflow.training import Stop, log_to
    from latentflow.training.data import as_begun, generator_as_begun
    from latentflow.training.report.folder import read_run
    from latentflow.training.report.verdict import judge
    from latentflow.training.train_autoencoder import train_autoencoder

    if config.data.balance_classes:
        raise UserError("--balance-classes: an autoencoder is trained without classes", "Leave it out.")
    output = Path(config.output)
    log = log_to(output)

    # ---- data ----
    data = as_begun(config.data, output, given_keys)
    source = readable(find_source(data.data, condition="none", columns=data.columns, colours=data.colours))
    for note in source.notes:
        log.info(note)
    rows = split(source, data.validation, config.loop.seed, stratify=data.stratify)
    training, validation = map(source.subset, rows)
    log.info(f"{len(training)} images to train on, {len(validation)} held out")

    # ---- training ----
    loop = generator_as_begun(config.loop, output, given_keys).with_validation_time(given_keys)
    write_config(replace(config, data=data, loop=loop), output / "config.yaml")
    stop = Stop()
    vae = train_autoencoder(
        training,
        validation,
        config.autoencoder,
        loop,
        output,
        data,
        resume_command=resume_command,
        stop=stop,
    )
    if vae is None:
        sys.exit(stop.status)
    result = output / "autoencoder"
    use = shlex.join(["latentflow", "train", data.data, "--vae", str(result), "-o", f"{output}-generator"])
    log.info(f"done: {result}; train a generator with it:\n  {use}")
    if verdict := judge(read_run(output)):
        log.info(verdict.line)


if __name__ == "__main__":
    run(main)
