"""Running the web page: its address, limits on Gradio, and shutting down."""

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

from ..data.images import open_no_others
from ..errors import UserError, printable
from .guard import LARGEST_UPLOAD, Guard, Hosts
from .inference_server import InferenceServer
from .page import build

MOST_SESSIONS = 500  # sessions whose inputs Gradio keeps a copy of
MOST_PIXELS = 50_000_000  # of an upload
# Fonts of the reader's machine: Gradio's own would come from the network.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")).set(
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",  # Gradio's own are too pale to read
)


async def _fetch_nothing(*_: Any, **__: Any) -> str:
    raise gr.Error("Nothing is fetched from other addresses: upload the image.", print_exception=False)


class Escaped:
    """A text stream without control characters: Gradio logs what strangers send, such as names of files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        return self._stream.write("\r".join(printable(part) for part in text.split("\r")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def start(
    server: InferenceServer,
    host: str,
    port: int,
    *,
    auth: tuple[str, str] | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Any:
    """Serve the page in a thread, and return it.

    Args:
        auth: name and password that visitors need.
        allowed_hosts: names besides this machine's under which the page is served.

    Raises:
        UserError: the port is taken, or the address cannot be used.
    """
    open_no_others()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # of this process
    processing_utils.async_ssrf_protected_download = _fetch_nothing
    listeners: Counter[str] = Counter()
    page = build(server, listeners)
    guard = Middleware(
        Guard, hosts=Hosts(host, allowed_hosts), uploads=Path(page.GRADIO_CACHE), listeners=listeners
    )
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=True,  # programs get Gradio's own errors too
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=MOST_SESSIONS,
            auth=auth,
            theme=THEME,
            css_paths=[Path(__file__).with_name("page.css")],
            app_kwargs={"middleware": [guard]},
            prevent_thread_lock=True,
        )
    except OSError:  # Gradio's message names its own arguments
        raise UserError(
            f"{host}:{port} is taken, or not an address of this machine", "Try --port 7861."
        ) from None
    return page


def serve(server: InferenceServer, host: str, port: int, **settings: Any) -> None:
    """Serve the page until Ctrl-C; the models are loaded once it is up.

    Args:
        settings: further arguments of ``start``.

    Raises:
        UserError: see ``start``; the checkpoint cannot be loaded.
    """
    with (
        tempfile.TemporaryDirectory(prefix="latentflow-app-", ignore_cleanup_errors=True) as folder,
        redirect_stderr(Escaped(sys.stderr)),
    ):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the folder is removed
        os.environ["GRADIO_TEMP_DIR"] = folder  # private: Gradio's default folder is shared by all users
        page = start(server, host, port, **settings)
        print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)
        server.pipe  # noqa: B018
        from ..models.text import UnknownWords

        warnings.simplefilter("ignore", UnknownWords)  # the page shows them
        page.block_thread()
