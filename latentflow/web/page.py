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
from dataclasses import replace
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
    with gr.Blocks(title="latentflow", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        listeners = Counter() if listeners is None else listeners
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generated = generate_tab(server, listeners)
            with gr.Tab("Inpaint", id="inpaint"):
                paint_on, inpainted = inpaint_tab(server, listeners)
            with gr.Tab("Edit", id="edit"):
                edit_of, edited = edit_tab(server, listeners)
        for results in (generated, inpainted, edited):
            results.connect_send_buttons(tabs, {"inpaint": paint_on, "edit": edit_of})
    # A request uses all cores, or the only GPU: two at once would finish no sooner.
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


# ---------------------------------------------------------------- tabs


def generate_tab(server: InferenceServer, listeners: Counter[str]) -> Results:
    """Build the tab "Generate", and return its results."""
    with gr.Row():
        with gr.Column(scale=2):
            controls = Controls(server, "generate", "Prompt")
            go, cancel = buttons("generate")
            controls.add_details()
        with gr.Column(scale=3):
            results = Results("generate")

    def generate(values: Values, progress: Progress) -> Any:
        request = controls.request(values)
        return results.outputs(server, server.generate(request, progress), request)

    connect("generate", generate, listeners, controls.inputs, results, go, cancel)
    return results


def inpaint_tab(server: InferenceServer, listeners: Counter[str]) -> tuple[gr.File, Results]:
    """Build the tab "Inpaint", and return its upload field and its results."""
    with gr.Row():
        with gr.Column(scale=2):
            file = image_field("inpaint")
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
            controls = Controls(server, "inpaint", "Prompt for the masked area")
            go, cancel = buttons("inpaint")
            results = Results("inpaint", height=380)
            controls.add_details(few_steps=server.capabilities.masks)
            with gr.Row():
                method = choice("Method", lambda: server.inpainting_methods)
                strength = gr.Slider(0, 1, 1, step=0.05, label="Strength (0 keeps the image, 1 ignores it)")
            with gr.Row():
                feather = gr.Slider(0, 32, 0, step=1, label="Soft edge (pixels)")
                margin = gr.Slider(0, 64, 0, step=1, label="Context around the mask (pixels; 0: all)")

    @reporting_errors
    def show(path: str | None) -> Any:
        if path is None:
            return None
        return {"background": display_image(server, path), "layers": [], "composite": None}

    file.change(show, file, editor, show_progress="hidden", api_visibility="private")

    def inpaint(values: Values, progress: Progress) -> Any:
        request = controls.request(values)
        strokes = [server.stroke(path) for path in painted.files(values["strokes"])]
        settings = {name: values[name] for name in ("strength", "feather", "margin")}
        method = chosen(values["method"])
        image = uploaded(values["image"])
        images = server.inpaint(request, progress, image, strokes, method=method, **settings)
        return results.outputs(server, images, request)

    inputs = {"image": file, "strokes": editor, "method": method, "strength": strength}
    inputs |= {"feather": feather, "margin": margin}
    connect("inpaint", inpaint, listeners, controls.inputs | inputs, results, go, cancel)
    return file, results


def edit_tab(server: InferenceServer, listeners: Counter[str]) -> tuple[gr.File, Results]:
    """Build the tab "Edit", and return its upload field and its results."""
    with gr.Row():
        with gr.Column(scale=2):
            file = image_field("edit")
            shown = gr.Image(label="Image", interactive=False, height=320, buttons=[])
            source = prompt_field(server, "Prompt for the original", "red apple", "edit-source")
            source_label = class_field(server, "Class of the original")
        with gr.Column(scale=3):
            controls = Controls(server, "edit", "Prompt for the result", "green apple")
            go, cancel = buttons("edit")
            results = Results("edit", height=380)
            controls.add_details(guidance=2.0, few_steps=False)
            with gr.Row():
                method = choice("Method", lambda: server.editing_methods)
                strength = gr.Slider(0, 1, 0.9, step=0.05, label="Strength (0 keeps the image)")

    @reporting_errors
    def show(path: str | None) -> Any:
        return None if path is None else display_image(server, path)

    file.change(show, file, shown, show_progress="hidden", api_visibility="private")

    def edit(values: Values, progress: Progress) -> Any:
        request = controls.request(values)
        shown = values.get("source_prompt") or values.get("source_class") or ""
        image, method = uploaded(values["image"]), chosen(values["method"])
        images = server.edit(request, progress, image, shown, method, values["strength"])
        return results.outputs(server, images, request, shown if request.label is None else None)

    inputs = {"image": file, "method": method, "strength": strength}
    inputs |= {"source_prompt": source} if server.capabilities.text else {}
    inputs |= {"source_class": source_label} if server.capabilities.labels else {}
    connect("edit", edit, listeners, controls.inputs | inputs, results, go, cancel)
    return file, results


# ---------------------------------------------------------------- parts of several tabs


class Controls:
    """The components that every tab has: conditions, number of images, and how they are sampled."""

    def __init__(self, server: InferenceServer, tab: str, prompt: str, example: str = "red apple") -> None:
        self._server, self._tab = server, tab
        self.prompt = prompt_field(server, prompt, example, f"{tab}-prompt")
        self.label = class_field(server, "Class")
        self.images = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images", elem_id=f"{tab}-images")

    def add_details(self, guidance: float = 4.0, few_steps: bool = True) -> None:
        """Add the components below the buttons."""
        with gr.Row():
            self.seed = gr.Number(
                0, minimum=0, maximum=LARGEST_SEED, precision=0, label="Seed", elem_id=f"{self._tab}-seed"
            )
            self.new_seed = gr.Checkbox(True, label="New seed each time", elem_id=f"{self._tab}-new-seed")
        capabilities = self._server.capabilities
        steps = capabilities.steps if few_steps else 20
        guidance = 1.0 if capabilities.distilled_guidance else guidance
        guidable = capabilities.condition and not capabilities.distilled_guidance
        with gr.Row():
            self.steps = gr.Slider(1, MOST_STEPS, steps, step=1, label="Steps", elem_id=f"{self._tab}-steps")
            self.guidance = gr.Slider(
                0, MOST_GUIDANCE, guidance, step=0.5, label="Guidance", visible=guidable
            )
        with gr.Accordion("More", open=False):
            self.negative = gr.Textbox("", label="Negative prompt", visible=capabilities.text)
            self.solver = choice("Solver", lambda: self._server.solvers)

    @property
    def inputs(self) -> dict[str, Any]:
        """Return the components that suit the checkpoint, by their names for programs."""
        named = {"images": self.images, "seed": self.seed, "new_seed": self.new_seed, "steps": self.steps}
        named |= {"guidance": self.guidance, "solver": self.solver}
        if self._server.capabilities.text:
            named |= {"prompt": self.prompt, "negative_prompt": self.negative}
        return named | ({"class_label": self.label} if self._server.capabilities.labels else {})

    def request(self, values: Values) -> GenerationRequest:
        """Return the request that these values make, with a new seed if one is wanted."""
        label, takes_text = values.get("class_label"), self._server.capabilities.text
        request = GenerationRequest(
            prompt=values["prompt"] or "" if takes_text and not label else None,
            label=label,
            negative=values.get("negative_prompt"),
            images=values["images"],
            seed=0 if values["new_seed"] else values["seed"],
            steps=values["steps"],
            guidance=values["guidance"],
            solver=chosen(values["solver"]),
        ).checked()
        return replace(request, seed=random.randrange(LARGEST_SEED)) if values["new_seed"] else request


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


class Results:
    """The generated images of a tab, and the buttons that send one to another tab."""

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
        # For programs; the page shows a message instead.
        self.unknown = gr.Textbox(label="Words that the checkpoint does not know", visible=False)
        with gr.Row():
            self._onward = {
                "inpaint": gr.Button("Send to Inpaint", size="sm", elem_id=f"{tab}-to-inpaint"),
                "edit": gr.Button("Send to Edit", size="sm", elem_id=f"{tab}-to-edit"),
            }

    def outputs(
        self,
        server: InferenceServer,
        images: list[Image.Image],
        request: GenerationRequest,
        *prompts: str | None,
    ) -> Any:
        """Return the outputs of a request: images with their seeds, the first seed, and unknown words.

        Args:
            prompts: prompts besides those of the request.
        """
        make_room(Path(self.gallery.GRADIO_CACHE), MOST_KEPT)
        words = ", ".join(server.unknown_words(request.prompt, request.negative, *prompts))
        if words:
            message = f"The checkpoint does not know these words, and ignores their meaning: {words}"
            gr.Warning(html.escape(printable(message), quote=False))
        return [(image, f"seed {request.seed + i}") for i, image in enumerate(images)], request.seed, words

    def connect_send_buttons(self, tabs: gr.Tabs, fields: dict[str, gr.File]) -> None:
        """Let the buttons send the selected image, else the first, to another tab."""
        selected = gr.State(0)

        def index_of(event: gr.SelectData) -> Any:
            return event.index

        def image_at(index: int, images: list[tuple[str, str]] | None) -> Any:
            return images[min(index, len(images) - 1)][0] if images else gr.skip()

        self.gallery.change(lambda: 0, None, selected, **AT_ONCE)
        self.gallery.select(index_of, None, selected, **AT_ONCE)
        for tab, button in self._onward.items():
            taken = button.click(image_at, [selected, self.gallery], fields[tab], **AT_ONCE)
            show_tab = functools.partial(gr.Tabs, selected=tab)
            taken.success(show_tab, None, tabs, **AT_ONCE)


def prompt_field(server: InferenceServer, label: str, example: str, elem_id: str) -> gr.Textbox:
    """Build a field for a prompt, which is hidden if the checkpoint takes none."""
    visible = server.capabilities.text
    return gr.Textbox(
        "", label=label, placeholder=example, visible=visible, max_length=LONGEST_PROMPT, elem_id=elem_id
    )


def class_field(server: InferenceServer, label: str) -> gr.Dropdown:
    """Build a choice of a class, which is hidden if the checkpoint has none."""
    labels = list(server.capabilities.labels)
    return gr.Dropdown(labels, value=None, label=label, visible=bool(labels))


def choice(label: str, offered: Callable[[], list[str]]) -> gr.Dropdown:
    """Build a choice that may be left open. Its options are filled in once a window has loaded the page.

    They come from tables that import torch, and the page is up before torch is.
    """
    field = gr.Dropdown([USUAL], value=USUAL, label=label)
    gr.on(  # without a trigger: when the page is loaded
        None, lambda: gr.Dropdown([USUAL, *offered()]), outputs=field, **AT_ONCE
    )
    return field


def chosen(value: Any) -> Any:
    """Return a choice, or None if it was left open."""
    return None if value == USUAL else value


def uploaded(value: dict[str, Any] | None) -> str | None:
    """Return the path of an uploaded file."""
    return value["path"] if value else None


def display_image(server: InferenceServer, path: str) -> Image.Image:
    """Return an uploaded image as the page shows it: opaque, and large enough to paint on."""
    image, note = server.opened(path)
    if note:
        gr.Info(note)
    from ..data.images import to_rgb

    image = to_rgb(image)
    scale = CANVAS / max(image.size)
    return image.resize([max(1, round(scale * side)) for side in image.size])


def image_field(tab: str) -> gr.File:
    """Build an upload field."""
    return gr.File(label="Drop an image here", height=100, elem_id=f"{tab}-file")


def buttons(tab: str) -> tuple[gr.Button, gr.Button]:
    """Build the buttons that start and cancel a request."""
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
    """Let the button, or Enter in the prompt, run ``work`` in Gradio's queue; Cancel ends it.

    Gradio runs a request to its end even if its client leaves, or has never listened. So a request that nobody listens
    to is not started, and a running one ends at its next step.
    """

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
            return await asyncio.to_thread(reporting_errors(work), values, show)
        finally:
            cancelled.set()  # Cancel ends this coroutine; the thread ends at its next step

    triggers = [go.click] + ([inputs["prompt"].submit] if "prompt" in inputs else [])
    running = gr.on(
        triggers,
        handler,
        None,
        [results.gallery, inputs["seed"], results.unknown],
        inputs_kwargs=inputs,
        preprocess=False,  # values are checked, and files opened, by our own code
        show_progress_on=results.gallery,
        trigger_mode="once",
        api_name=tab,
        concurrency_id="sampling",
    )
    cancel.click(None, cancels=[running])


def reporting_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``work`` so that its exceptions become messages on the page and for programs."""

    @functools.wraps(work)
    def handler(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except ClientLeft:
            raise gr.Error("The client left, and the request was ended.", print_exception=False) from None
        except UserError as error:
            raise gr.Error(error_line(error), print_exception=False) from None
        except Exception:
            log.exception("a request failed")
            raise gr.Error(
                "Something went wrong; the server's terminal shows what.", print_exception=False
            ) from None

    return handler


def error_line(error: UserError) -> str:
    """Return an error as one line without markup, since the page shows messages as HTML."""
    message = f"{error.what}. {error.fix[:1].upper()}{error.fix[1:]}" if error.fix else error.what
    return html.escape(message.replace("\n", " "), quote=False)
