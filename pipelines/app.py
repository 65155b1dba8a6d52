"""Open a web page to generate, inpaint and edit pictures: `latentflow app`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.drawing.adapters import AdapterChoice
from latentflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AppConfig(AdapterChoice):
    """A web page to generate, inpaint and edit pictures."""

    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder or hub id; default: the shipped checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets everybody in who reaches this machine: there is no password."""
    port: int = 7860
    """Port to listen on."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(AppConfig, argv, prog="latentflow app")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the web page needs Gradio", 'pip install "latentflow[app]"')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

    from latentflow.web.page import serve
    from latentflow.web.studio import Studio

    serve(Studio(config.checkpoint, config.device, config), config.host, config.port)


if __name__ == "__main__":
    run(main)
