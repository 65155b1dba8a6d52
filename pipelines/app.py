"""Open a web page to generate, inpaint and edit images: `latentflow app`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from latentflow.cli import parse, run
from latentflow.config import AdapterChoice, MemoryConfig
from latentflow.errors import UserError
from latentflow.utils.libraries import missing


@dataclass(frozen=True, kw_only=True)
class AppConfig(AdapterChoice):
    """Open a web page to generate, inpaint and edit images."""

    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder, hub id, or a pretrained model in one file; default: the shipped checkpoint."""
    lora_folder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Offer the adapters (LoRA) in this folder too, such as runs. Those of --lora are in use at first; those in the
    checkpoint's folder are always offered."""
    preview_vae: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Show a preview after each step, decoded with this autoencoder (folder or hub id): a tiny one, such as TAESD."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens the page to everybody who can reach this machine: give --auth as well."""
    port: int = 7860
    """Port to listen on."""
    auth: Annotated[str | None, tyro.conf.arg(metavar="USER:PASSWORD")] = None
    """Require this name and password. Set the environment variable LATENTFLOW_APP_AUTH instead to hide them from other
    users of this machine."""
    allowed_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names besides localhost under which the page is served, such as that of a reverse proxy."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = parse(AppConfig, argv, prog="latentflow app")
    if not 0 < config.port < 65536:
        raise UserError(f"--port is {config.port}", "Use 1 to 65535, such as 7860.")
    if importlib.util.find_spec("gradio") is None:
        raise missing("the web page needs", "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

    from latentflow.web.guard import is_loopback
    from latentflow.web.inference_server import InferenceServer
    from latentflow.web.serving import serve

    auth = credentials(config.auth or os.environ.get("LATENTFLOW_APP_AUTH"))
    if auth is None and not is_loopback(config.host):
        print(
            "Everybody who can reach this machine can use the page: --auth USER:PASSWORD requires a password.",
            file=sys.stderr,
        )
    serve(
        InferenceServer(
            config.checkpoint, config.device, config, config.lora_folder, config.preview_vae, config.memory
        ),
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
        raise UserError("--auth is not USER:PASSWORD", "Give it as in --auth anna:correct-horse.")
    return user.strip(), password


if __name__ == "__main__":
    run(main)
