"""The layout of the web page; what its buttons do is in :mod:`studio`."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import html
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from gradio.components.base import server
from gradio.context import LocalContext
from PIL import Image

from ..errors import UserError, printable
from .guard import ARRIVED, MOST_KEPT, make_room
from .studio import (
    CANVAS,
    LARGEST_SEED,
    LONGEST_PROMPT,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    Order,
    Progress,
    Studio,
)

log = logging.getLogger(__name__)
Values: TypeAlias = dict[str, Any]  # as a request gives them, by the names of its inputs
USUAL = "the checkpoint's own"
MOST_WAITING = 16
PATIENCE = 10.0  # seconds from its request in which a client starts to listen for the answer
# What the page does besides drawing and opening files waits for nobody.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Left(Exception):  # noqa: N818 - no error: the user pressed Cancel or closed the window
    """Nobody waits for the result any longer."""


def build(studio: Studio, listeners: Counter[str] | None = None) -> Any:
    """Return the page of one checkpoint.

    Args:
        listeners: streams that are open, by session or event: a request is drawn while its own is.
    """
    with gr.Blocks(title="latentflow", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        listeners = Counter() if listeners is None else listeners
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generated = generate_tab(studio, listeners)
            with gr.Tab("Inpaint", id="inpaint"):
                paint_on, inpainted = inpaint_tab(studio, listeners)
            with gr.Tab("Edit", id="edit"):
                edit_of, edited = edit_tab(studio, listeners)
        for results in (generated, inpainted, edited):
            results.hand_on(tabs, {"inpaint": paint_on, "edit": edit_of})
    # Images are drawn by all cores or the one GPU: two at once would finish no sooner.
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


# ---------------------------------------------------------------- the tabs


def generate_tab(studio: Studio, listeners: Counter[str]) -> Results:
    with gr.Row():
        with gr.Column(scale=2):
            controls = Controls(studio, "generate", "What to draw")
            go, cancel = buttons("generate")
            controls.add_details()
        with gr.Column(scale=3):
            results = Results("generate")

    def generate(values: Values, progress: Progress) -> Any:
        order = controls.order(values)
        return results.of(studio, studio.generate(order, progress), order)

    connect("generate", generate, listeners, controls.inputs, results, go, cancel)
    return results


def inpaint_tab(studio: Studio, listeners: Counter[str]) -> tuple[gr.File, Results]:
    with gr.Row():
        with gr.Column(scale=2):
            file = image_field("inpaint")
            editor = gr.ImageEditor(
                label="Paint over what is to be drawn anew",
                elem_id="inpaint-editor",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=40, colors=["#d040ff"], color_mode="fixed"),
                canvas_size=(CANVAS, CANVAS),
                height=540,
            )
            painted = Painted(editor)
        with gr.Column(scale=3):
            controls = Controls(studio, "inpaint", "What shall be there")
            go, cancel = buttons("inpaint")
            results = Results("inpaint", height=380)
            controls.add_details(few_steps=studio.takes.masks)
            with gr.Row():
                method = choice("Method", lambda: studio.inpainting_methods)
                strength = gr.Slider(0, 1, 1, step=0.05, label="Strength (0 keeps, 1 draws from nothing)")
            with gr.Row():
                feather = gr.Slider(0, 32, 0, step=1, label="Blend the edge over (pixels)")
                margin = gr.Slider(0, 64, 0, step=1, label="Look only so far around the hole (0: everywhere)")

    @told
    def show(path: str | None) -> Any:
        if path is None:
            return None
        return {"background": enlarged(studio, path), "layers": [], "composite": None}

    file.change(show, file, editor, show_progress="hidden", api_visibility="private")

    def inpaint(values: Values, progress: Progress) -> Any:
        order = controls.order(values)
        strokes = [studio.stroke(path) for path in painted.take(values["strokes"])]
        settings = {name: values[name] for name in ("strength", "feather", "margin")}
        method = chosen(values["method"])
        image = uploaded(values["image"])
        images = studio.inpaint(order, progress, image, strokes, method=method, **settings)
        return results.of(studio, images, order)

    inputs = {"image": file, "strokes": editor, "method": method, "strength": strength}
    inputs |= {"feather": feather, "margin": margin}
    connect("inpaint", inpaint, listeners, controls.inputs | inputs, results, go, cancel)
    return file, results


def edit_tab(studio: Studio, listeners: Counter[str]) -> tuple[gr.File, Results]:
    with gr.Row():
        with gr.Column(scale=2):
            file = image_field("edit")
            shown = gr.Image(label="Image", interactive=False, height=320, buttons=[])
            source = gr.Textbox(
                "",
                label="What it shows now",
                placeholder="red apple",
                visible=studio.takes.text,
                elem_id="edit-source",
            )
            source_label = gr.Dropdown(
                list(studio.takes.labels),
                value=None,
                label="Its class now",
                visible=bool(studio.takes.labels),
            )
        with gr.Column(scale=3):
            controls = Controls(studio, "edit", "What it shall show", "green apple")
            go, cancel = buttons("edit")
            results = Results("edit", height=380)
            controls.add_details(guidance=2.0, few_steps=False)
            with gr.Row():
                method = choice("Method", lambda: studio.editing_methods)
                strength = gr.Slider(0, 1, 0.9, step=0.05, label="Strength (0 keeps, 1 is free)")

    @told
    def show(path: str | None) -> Any:
        return None if path is None else enlarged(studio, path)

    file.change(show, file, shown, show_progress="hidden", api_visibility="private")

    def edit(values: Values, progress: Progress) -> Any:
        order = controls.order(values)
        shown = values.get("source_prompt") or values.get("source_class") or ""
        image, method = uploaded(values["image"]), chosen(values["method"])
        images = studio.edit(order, progress, image, shown, method, values["strength"])
        return results.of(studio, images, order, shown if order.label is None else None)

    inputs = {"image": file, "method": method, "strength": strength}
    inputs |= {"source_prompt": source} if studio.takes.text else {}
    inputs |= {"source_class": source_label} if studio.takes.labels else {}
    connect("edit", edit, listeners, controls.inputs | inputs, results, go, cancel)
    return file, results


# ---------------------------------------------------------------- what the tabs share


class Controls:
    """What to draw and how: the components that every tab has."""

    def __init__(self, studio: Studio, tab: str, prompt: str, example: str = "red apple") -> None:
        self._studio, self._tab = studio, tab
        self.prompt = gr.Textbox(
            "",
            label=prompt,
            placeholder=example,
            visible=studio.takes.text,
            max_length=LONGEST_PROMPT,
            elem_id=f"{tab}-prompt",
        )
        self.label = gr.Dropdown(
            list(studio.takes.labels), value=None, label="Class", visible=bool(studio.takes.labels)
        )
        self.images = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images", elem_id=f"{tab}-images")

    def add_details(self, guidance: float = 4.0, few_steps: bool = True) -> None:
        """The rest, below the buttons."""
        with gr.Row():
            self.seed = gr.Number(
                0, minimum=0, maximum=LARGEST_SEED, precision=0, label="Seed", elem_id=f"{self._tab}-seed"
            )
            self.new_seed = gr.Checkbox(True, label="New seed each time", elem_id=f"{self._tab}-new-seed")
        takes = self._studio.takes
        steps, guidable = (takes.steps if few_steps else 20), takes.condition and not takes.guided
        with gr.Row():
            self.steps = gr.Slider(1, MOST_STEPS, steps, step=1, label="Steps", elem_id=f"{self._tab}-steps")
            self.guidance = gr.Slider(
                0,
                MOST_GUIDANCE,
                1.0 if takes.guided else guidance,
                step=0.5,
                label="Guidance",
                visible=guidable,
            )
        with gr.Accordion("More", open=False):
            self.negative = gr.Textbox("", label="Keep away from", visible=self._studio.takes.text)
            self.solver = choice("Solver", lambda: self._studio.solvers)

    @property
    def inputs(self) -> dict[str, Any]:
        """The components by the names that a program gives them; those alone that the checkpoint takes."""
        named = {"images": self.images, "seed": self.seed, "new_seed": self.new_seed, "steps": self.steps}
        named |= {"guidance": self.guidance, "solver": self.solver}
        takes = self._studio.takes
        named |= {"prompt": self.prompt, "negative_prompt": self.negative} if takes.text else {}
        return named | ({"class_label": self.label} if takes.labels else {})

    def order(self, values: Values) -> Order:
        label, takes_text = values.get("class_label"), self._studio.takes.text
        order = Order(
            prompt=values["prompt"] or "" if takes_text and not label else None,
            label=label,
            negative=values.get("negative_prompt"),
            images=values["images"],
            seed=0 if values["new_seed"] else values["seed"],
            steps=values["steps"],
            guidance=values["guidance"],
            solver=chosen(values["solver"]),
        ).checked()
        return replace(order, seed=random.randrange(LARGEST_SEED)) if values["new_seed"] else order


class Painted:
    """The strokes of an editor: files among the uploads, whose oldest make room.

    The editor itself would keep all that windows send, in memory and for ever, and open it as any format.
    """

    def __init__(self, editor: gr.ImageEditor) -> None:
        self._folder = Path(editor.GRADIO_CACHE)
        editor.accept_blobs = server(lambda data: self.accept(data))

    def accept(self, data: Any) -> None:
        """Keep what a window has painted, under the window's own name for it."""
        if data.data.get("type") == "layer" and data.files:
            self._file(data.data.get("id")).write_bytes(data.files[0][1])

    def take(self, value: dict[str, Any] | None) -> list[str]:
        """Return the files of an editor's value; the page gives a name that was told to ``accept``."""
        if value and value.get("id"):
            file = self._file(value["id"])
            return [str(file)] if file.is_file() else []
        return [layer["path"] for layer in (value or {}).get("layers", [])]

    def _file(self, name: object) -> Path:
        return self._folder / f"{hashlib.sha256(str(name).encode()).hexdigest()}.png"


class Results:
    """The images that a tab has drawn, and what may be done with them."""

    def __init__(self, tab: str, height: int = 520) -> None:
        self.gallery = gr.Gallery(
            label="Images",
            elem_id=f"{tab}-results",
            columns=3,
            fit_columns=False,
            height=height,
            interactive=False,
            object_fit="contain",
            format="png",
            type="filepath",
            buttons=["download", "download_all", "fullscreen"],
        )
        # For programs: the page shows a message.
        self.unknown = gr.Textbox(label="Words that the checkpoint does not know", visible=False)
        with gr.Row():
            self._onward = {
                "inpaint": gr.Button("Paint on this one", size="sm", elem_id=f"{tab}-to-inpaint"),
                "edit": gr.Button("Edit this one", size="sm", elem_id=f"{tab}-to-edit"),
            }

    def of(self, studio: Studio, images: list[Image.Image], order: Order, *prompts: str | None) -> Any:
        """Return what a request gives: images with their seeds, the first seed, and words that were not understood.

        Args:
            prompts: further ones than the order's.
        """
        make_room(Path(self.gallery.GRADIO_CACHE), MOST_KEPT)
        words = ", ".join(studio.unknown_words(order.prompt, order.negative, *prompts))
        if words:
            said = f"The checkpoint does not know these words, and draws something of its own: {words}"
            gr.Warning(html.escape(printable(said), quote=False))
        return [(image, f"seed {order.seed + i}") for i, image in enumerate(images)], order.seed, words

    def hand_on(self, tabs: gr.Tabs, fields: dict[str, gr.File]) -> None:
        """Let the image that is looked at, else the first, become the image of another tab."""
        looked_at = gr.State(0)

        def look(event: gr.SelectData) -> Any:
            return event.index

        def take(index: int, images: list[tuple[str, str]] | None) -> Any:
            return images[min(index, len(images) - 1)][0] if images else gr.skip()

        self.gallery.change(lambda: 0, None, looked_at, **AT_ONCE)
        self.gallery.select(look, None, looked_at, **AT_ONCE)
        for tab, button in self._onward.items():
            taken = button.click(take, [looked_at, self.gallery], fields[tab], **AT_ONCE)
            select = functools.partial(gr.Tabs, selected=tab)
            taken.success(select, None, tabs, **AT_ONCE)


def choice(label: str, offered: Callable[[], list[str]]) -> gr.Dropdown:
    """A choice that may be left open. What is ``offered`` is asked once a window shows the page.

    The page is there before torch is, whose tables these are.
    """
    field = gr.Dropdown([USUAL], value=USUAL, label=label)
    gr.on(  # no trigger: when the page is loaded
        None,
        lambda: gr.Dropdown([USUAL, *offered()]),
        outputs=field,
        **AT_ONCE,
    )
    return field


def chosen(value: Any) -> Any:
    """Return a choice as it was made; None where it was left open."""
    return None if value == USUAL else value


def uploaded(value: dict[str, Any] | None) -> str | None:
    """Return the path of a file as Gradio hands it on."""
    return value["path"] if value else None


def enlarged(studio: Studio, path: str) -> Image.Image:
    """An uploaded image as it is shown, small ones large enough to paint on."""
    image, note = studio.opened(path)
    if note:
        gr.Info(note)
    from ..data.pixels import to_rgb

    image = to_rgb(image)  # the canvas is opaque
    scale = CANVAS / max(image.size)
    return image.resize([max(1, round(scale * side)) for side in image.size])


def image_field(tab: str) -> gr.File:
    return gr.File(label="Drop an image here", height=100, elem_id=f"{tab}-file")


def buttons(tab: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(tab.capitalize(), variant="primary", elem_id=f"{tab}-go")
        return go, gr.Button("Cancel", elem_id=f"{tab}-cancel")


def connect(
    tab: str,
    work: Callable[[Values, Progress], Any],
    listeners: Counter[str],
    inputs: dict[str, Any],
    results: Results,
    go: gr.Button,
    cancel: gr.Button,
) -> None:
    """Let the button, or Enter in the prompt, do the work, one request after the other; Cancel ends it."""

    async def handler(request: gr.Request, progress: gr.Progress = gr.Progress(), **values: Any) -> Any:  # noqa: B008
        names = {request.session_hash, LocalContext.event_id.get(None)}
        cancelled = threading.Event()

        def show(done: int, total: int, what: str) -> None:
            if cancelled.is_set() or not any(listeners[name] for name in names):
                raise Left
            progress((done, total), desc=what, unit="steps")

        deadline = request.request.scope[ARRIVED] + PATIENCE  # it may have waited for its turn
        try:
            while time.monotonic() < deadline and not any(listeners[name] for name in names):
                await asyncio.sleep(0.05)
            return await asyncio.to_thread(told(work), values, show)
        finally:
            cancelled.set()  # Gradio's Cancel cancels this; the thread ends at its next step

    triggers = [go.click] + ([inputs["prompt"].submit] if "prompt" in inputs else [])
    drawing = gr.on(
        triggers,
        handler,
        None,
        [results.gallery, inputs["seed"], results.unknown],
        inputs_kwargs=inputs,
        preprocess=False,  # what a request gives is checked and opened by us
        show_progress_on=results.gallery,
        trigger_mode="once",
        api_name=tab,
        concurrency_id="drawing",
    )
    cancel.click(None, cancels=[drawing])


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``work`` whose mistakes of the user and own defects become messages on the page and to programs."""

    @functools.wraps(work)
    def handler(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Left:
            raise gr.Error("Nobody waited for the result: it was not drawn.", print_exception=False) from None
        except UserError as error:
            raise gr.Error(line(error), print_exception=False) from None
        except Exception:
            log.exception("a request failed")
            raise gr.Error("The terminal says what went wrong.", print_exception=False) from None

    return handler


def line(error: UserError) -> str:
    """Return an error as one line that holds no markup: the page shows messages as HTML."""
    said = f"{error.what}. {error.fix[:1].upper()}{error.fix[1:]}" if error.fix else error.what
    return html.escape(said.replace("\n", " "), quote=False)
