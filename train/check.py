"""What is in a folder of pictures: `latentflow check DATA`. Exit status 1 on what would break a training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.data.checking import check_source
from latentflow.data.find import Condition, MissingCaption
from latentflow.data.mask_finding import Masks


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Report what is in a folder of pictures and what a training would make of it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of pictures, or `shapes`."""
    condition: Condition = "auto"
    """What to condition on; auto takes the first of captions, classes, nothing."""
    missing_caption: MissingCaption = "error"
    """What becomes of pictures without a caption."""
    masks: Masks = "auto"
    """Your own masks: of metadata and files, none, or the alpha channels."""
    json: bool = False
    """Print the report as JSON."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(CheckConfig, argv, prog="latentflow check")
    report = check_source(
        config.data,
        condition=config.condition,
        missing_caption=config.missing_caption,
        masks=config.masks,
        progress=sys.stderr.isatty(),
    )
    if config.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(report.lines()))
    if report.problems:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
