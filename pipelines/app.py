"""Open a web page to generate, inpaint and edit images: `latentflow app`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import AdapterChoice
from latentflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AppConfig(AdapterChoice):
    """A web page to generate, inpaint and edit images."""

    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder or hub id; default: the shipped checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets everybody in who reaches this machine: give --auth as well."""
    port: int = 7860
    """Port to listen on."""
    auth: Annotated[str | None, tyro.conf.arg(metavar="USER:PASSWORD")] = None
    """Let nobody in without this name and password. The environment variable LATENTFLOW_APP_AUTH says it where other
    users of the machine cannot read it."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names besides localhost under which the page may be asked for, such as that of a reverse proxy."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(AppConfig, argv, prog="latentflow app")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the web page needs Gradio", 'pip install "latentflow[app]"')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

    from latentflow.web.guard import is_loopback
    from latentflow.web.serving import serve
    from latentflow.web.studio import Studio

    auth = credentials(config.auth or os.environ.get("LATENTFLOW_APP_AUTH"))
    if auth is None and not is_loopback(config.host):
        print(
            "Whoever reaches this machine can use the page: --auth USER:PASSWORD asks for one.",
            file=sys.stderr,
        )
    serve(
        Studio(config.checkpoint, config.device, config),
        config.host,
        config.port,
        auth=auth,
        allowed_hosts=config.allowed_host,
    )


def credentials(auth: str | None) -> tuple[str, str] | None:
    """Return user and password.

    Raises:
        UserError: one of them is missing.
    """
    if not auth:
        return None
    user, _, password = auth.partition(":")
    if not user.strip() or not password:
        raise UserError("--auth is not USER:PASSWORD", "Such as --auth anna:correct-horse.")
    return user.strip(), password


if __name__ == "__main__":
    run(main)
