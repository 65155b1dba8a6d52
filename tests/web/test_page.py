"""The page's layout for every kind of checkpoint, what it says of errors, and how it is served."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from latentflow.errors import UserError

pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
import gradio as gr
from PIL import Image

from latentflow.drawing.checkpoint import Takes
from latentflow.web import page
from latentflow.web.turns import Stopped


def checkpoint(*, text: bool = False, classes: tuple[str, ...] = (), **more: Any) -> Any:
    """What the layout asks of a studio."""
    return SimpleNamespace(
        takes=Takes(**({"text": text, "labels": classes, "masks": True} | more)),
        solvers=["heun", "ddpm"],
        inpainting_methods=["trained", "repaint"],
        editing_methods=["flowedit", "image-to-image"] if text or classes else ["image-to-image"],
    )


@pytest.mark.parametrize(
    ("studio", "shown"),
    [
        (checkpoint(text=True), {"What to draw", "What it shows now", "Keep away from", "Guidance"}),
        (checkpoint(classes=("apple", "hat")), {"Class", "Its class now", "Guidance"}),
        (checkpoint(), set()),
    ],
    ids=["captions", "classes", "unconditional"],
)
def test_the_page_asks_for_what_the_checkpoint_takes(studio: Any, shown: set[str]) -> None:
    blocks = page.build(studio).blocks.values()
    visible = {block.label for block in blocks if getattr(block, "label", None) and block.visible}
    conditional = {
        "What to draw",
        "What it shows now",
        "Keep away from",
        "Guidance",
        "Class",
        "Its class now",
    }
    assert visible & conditional == shown
    assert {"Seed", "Steps", "Solver", "Pictures"} <= visible


@pytest.mark.parametrize(("masks", "inpaint"), [(True, 4), (False, 20)])
def test_few_steps_are_offered_where_they_suffice(masks: bool, inpaint: int) -> None:
    """Edits, and inpainting that was not trained, follow the velocity, whatever the checkpoint."""
    blocks = page.build(checkpoint(text=True, few_steps=True, guided=True, masks=masks)).blocks.values()
    steps = {one.elem_id: one.value for one in blocks if getattr(one, "label", None) == "Steps"}
    assert steps == {"generate-steps": 4, "inpaint-steps": inpaint, "edit-steps": 20}
    assert not any(one.visible for one in blocks if getattr(one, "label", None) == "Guidance")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for name in ("Info", "Warning"):
        monkeypatch.setattr(page.gr, name, lambda message, **options: messages.append(message))
    return messages


def raising(error: Exception) -> Callable[[], Any]:
    @page.told
    def work() -> None:
        raise error

    return work


def test_mistakes_become_messages_that_hold_no_markup(said: list[str]) -> None:
    assert raising(UserError("<b>.png is no picture", "Take another."))() == gr.skip()
    assert said == ["&lt;b&gt;.png is no picture<br>Take another."]
    assert raising(Stopped())() == gr.skip()
    assert len(said) == 2


def test_defects_are_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(gr.Error) as error:
        raising(RuntimeError("at /secret/place"))()
    assert "/secret/place" not in str(error.value)
    assert "/secret/place" in caplog.text


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        with pytest.raises(UserError, match=f"{port} is taken"):
            page.serve(checkpoint(), "127.0.0.1", port)
    assert "PNG" in Image.OPEN and "EPS" not in Image.OPEN  # Gradio opens uploads itself
