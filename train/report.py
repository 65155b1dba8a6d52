"""Write an HTML page about a run: `latentflow report runs/cats`. The run may be unfinished, running or killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.utils.html_page import refuse_existing


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page about a run: curves, samples, settings, data, environment, how to resume."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder of `latentflow train` or `latentflow autoencoder`."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """The page to write. Default: report.html in the run folder."""
    overwrite: bool = False
    """Replace the page if it exists."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of a run."""
    config = parse(ReportConfig, argv, prog="latentflow report")
    path = Path(config.output or Path(config.run) / "report.html")
    refuse_existing(path, config.overwrite)

    from latentflow.training.report.page import report_page

    report_page(config.run).write(path, config.overwrite)
    print(path)


if __name__ == "__main__":
    run(main)
