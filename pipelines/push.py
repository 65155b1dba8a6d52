"""Upload a checkpoint or an adapter to the Hugging Face hub: `latentflow push runs/cats owner/cats`.

latentflow push runs/cats owner/cats --dry-run
latentflow push runs/hats/adapter owner/hats
"""

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
    """Upload a pipeline or an adapter to the hub. A new repository is private; a README.md of your own there stays."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a finished run, such as runs/cats, a pipeline folder, or the folder of an adapter, such as
    runs/hats/adapter."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Name of the repository on the hub."""
    dry_run: bool = False
    """Print what would be uploaded, then stop. Nothing is sent."""


def main(argv: Sequence[str] | None = None) -> None:
    """Upload the folder."""
    config = parse(PushConfig, argv, prog="latentflow push", description=__doc__ or "")
    folder = Path(result_of(config.checkpoint))
    if unfinished_run(config.checkpoint) and (folder / "adapter").is_dir():  # of a pretrained model
        folder = folder / "adapter"
    elif unfinished_run(config.checkpoint):
        raise UserError(
            f"'{folder}' is a run that is not finished",
            f"Write what it has learnt so far as a pipeline, and push that: latentflow export {folder} -o FOLDER",
        )

    from latentflow.training.report.hub import check_name, content_lines, push

    check_name(config.repository)
    lines = content_lines(folder, config.repository)
    if config.dry_run:
        print("\n".join(lines))
        return
    print(lines[0], flush=True)
    address, notes = push(folder, config.repository)
    print("\n".join([*notes, address]))


if __name__ == "__main__":
    run(main)
