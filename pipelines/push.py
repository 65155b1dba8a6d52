"""Upload a checkpoint to the Hugging Face hub: `latentflow push runs/cats owner/cats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.errors import UserError
from latentflow.utils.files import result_of, unfinished_run


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload a pipeline to the hub. A new repository is private; a README.md of your own there stays."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a finished run, such as runs/cats, or a pipeline folder."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Name of the repository on the hub."""


def main(argv: Sequence[str] | None = None) -> None:
    """Upload a pipeline folder."""
    config = parse(PushConfig, argv, prog="latentflow push")
    folder = Path(result_of(config.checkpoint))
    if unfinished_run(config.checkpoint):
        raise UserError(
            f"'{folder}' is a run that is not finished",
            f"Write what it has learnt so far as a pipeline, and push that: latentflow export {folder} -o FOLDER",
        )
    if not (folder / "model_index.json").is_file():
        if not folder.exists():
            raise UserError(
                f"there is no folder '{folder}'", "Check the path: the run's folder, or its pipeline."
            )
        raise UserError(f"'{folder}' is not a pipeline folder", "A run's pipeline is in RUN/pipeline.")

    from latentflow.training.report.hub import push

    print(push(folder, config.repository))


if __name__ == "__main__":
    run(main)
