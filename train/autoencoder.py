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
    init_from: Annotated[str | None, tyro.conf.arg(metavar="AUTOENCODER")] = None
    """Train this autoencoder on (AutoencoderKL or AutoencoderDC): a folder, a pipeline that has one, or a hub id."""
    decoder_only: bool = False
    """Train only the decoder of --init-from. The latents stay the same, so that generators trained on them can use the
    new decoder: latentflow generate --vae RUN/autoencoder."""
    data: DataConfig
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        if self.decoder_only and not self.init_from:
            raise UserError(
                "--decoder-only without --init-from: a new encoder would never be trained",
                "Name the autoencoder whose encoder is kept: --init-from AUTOENCODER.",
            )


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
        flags = given(Config, argv, flags_only=True)
        refuse_generators_flags(flags)
        refuse_unused_flags(config, flags)

    from latentflow.training import resumable, resume_line
    from latentflow.training.loop.run_folder import run_lock

    line = resume_line("autoencoder", argv)
    with run_lock(config.output), resumable(line):
        train(config, line, given(Config, argv))


def refuse_generators_flags(flags: Collection[str]) -> None:
    """Refuse flags of generators, which would change nothing.

    Raises:
        UserError: there is one; its counterpart is named.
    """
    for name, own in GENERATORS_OWN.items():
        if name in flags:
            raise UserError(
                f"{flag_of(name)} is a setting of generators, which changes nothing here",
                f"The autoencoder's is {own}."
                if own
                else "Leave it out: the autoencoder has no such setting.",
            )


def refuse_unused_flags(config: Config, flags: Collection[str]) -> None:
    """Refuse flags that would change nothing beside --init-from.

    Raises:
        UserError: there is one.
    """
    for name in AutoencoderConfig.BUILDING if config.init_from else ():
        if name in flags:
            raise UserError(
                f"{flag_of(name)} with --init-from, whose autoencoder is built already",
                "Leave one of them out.",
            )
    encoders_own = [name for name in ("equivariance", "kl_weight") if name in flags]
    if config.decoder_only and encoders_own:
        raise UserError(
            f"{flag_of(encoders_own[0])} shapes the latents, and --decoder-only keeps them",
            "Leave one of them out.",
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
        init_from=config.init_from,
        decoder_only=config.decoder_only,
        resume_command=resume_command,
        stop=stop,
    )
    if vae is None:
        sys.exit(stop.status)
    result = output / "autoencoder"
    if config.decoder_only:
        use = shlex.join(["latentflow", "generate", "--checkpoint", "CHECKPOINT", "--vae", str(result)])
        log.info(f"done: {result}; generate with it, from a checkpoint of the same latents:\n  {use}")
    else:
        use = shlex.join(
            ["latentflow", "train", data.data, "--vae", str(result), "-o", f"{output}-generator"]
        )
        log.info(f"done: {result}; train a generator with it:\n  {use}")
    if verdict := judge(read_run(output)):
        log.info(verdict.line)


if __name__ == "__main__":
    run(main)
