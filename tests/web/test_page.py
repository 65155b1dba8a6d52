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

from latentflow.config import AdapterChoice
from latentflow.inference.sample import Capabilities
from latentflow.web import page, serving, tab
from latentflow.web.checkpoint_facts import Card, OfferedAdapter


def checkpoint(
    *, text: bool = False, classes: tuple[str, ...] = (), adapters: Any = (), fast: bool = False, **more: Any
) -> Any:
    """Return a server with what the layout needs."""
    return SimpleNamespace(
        name="mine",
        card=Card(),
        adapters=dict(adapters),
        has_fast=fast,
        preview_vae=None,
        chosen=AdapterChoice(),
        facts=["8 x 8 pixels"],
        capabilities=Capabilities(**({"text": text, "labels": classes, "masks": True} | more)),
        choices={"solver": ["heun"], "inpaint": ["repaint"], "edit": ["flowedit"]},
    )


@pytest.mark.parametrize(
    ("server", "shown"),
    [
        (
            checkpoint(text=True),
            {
                "Prompt",
                "Prompt for the masked area",
                "Source prompt",
                "Target prompt",
                "Negative prompt",
                "Guidance scale",
            },
        ),
        (checkpoint(classes=("apple", "hat")), {"Class", "Source class", "Guidance scale"}),
        (checkpoint(), set()),
        (
            checkpoint(classes=("hat",), has_velocity=False, jump_settings=("temperature", "corrector")),
            {"Class", "Guidance scale", "Temperature", "Corrector"},
        ),
        (
            checkpoint(control=("image", "labels")),
            {f"{kind}{end}" for kind in ("Control image", "Label map") for end in ("", " scale")},
        ),
    ],
    ids=["captions", "classes", "unconditional", "tokens", "control"],
)
def test_the_page_asks_for_what_the_checkpoint_takes(server, shown) -> None:
    blocks = page.build(server).blocks.values()
    visible = {block.label for block in blocks if getattr(block, "label", None) and block.visible}
    usual = {
        "Seed",
        "Randomize seed",
        "Number of images",
        "Steps",
        "Solver",
        "Method",
        "Strength",
        "Image",
        "Images",
    }
    usual |= {"Advanced settings", "Mask feather (px)", "Padding around the mask (px)"}
    usual |= {"Generate", "Inpaint", "Edit"}  # the tabs
    assert visible == usual | shown


def test_rarely_used_settings_are_folded_away() -> None:
    blocks = page.build(checkpoint(text=True)).blocks.values()
    folded = [block for block in blocks if isinstance(block, gr.Accordion)]
    assert len(folded) == 3 and not any(accordion.open for accordion in folded)

    def is_folded(block: Any) -> bool:
        return block is not None and (block in folded or is_folded(block.parent))

    labels = {block.label for block in blocks if getattr(block, "label", None) and is_folded(block)}
    assert {"Negative prompt", "Steps", "Guidance scale", "Solver", "Mask feather (px)"} < labels
    assert not {"Prompt", "Seed", "Number of images", "Image", "Images"} & labels


def test_adapters_are_offered_and_those_of_the_flags_are_chosen() -> None:
    adapters = {"hats": OfferedAdapter("runs/hats", 0.8, chosen=True), "boots": OfferedAdapter("runs/boots")}
    blocks = [*page.build(checkpoint(text=True, adapters=adapters, fast=True)).blocks.values()]
    pickers = [block for block in blocks if getattr(block, "label", None) == "LoRA"]
    assert [picker.value for picker in pickers] == [["hats"]] * 3
    weights = [b for b in blocks if (getattr(b, "label", None) or "").startswith("Weight of") and b.visible]
    assert [(slider.label, slider.value) for slider in weights] == [("Weight of hats", 0.8)] * 3
    switches = [block.elem_id for block in blocks if getattr(block, "label", None) == "Few steps"]
    assert switches == ["generate-fast", "inpaint-fast"]  # an edit follows the velocity


@pytest.mark.parametrize(("masks", "inpaint"), [(True, 4), (False, 20)])
def test_few_steps_are_offered_where_they_suffice(masks, inpaint) -> None:
    """Edits, and inpainting that was not trained, follow the velocity, whatever the checkpoint."""
    blocks = page.build(checkpoint(text=True, steps=4, distilled_guidance=True, masks=masks)).blocks.values()
    steps = {block.elem_id: block.value for block in blocks if getattr(block, "label", None) == "Steps"}
    assert steps == {"generate-steps": 4, "inpaint-steps": inpaint, "edit-steps": 20}
    assert not any(block.visible for block in blocks if getattr(block, "label", None) == "Guidance scale")


def test_mistakes_become_messages_without_markup_and_defects_are_logged(caplog) -> None:
    @tab.reporting_errors
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
