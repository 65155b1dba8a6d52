"""The layout of the web page; :mod:`inference_server` answers its requests."""

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
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from gradio.components.base import server as callable_from_page
from gradio.context import LocalContext
from PIL import Image

from ..errors import UserError, printable
from .guard import ARRIVED, MOST_KEPT, make_room
from .inference_server import (
    CANVAS,
    LARGEST_SEED,
    LONGEST_PROMPT,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    GenerationRequest,
    InferenceServer,
    Progress,
)

log = logging.getLogger(__name__)
Values: TypeAlias = dict[str, Any]  # values of a request, by the names of its inputs
USUAL = "the checkpoint's own"
MOST_WAITING = 16  # requests in Gradio's queue
PATIENCE = 10.0  # seconds after its request in which a client has to listen for the answer
# Options of events that need neither the queue nor the models.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class ClientLeft(Exception):  # noqa: N818 - no error: the user pressed Cancel or closed the window
    """Raised in a request whose result nobody waits for any longer."""


def build(server: InferenceServer, listeners: Counter[str] | None = None) -> Any:
    """Return the page of one checkpoint.

    Args:
        listeners: number of open streams by session or event; a request ends once its own is closed.
    """
    listeners = Counter() if listeners is None else listeners
    layouts = {"generate": lay_out_generate, "inpaint": lay_out_inpaint, "edit": lay_out_edit}
    with gr.Blocks(title="latentflow", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        filled = {name: Tab(name, server, listeners) for name in layouts}
        with gr.Tabs() as tabs:
            for name, lay_out in layouts.items():
                with gr.Tab(name.capitalize(), id=name):
                    lay_out(filled[name])
        for tab in filled.values():
            tab.connect_send_buttons(tabs, {"inpaint": filled["inpaint"].file, "edit": filled["edit"].file})
    # A request uses all cores, or the only GPU: two at once would finish no sooner.
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def lay_out_generate(tab: Tab) -> None:
    """Fill the tab "Generate"."""
    with gr.Row():
        with gr.Column(scale=2):
            tab.add_conditions("Prompt")
            tab.add_details()
        with gr.Column(scale=3):
            tab.add_results()
    tab.connect(lambda request, values, progress: tab.server.generate(request, progress))


def lay_out_inpaint(tab: Tab) -> None:
    """Fill the tab "Inpaint"."""
    with gr.Row():
        with gr.Column(scale=2):
            tab.add_upload()
            editor = gr.ImageEditor(
                label="Paint over the area to replace",
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
            tab.add_conditions("Prompt for the masked area")
            tab.add_results(height=380)
            tab.add_details(few_steps=tab.server.capabilities.masks)
            with gr.Row():
                tab.add_choice("method", "Method", "inpaint")
                strength = gr.Slider(0, 1, 1, step=0.05, label="Strength (0 keeps the image, 1 ignores it)")
            with gr.Row():
                feather = gr.Slider(0, 32, 0, step=1, label="Soft edge (pixels)")
                margin = gr.Slider(0, 64, 0, step=1, label="Context around the mask (pixels; 0: all)")
    tab.inputs |= {"strokes": editor, "strength": strength, "feather": feather, "margin": margin}
    tab.show_upload(editor, lambda image: {"background": image, "layers": [], "composite": None})

    def inpaint(request: GenerationRequest, values: Values, progress: Progress) -> list[Image.Image]:
        settings = {name: values[name] for name in ("method", "strength", "feather", "margin")}
        strokes = painted.files(values["strokes"])
        return tab.server.inpaint(request, progress, values["image"], strokes, **settings)

    tab.connect(inpaint)


def lay_out_edit(tab: Tab) -> None:
    """Fill the tab "Edit"."""
    with gr.Row():
        with gr.Column(scale=2):
            tab.add_upload()
            shown = gr.Image(label="Image", interactive=False, height=320, buttons=[])
            tab.add_prompt("source_prompt", "Prompt for the original", "red apple", "edit-source")
            tab.add_class("source_class", "Class of the original")
        with gr.Column(scale=3):
            tab.add_conditions("Prompt for the result", "green apple")
            tab.add_results(height=380)
            tab.add_details(guidance=2.0, few_steps=False)
            with gr.Row():
                tab.add_choice("method", "Method", "edit")
                strength = gr.Slider(0, 1, 0.9, step=0.05, label="Strength (0 keeps the image)")
    tab.inputs |= {"strength": strength}
    tab.show_upload(shown, lambda image: image)

    def edit(request: GenerationRequest, values: Values, progress: Progress) -> list[Image.Image]:
        settings = {name: values[name] for name in ("method", "strength")}
        return tab.server.edit(request, progress, values["image"], source_of(values), **settings)

    tab.connect(edit)


class Tab:
    """A tab of the page: what all tabs have, added from top to bottom by the tab's layout.

    Attributes:
        inputs: the components that suit the checkpoint, by their names for programs.
        file: the upload field, if the tab has one.
    """

    def __init__(self, name: str, server: InferenceServer, listeners: Counter[str]) -> None:
        self.name, self.server, self._listeners = name, server, listeners
        self.inputs: dict[str, Any] = {}
        self.file: gr.File | None = None

    # ---------------------------------------------------------------- parts

    def add_conditions(self, prompt: str, example: str = "red apple") -> None:
        """Add prompt, class and number of images, and the buttons that start and cancel a request."""
        self.add_prompt("prompt", prompt, example, f"{self.name}-prompt")
        self.add_class("class_label", "Class")
        self.inputs["images"] = gr.Slider(
            1, MOST_IMAGES, 1, step=1, label="Images", elem_id=f"{self.name}-images"
        )
        with gr.Row():
            self._go = gr.Button(self.name.capitalize(), variant="primary", elem_id=f"{self.name}-go")
            self._cancel = gr.Button("Cancel", elem_id=f"{self.name}-cancel")

    def add_prompt(self, name: str, label: str, example: str = "", elem_id: str | None = None) -> None:
        """Add a field for a prompt, which is hidden if the checkpoint takes none."""
        visible = self.server.capabilities.text
        field = gr.Textbox(
            "", label=label, placeholder=example, visible=visible, max_length=LONGEST_PROMPT, elem_id=elem_id
        )
        self.inputs |= {name: field} if visible else {}

    def add_class(self, name: str, label: str) -> None:
        """Add a choice of a class, which is hidden if the checkpoint has none."""
        labels = list(self.server.capabilities.labels)
        field = gr.Dropdown(labels, value=None, label=label, visible=bool(labels))
        self.inputs |= {name: field} if labels else {}

    def add_choice(self, name: str, label: str, kind: str) -> None:
        """Add a choice that may be left open. Its options are filled in once a window has loaded the page.

        They come from tables that import torch, and the page is up before torch is.
        """
        field = self.inputs[name] = gr.Dropdown([USUAL], value=USUAL, label=label)

        def offered() -> gr.Dropdown:
            return gr.Dropdown([USUAL, *self.server.choices[kind]])

        gr.on(None, offered, outputs=field, **AT_ONCE)  # without a trigger: when the page is loaded

    def add_details(self, guidance: float = 4.0, few_steps: bool = True) -> None:
        """Add how images are sampled."""
        capabilities, name = self.server.capabilities, self.name
        with gr.Row():
            seed = gr.Number(
                0, minimum=0, maximum=LARGEST_SEED, precision=0, label="Seed", elem_id=f"{name}-seed"
            )
            new_seed = gr.Checkbox(True, label="New seed each time", elem_id=f"{name}-new-seed")
        distilled = capabilities.distilled_guidance
        guidable = capabilities.condition and not distilled
        default_steps = capabilities.steps if few_steps else 20
        default_guidance = 1.0 if distilled else guidance
        with gr.Row():
            steps = gr.Slider(1, MOST_STEPS, default_steps, step=1, label="Steps", elem_id=f"{name}-steps")
            scale = gr.Slider(
                0, MOST_GUIDANCE, default_guidance, step=0.5, label="Guidance", visible=guidable
            )
        self.inputs |= {"seed": seed, "new_seed": new_seed, "steps": steps, "guidance": scale}
        with gr.Accordion("More", open=False):
            self.add_prompt("negative_prompt", "Negative prompt")
            self.add_choice("solver", "Solver", "solver")

    def add_results(self, height: int = 520) -> None:
        """Add the generated images, and the buttons that send one to another tab."""
        self._gallery = gr.Gallery(
            label="Images",
            elem_id=f"{self.name}-results",
            columns=3,
            fit_columns=False,
            height=height,
            interactive=False,
            object_fit="contain",
            format="png",
            type="filepath",
            buttons=["download", "download_all", "fullscreen"],
        )
        # For programs; the page shows a message instead.
        self._unknown = gr.Textbox(label="Words that the checkpoint does not know", visible=False)
        with gr.Row():
            self._send = {
                tab: gr.Button(f"Send to {tab.capitalize()}", size="sm", elem_id=f"{self.name}-to-{tab}")
                for tab in ("inpaint", "edit")
            }

    def add_upload(self) -> None:
        """Add an upload field."""
        self.file = gr.File(label="Drop an image here", height=130, elem_id=f"{self.name}-file")
        self.inputs["image"] = self.file

    # ---------------------------------------------------------------- events

    def show_upload(self, field: Any, value_of: Callable[[Image.Image], Any]) -> None:
        """Show an uploaded image in a component: opaque, and large enough to paint on."""

        @reporting_errors
        def show(path: str | None) -> Any:
            if path is None:
                return None
            image, note = self.server.opened(path)
            if note:
                gr.Info(note)
            from ..data.images import to_rgb

            scale = CANVAS / max(image.size)
            size = [max(1, round(scale * side)) for side in image.size]
            return value_of(to_rgb(image).resize(size))

        assert self.file is not None
        self.file.change(show, self.file, field, show_progress="hidden", api_visibility="private")

    def connect(self, work: Callable[[GenerationRequest, Values, Progress], list[Image.Image]]) -> None:
        """Let the button, or Enter in the prompt, run ``work`` in Gradio's queue; Cancel ends it.

        Gradio runs a request to its end even if its client leaves, or has never listened. So a request that nobody
        listens to is not started, and a running one ends at its next step.
        """
        listeners = self._listeners

        async def handler(request: gr.Request, progress: gr.Progress = gr.Progress(), **values: Any) -> Any:  # noqa: B008
            names = {request.session_hash, LocalContext.event_id.get(None)}
            cancelled = threading.Event()

            def show(done: int, total: int, what: str) -> None:
                if cancelled.is_set() or not any(listeners[name] for name in names):
                    raise ClientLeft
                progress((done, total), desc=what, unit="steps")

            deadline = request.request.scope[ARRIVED] + PATIENCE  # it may have waited in the queue
            try:
                while time.monotonic() < deadline and not any(listeners[name] for name in names):
                    await asyncio.sleep(0.05)
                return await asyncio.to_thread(reporting_errors(self._answer), work, values, show)
            finally:
                cancelled.set()  # Cancel ends this coroutine; the thread ends at its next step

        triggers = [self._go.click] + ([self.inputs["prompt"].submit] if "prompt" in self.inputs else [])
        running = gr.on(
            triggers,
            handler,
            None,
            [self._gallery, self.inputs["seed"], self._unknown],
            inputs_kwargs=self.inputs,
            preprocess=False,  # values are checked, and files opened, by our own code
            show_progress_on=self._gallery,
            trigger_mode="once",
            api_name=self.name,
            concurrency_id="sampling",
        )
        self._cancel.click(None, cancels=[running])

    def _answer(
        self,
        work: Callable[[GenerationRequest, Values, Progress], list[Image.Image]],
        values: Values,
        progress: Progress,
    ) -> tuple[list[tuple[Image.Image, str]], int, str]:
        """Return the outputs of a request: images with their seeds, the first seed, and unknown words."""
        values |= {name: None for name in ("solver", "method") if values.get(name) == USUAL}
        values["image"] = (values.get("image") or {}).get("path")
        if values["new_seed"]:
            values["seed"] = random.randrange(LARGEST_SEED)
        names = [field.name for field in fields(GenerationRequest)]
        request = GenerationRequest(**{name: values[name] for name in names if name in values})
        images = work(request, values, progress)

        make_room(Path(self._gallery.GRADIO_CACHE), MOST_KEPT)
        prompts = [] if request.class_label else [request.prompt, source_of(values)]
        words = ", ".join(self.server.unknown_words(*prompts, request.negative_prompt))
        if words:
            message = f"The checkpoint does not know these words, and ignores their meaning: {words}"
            gr.Warning(html.escape(printable(message), quote=False))
        return [(image, f"seed {request.seed + i}") for i, image in enumerate(images)], request.seed, words

    def connect_send_buttons(self, tabs: gr.Tabs, files: dict[str, gr.File | None]) -> None:
        """Let the buttons send the selected image, else the first, to another tab's upload field."""
        selected = gr.State(0)

        def index_of(event: gr.SelectData) -> Any:
            return event.index

        def image_at(index: int, images: list[tuple[str, str]] | None) -> Any:
            return images[min(index, len(images) - 1)][0] if images else gr.skip()

        self._gallery.change(lambda: 0, None, selected, **AT_ONCE)
        self._gallery.select(index_of, None, selected, **AT_ONCE)
        for tab, button in self._send.items():
            taken = button.click(image_at, [selected, self._gallery], files[tab], **AT_ONCE)
            taken.success(functools.partial(gr.Tabs, selected=tab), None, tabs, **AT_ONCE)


class Painted:
    """The strokes of an editor, stored as files among the uploads.

    The editor itself would keep everything that windows send in memory for ever, and open files of any format.
    """

    def __init__(self, editor: gr.ImageEditor) -> None:
        self._folder = Path(editor.GRADIO_CACHE)
        editor.accept_blobs = callable_from_page(lambda data: self.accept(data))

    def accept(self, data: Any) -> None:
        """Store what was painted in a window, under the id that the window sends."""
        if data.data.get("type") == "layer" and data.files:
            self._file(data.data.get("id")).write_bytes(data.files[0][1])

    def files(self, value: dict[str, Any] | None) -> list[str]:
        """Return the files of an editor's value; the page sends an id that ``accept`` has stored."""
        if value and value.get("id"):
            file = self._file(value["id"])
            return [str(file)] if file.is_file() else []
        return [layer["path"] for layer in (value or {}).get("layers", [])]

    def _file(self, name: object) -> Path:
        return self._folder / f"{hashlib.sha256(str(name).encode()).hexdigest()}.png"


def source_of(values: Values) -> Any:
    """Return the prompt or class of the image that is edited; "": unknown."""
    return values.get("source_prompt") or values.get("source_class") or ""


def reporting_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``work`` so that its exceptions become messages on the page and for programs, on one line without markup."""

    @functools.wraps(work)
    def handler(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except ClientLeft:
            message = "The client left, and the request was ended."
        except UserError as error:
            message = f"{error.what}. {error.fix[:1].upper()}{error.fix[1:]}" if error.fix else error.what
            message = html.escape(message.replace("\n", " "), quote=False)
        except Exception:
            log.exception("a request failed")
            message = "Something went wrong; the server's terminal shows what."
        raise gr.Error(message, print_exception=False)

    return handler
