"""A tab of the web page: what all tabs have, and how they ask the server for images."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import html
import inspect
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
from gradio.components.base import server as callable_from_page
from gradio.context import LocalContext
from PIL import Image

from ..config import AdapterChoice
from ..errors import UserError, printable
from ..inference.sample import Capabilities
from .checkpoint_facts import LARGEST_WEIGHT
from .guard import ARRIVED, MOST_KEPT, make_room
from .inference_server import (
    BOUNDS,
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
USUAL = "default"
NAMED_STEPS = 20  # of methods that fill or edit
PATIENCE = 10.0  # seconds after its request in which a client has to listen for the answer
# Inputs that a program may leave out though they have no value at first.
OPTIONAL = ("class_label", "source_class", "control_image", "control_labels")
# Options of events that need neither the queue nor the models.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# On a narrow screen the result is below the button that asks for it.
SCROLL_TO_RESULT = """() => {
    if (window.innerWidth < 768)
        document.getElementById("%s-results").scrollIntoView({behavior: "smooth", block: "nearest"})
}"""


class ClientLeft(Exception):  # noqa: N818 - no error: the user pressed Cancel or closed the window
    """Raised in a request whose result nobody waits for any longer."""


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
        self._weights: dict[str, str] = {}  # name of an adapter -> name of the input for its weight

    # ---------------------------------------------------------------- parts

    def add_conditions(
        self, prompt: str, placeholder: str = "red apple", examples: Sequence[str] = ()
    ) -> None:
        """Add a prompt, with examples to click, and a class."""
        self.add_prompt("prompt", prompt, placeholder, f"{self.name}-prompt")
        if examples and self.server.capabilities.text:
            gr.Examples(
                [[text] for text in examples],
                self.inputs["prompt"],
                label="Examples",
                elem_id=f"{self.name}-examples",
                cache_examples=False,
                preload=False,
                api_visibility="private",
            )
        self.add_class("class_label", "Class", optional=self.server.capabilities.text)

    def add_buttons(self) -> None:
        """Add the buttons that start and cancel a request."""
        with gr.Row():
            self._go = gr.Button(
                self.name.capitalize(), variant="primary", elem_id=f"{self.name}-go", scale=3
            )
            self._cancel = gr.Button("Cancel", elem_id=f"{self.name}-cancel", scale=1, min_width=90)

    def add_prompt(self, name: str, label: str, placeholder: str = "", elem_id: str | None = None) -> None:
        """Add a field for a prompt, which is hidden if the checkpoint takes none (of the kind)."""
        capabilities = self.server.capabilities
        visible = capabilities.text and (capabilities.negative or name != "negative_prompt")
        field = gr.Textbox(
            "",
            label=label,
            placeholder=placeholder,
            visible=visible,
            max_length=LONGEST_PROMPT,
            elem_id=elem_id,
        )
        self.inputs |= {name: field} if visible else {}

    def add_class(self, name: str, label: str, optional: bool) -> None:
        """Add a choice of a class, which is hidden if the checkpoint has none; if it is not optional, the first is
        chosen."""
        labels = list(self.server.capabilities.labels)
        first = labels[0] if labels and not optional else None
        field = gr.Dropdown(labels, value=first, label=label, visible=bool(labels))
        self.inputs |= {name: field} if labels else {}

    def add_adapters(self, fast: bool = True) -> None:
        """Add a switch for the few-step adapter, if there is one, and a choice of LoRA adapters with their weights.

        Args:
            fast: few steps suffice for what the tab does.
        """
        server = self.server
        if fast and server.has_fast:
            self.inputs["fast"] = gr.Checkbox(
                server.chosen.fast,
                label="Few steps",
                info="Faster: uses the checkpoint's few-step adapter",
                elem_id=f"{self.name}-fast",
            )
        if not server.adapters:
            return
        chosen = [name for name, offered in server.adapters.items() if offered.chosen]
        picker = self.inputs["lora"] = gr.Dropdown(
            list(server.adapters),
            value=chosen,
            multiselect=True,
            label="LoRA",
            info="Adapters to add to the checkpoint",
            elem_id=f"{self.name}-lora",
        )
        for number, (name, offered) in enumerate(server.adapters.items(), 1):
            self._weights[name] = f"lora_weight_{number}"
            self.inputs[self._weights[name]] = gr.Slider(
                -LARGEST_WEIGHT,
                LARGEST_WEIGHT,
                offered.weight,
                step=0.05,
                label=f"Weight of {name}",
                visible=offered.chosen,
                elem_id=f"{self.name}-lora-weight-{number}",
            )
        weights = {name: self.inputs[key] for name, key in self._weights.items()}

        def show_chosen(names: list[str]) -> dict[Any, gr.Slider]:  # of one slider a list would be its value
            return {slider: gr.Slider(visible=name in names) for name, slider in weights.items()}

        picker.change(show_chosen, picker, list(weights.values()), **AT_ONCE)

    def add_choice(self, name: str, label: str, kind: str) -> None:
        """Add a choice that may be left open. Its options are filled in once a window has loaded the page.

        They come from tables that import torch, and the page is up before torch is.
        """
        field = self.inputs[name] = gr.Dropdown([USUAL], value=USUAL, label=label)

        def offered() -> gr.Dropdown:
            return gr.Dropdown([USUAL, *self.server.choices[kind]])

        gr.on(None, offered, outputs=field, **AT_ONCE)  # without a trigger: when the page is loaded

    def add_settings(self) -> None:
        """Add the number of images and their seeds."""
        name = self.name
        with gr.Group():
            images = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Number of images", elem_id=f"{name}-images")
            with gr.Row():
                seed = gr.Number(
                    0, minimum=0, maximum=LARGEST_SEED, precision=0, label="Seed", elem_id=f"{name}-seed"
                )
                new_seed = gr.Checkbox(True, label="Randomize seed", elem_id=f"{name}-new-seed")
        self.inputs |= {"images": images, "seed": seed, "new_seed": new_seed}

    def add_sampling(self, guidance: float | None = None, few_steps: bool = True) -> None:
        """Add how images are sampled.

        Args:
            guidance: the scale that suits what the tab does; None: the model's usual one.
            few_steps: the checkpoint's own number of steps suffices for it.
        """
        capabilities, name = self.server.capabilities, self.name
        distilled = capabilities.distilled_guidance
        default_steps = self._usual_steps(capabilities, few_steps)
        with gr.Row():
            steps = gr.Slider(1, MOST_STEPS, default_steps, step=1, label="Steps", elem_id=f"{name}-steps")
            scale = gr.Slider(
                0,
                MOST_GUIDANCE,
                1.0 if distilled else capabilities.guidance if guidance is None else guidance,
                step=0.5,
                label="Guidance scale",
                visible=capabilities.condition and not distilled,
                elem_id=f"{name}-guidance",
            )
        self.inputs |= {"steps": steps, "guidance": scale}
        self._follow_adapters(few_steps, default_steps)

    def add_jumps(self) -> None:
        """Add how tokens are drawn, for checkpoints that draw some."""
        fields = {
            "temperature": "below 1: likely tokens more often",
            "corrector": "times that each is redrawn",
        }
        taken = [name for name in fields if name in self.server.capabilities.jump_settings]
        if not taken:
            return
        with gr.Row():
            for name in taken:
                low, high, _ = BOUNDS[name]
                self.inputs[name] = gr.Slider(
                    low,
                    high,
                    getattr(GenerationRequest, name),
                    step=0.05 if name == "temperature" else 0.5,
                    label=name.capitalize(),
                    info=fields[name].capitalize(),
                    elem_id=f"{self.name}-{name}",
                )

    def _usual_steps(self, capabilities: Capabilities, few_steps: bool) -> int:
        """Return the number of steps to begin with: the checkpoint's own where it has one, or the tab draws."""
        own = capabilities.steps != Capabilities.steps or self.name == "generate"
        return capabilities.steps if few_steps and own else NAMED_STEPS

    def _follow_adapters(self, few_steps: bool, default_steps: int) -> None:
        """Let classes, steps and guidance change with the adapters: some bring classes, or need few steps."""
        switches = {name: self.inputs[name] for name in ("fast", "lora") if name in self.inputs}
        if not switches:
            return
        classes = [name for name in ("class_label", "source_class") if name in self.inputs]
        usual = gr.State(default_steps)  # a number that somebody has set stays while the usual one does
        outputs = [usual, *(self.inputs[name] for name in ("steps", "guidance", *classes))]

        @reporting_errors
        def follow(before: int, *given: Any) -> list[Any]:
            values = dict(zip([*switches, *self._weights.values()], given, strict=True))
            with_adapters = self.server.capabilities_with(self._choice(values))
            steps = self._usual_steps(with_adapters, few_steps)
            guided = with_adapters.condition and not with_adapters.distilled_guidance
            return [
                steps,
                gr.skip() if steps == before else steps,
                gr.Slider(visible=guided),
                *(gr.Dropdown(choices=list(with_adapters.labels)) for _ in classes),
            ]

        inputs = [usual, *switches.values(), *(self.inputs[name] for name in self._weights.values())]
        changes = [field.change for field in switches.values()]
        gr.on(changes, follow, inputs, outputs, show_progress="hidden", api_visibility="private")

    def _choice(self, values: Values) -> AdapterChoice:
        """Return the adapters that a request names."""
        return self.server.choice(values.get("fast", False), self._lora(values))

    def _lora(self, values: Values) -> tuple[tuple[str, Any], ...]:
        """Return name and weight of each LoRA that a request names."""
        names = values.get("lora") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError("lora must be a list of names")
        return tuple((name, values.get(self._weights.get(name, ""), 1.0)) for name in names)

    def add_results(self, height: int = 520) -> None:
        """Add the generated images, and the buttons that send one to another tab."""
        self._gallery = gr.Gallery(
            label="Images",
            elem_id=f"{self.name}-results",
            height=f"min({height}px, 84vw)",
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
                tab: gr.Button(
                    f"Send to {tab.capitalize()}", size="sm", elem_id=f"{self.name}-to-{tab}", min_width=120
                )
                for tab in self.server.capabilities.calls
                if tab != "generate"
            }

    def add_upload(self) -> None:
        """Add an upload field."""
        self.file = gr.File(label="Image", elem_id=f"{self.name}-file")
        self.inputs["image"] = self.file

    def add_control(self) -> None:
        """Add an upload field, with a preview and a scale, for each kind of control images that the checkpoint
        takes."""
        capabilities = self.server.capabilities
        for kind in capabilities.control:
            label = {"image": "Control image", "labels": "Label map"}[kind]
            field = gr.File(label=label, elem_id=f"{self.name}-control-{kind}", height=120)
            shown = gr.Image(
                show_label=False,
                interactive=False,
                height=200,
                buttons=[],
                visible=False,
                elem_id=f"{self.name}-control-{kind}-shown",
            )
            self.inputs[f"control_{kind}"] = field
            field.change(
                reporting_errors(functools.partial(self._show_control, kind)),
                field,
                shown,
                show_progress="hidden",
                api_visibility="private",
            )
            if capabilities.image_input != "control":  # which draws nothing without
                self.inputs[f"control_{kind}_scale"] = gr.Slider(
                    0,
                    5,
                    1,
                    step=0.25,
                    label=f"{label} scale",
                    info="0 draws without, more than 1 follows it harder",
                    elem_id=f"{self.name}-control-{kind}-scale",
                )

    def _show_control(self, kind: str, path: str | None) -> Any:
        if path is None:
            return gr.update(value=None, visible=False)
        image = self.server.control(kind, path).convert("RGB")
        image.thumbnail((CANVAS, CANVAS))
        return gr.update(value=image, visible=True)

    # ---------------------------------------------------------------- events

    def show_upload(self, field: Any, value_of: Callable[[Image.Image], Any], *hints: gr.HTML) -> None:
        """Show an uploaded image in a component: opaque, and large enough to paint on; without one, hide it.

        Args:
            hints: what is shown with it.
        """

        @reporting_errors
        def show(path: str | None) -> Any:
            if path is None:
                return {field: gr.update(value=None, visible=False)} | dict.fromkeys(
                    hints, gr.update(visible=False)
                )
            image, note = self.server.opened(path)
            if note:
                gr.Info(note)
            from ..data.images import to_rgb

            scale = CANVAS / max(image.size)
            size = [max(1, round(scale * side)) for side in image.size]
            value = value_of(to_rgb(image).resize(size))
            return {field: gr.update(value=value, visible=True)} | dict.fromkeys(
                hints, gr.update(visible=True)
            )

        assert self.file is not None
        options = {"show_progress": "hidden", "api_visibility": "private"}
        self.file.change(show, self.file, [field, *hints], **options)

    def connect(self, work: Callable[[GenerationRequest, Values, Progress], list[Image.Image]]) -> None:
        """Let the button, or Enter in the prompt, run ``work`` in Gradio's queue; Cancel ends it.

        Gradio runs a request to its end even if its client leaves, or has never listened. So a request that nobody
        listens to is not started, and a running one ends at its next step.
        """
        listeners = self._listeners

        async def answers(request: gr.Request, progress: gr.Progress, values: Values) -> AsyncIterator[Any]:
            """Yield the outputs: those of the newest previews again and again, then the request's own."""
            previews: list[list[Image.Image]] = []
            names = {request.session_hash, LocalContext.event_id.get(None)}
            cancelled = threading.Event()

            def show(done: int, total: int, what: str, *images: list[Image.Image]) -> None:
                if cancelled.is_set() or not any(listeners[name] for name in names):
                    raise ClientLeft
                progress((done, total), desc=what, unit="steps")
                previews.extend(images)

            deadline = request.request.scope[ARRIVED] + PATIENCE  # it may have waited in the queue
            try:
                while time.monotonic() < deadline and not any(listeners[name] for name in names):
                    await asyncio.sleep(0.05)
                answer = reporting_errors(self._answer)
                task = asyncio.create_task(asyncio.to_thread(answer, work, values, show))
                # Of a cancelled request nobody awaits the task: asyncio would log its `ClientLeft` as an error.
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
                while not task.done():
                    await asyncio.wait({task}, timeout=0.1 if self.server.preview_vae else None)
                    if previews and not task.done():
                        yield [(image, "preview") for image in previews[-1]], gr.skip(), gr.skip()
                        previews.clear()
                yield task.result()
            finally:
                cancelled.set()  # Cancel ends this coroutine; the thread ends at its next step

        async def handler(request: gr.Request, progress: gr.Progress = gr.Progress(), **values: Any) -> Any:  # noqa: B008
            return [outputs async for outputs in answers(request, progress, values)][-1]

        async def with_previews(
            request: gr.Request,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
            **values: Any,
        ) -> AsyncIterator[Any]:
            async for outputs in answers(request, progress, values):
                yield outputs

        triggers = [self._go.click] + ([self.inputs["prompt"].submit] if "prompt" in self.inputs else [])
        running = gr.on(
            triggers,
            with_optional(with_previews if self.server.preview_vae else handler),
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
        self._go.click(None, js=SCROLL_TO_RESULT % self.name)

    def _answer(
        self,
        work: Callable[[GenerationRequest, Values, Progress], list[Image.Image]],
        values: Values,
        progress: Progress,
    ) -> tuple[list[tuple[Image.Image, str]], int, str]:
        """Return the outputs of a request: images with their seeds, the first seed, and unknown words."""
        values |= {name: None for name in ("solver", "method") if values.get(name) == USUAL}
        for name in ("image", "control_image", "control_labels"):
            values[name] = (values.get(name) or {}).get("path")
        if values["new_seed"]:
            values["seed"] = random.randrange(LARGEST_SEED)
        names = [field.name for field in fields(GenerationRequest)]
        values["lora"] = self._lora(values)
        request = GenerationRequest(**{name: values[name] for name in names if name in values})
        images = work(request, values, progress)

        make_room(Path(self._gallery.GRADIO_CACHE), MOST_KEPT)
        prompts = [] if request.class_label else [request.prompt, source_of(values)]
        words = ", ".join(self.server.unknown_words(request, *prompts, request.negative_prompt))
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


def with_optional(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Give a handler of keywords the parameters `OPTIONAL`, with None as their default, which Gradio looks for."""
    signature = inspect.signature(handler)
    *own, keywords = signature.parameters.values()
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OPTIONAL]
    handler.__signature__ = signature.replace(parameters=[*own, *more, keywords])  # type: ignore[attr-defined]
    return handler


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
