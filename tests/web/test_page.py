"""The page's layout for every kind of checkpoint, what it says of errors, and how it is served."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentflow.errors import UserError

pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
import gradio as gr
from PIL import Image

from latentflow.inference.sample import Capabilities
from latentflow.web import page, serving


def checkpoint(*, text: bool = False, classes: tuple[str, ...] = (), **more: Any) -> Any:
    """Return a server with what the layout needs."""
    return SimpleNamespace(
        capabilities=Capabilities(**({"text": text, "labels": classes, "masks": True} | more)),
        choices={"solver": ["heun"], "inpaint": ["repaint"], "edit": ["flowedit"]},
    )


@pytest.mark.parametrize(
    ("server", "shown"),
    [
        (checkpoint(text=True), {"Prompt", "Prompt for the original", "Negative prompt", "Guidance"}),
        (checkpoint(classes=("apple", "hat")), {"Class", "Class of the original", "Guidance"}),
        (checkpoint(), set()),
    ],
    ids=["captions", "classes", "unconditional"],
)
def test_the_page_asks_for_what_the_checkpoint_takes(server, shown) -> None:
    blocks = page.build(server).blocks.values()
    visible = {block.label for block in blocks if getattr(block, "label", None) and block.visible}
    conditional = {"Prompt", "Prompt for the original", "Negative prompt", "Guidance"}
    conditional |= {"Class", "Class of the original"}
    assert visible & conditional == shown
    assert {"Seed", "Steps", "Solver", "Images"} <= visible


@pytest.mark.parametrize(("masks", "inpaint"), [(True, 4), (False, 20)])
def test_few_steps_are_offered_where_they_suffice(masks, inpaint) -> None:
    """Edits, and inpainting that was not trained, follow the velocity, whatever the checkpoint."""
    blocks = page.build(checkpoint(text=True, steps=4, distilled_guidance=True, masks=masks)).blocks.values()
    steps = {block.elem_id: block.value for block in blocks if getattr(block, "label", None) == "Steps"}
    assert steps == {"generate-steps": 4, "inpaint-steps": inpaint, "edit-steps": 20}
    assert not any(block.visible for block in blocks if getattr(block, "label", None) == "Guidance")


def test_mistakes_become_messages_without_markup_and_defects_are_logged(caplog) -> None:
    @page.reporting_errors
    def work(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as error:
        work(UserError("<b>.png is no\nimage", "take another."))
    assert error.value.message == "&lt;b&gt;.png is no image. Take another."
    assert not error.value.print_exception
    with pytest.raises(gr.Error) as error:
        work(RuntimeError("at /secret/place"))
    assert "/secret/place" not in str(error.value) and "/secret/place" in caplog.text


def test_a_port_that_is_taken() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} is taken"):
            serving.start(checkpoint(), "127.0.0.1", port)
    assert "PNG" in Image.OPEN and "EPS" not in Image.OPEN  # Gradio opens uploads itself


def test_what_the_page_keeps_is_private_and_removed_when_it_is_told_to_stop(monkeypatch, capsys) -> None:
    folders = []

    def block_thread() -> None:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        folders.append(folder)
        (folder / "upload.png").touch()
        assert os.name == "nt" or folder.stat().st_mode & 0o077 == 0
        print("a name: \x1b[2J", file=sys.stderr)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("GRADIO_TEMP_DIR", "somebody's")
    monkeypatch.setattr(serving, "start", lambda *_, **__: SimpleNamespace(block_thread=block_thread))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            serving.serve(SimpleNamespace(pipe=None), "::1", 7860)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not folders[0].exists()
    printed = capsys.readouterr()
    assert printed.out == "http://[::1]:7860\n" and printed.err == "a name: \\x1b[2J\n"
