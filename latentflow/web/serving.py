"""The server of the web page: its address, what Gradio may do and keep, and its end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from PIL import Image
from starlette.middleware import Middleware

from ..errors import UserError, printable
from ..utils.image_formats import open_no_others
from .guard import LARGEST_UPLOAD, Guard, Hosts
from .page import build
from .studio import Studio

MOST_SESSIONS = 500  # of whose inputs Gradio keeps a copy
MOST_PIXELS = 50_000_000  # of an upload
# Fonts of the reader's machine: Gradio's own would come from the network.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


async def _fetch_nothing(*_: Any, **__: Any) -> str:
    raise gr.Error("Nothing is fetched from other addresses: upload the image.", print_exception=False)


class Escaped:
    """A text stream that steers no terminal: Gradio writes what strangers sent to it, such as names of files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        return self._stream.write("\r".join(printable(part) for part in text.split("\r")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def start(
    studio: Studio,
    host: str,
    port: int,
    *,
    auth: tuple[str, str] | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Any:
    """Serve the page in a thread, and return it.

    Args:
        auth: name and password that are asked for.
        allowed_hosts: names besides this machine's under which the page is asked for.

    Raises:
        UserError: the port is taken or may not be listened on.
    """
    open_no_others()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # of this process
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    listeners: Counter[str] = Counter()
    page = build(studio, listeners)
    guard = Middleware(
        Guard,
        hosts=Hosts(host, allowed_hosts),
        uploads=Path(page.GRADIO_CACHE),
        listeners=listeners,
    )
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=True,  # to programs, what Gradio itself refuses
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=MOST_SESSIONS,
            auth=auth,
            theme=THEME,
            app_kwargs={"middleware": [guard]},
            prevent_thread_lock=True,
        )
    except OSError:  # Gradio's message speaks of its own arguments
        raise UserError(
            f"{host}:{port} is taken, or no address of this machine", "Try --port 7861."
        ) from None
    return page


def serve(studio: Studio, host: str, port: int, **settings: Any) -> None:
    """Serve the page until Ctrl-C; the models are loaded while it is looked at.

    Args:
        settings: of ``start``.

    Raises:
        UserError: see ``start``; the checkpoint cannot be loaded.
    """
    with (
        tempfile.TemporaryDirectory(prefix="latentflow-app-", ignore_cleanup_errors=True) as folder,
        redirect_stderr(Escaped(sys.stderr)),
    ):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the folder is removed
        os.environ["GRADIO_TEMP_DIR"] = folder  # of our own: Gradio's usual one is everybody's
        page = start(studio, host, port, **settings)
        print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)
        studio.pipe  # noqa: B018
        from ..models.text import UnknownWords

        warnings.simplefilter("ignore", UnknownWords)  # the page says it
        page.block_thread()
