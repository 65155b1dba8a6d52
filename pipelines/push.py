"""Upload a checkpoint to the Hugging Face hub: `latentflow push runs/cats/pipeline owner/cats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload a pipeline folder to the hub. A new repository is private; your own README.md there stays."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A pipeline folder, such as runs/cats/pipeline."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Name of the repository on the hub."""


def main(argv: Sequence[str] | None = None) -> None:
    """Upload a pipeline folder."""
    config = parse(PushConfig, argv, prog="latentflow push")
    folder = Path(config.checkpoint)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"'{folder}' is not a pipeline folder", "A run's pipeline is in RUN/pipeline.")

    from latentflow.training.report.hub import push

    print(push(folder, config.repository))


if __name__ == "__main__":
    run(main)
