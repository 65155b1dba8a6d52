"""The layout of the web page; what its buttons do is in :mod:`studio`."""

from __future__ import annotations

import functools
import html
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import gradio as gr

from ..errors import UserError
from ..image_formats import open_no_others
from .studio import (
    CANVAS,
    LARGEST_SEED,
    LONGEST_PROMPT,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_STEPS,
    Order,
    Progress,
    Studio,
)
from .turns import LONGEST_LINE, Stopped

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
Values: TypeAlias = dict[Any, Any]  # component -> what it holds
USUAL = "the checkpoint's own"
LARGEST_UPLOAD = "32mb"
# Fonts of the reader's machine: Gradio's own would come from the network.
THEME = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


def build(studio: Studio) -> Any:
    """The page of one checkpoint."""
    with gr.Blocks(title="latentflow", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generated = generate_tab(studio)
            with gr.Tab("Inpaint", id="inpaint"):
                paint_on, inpainted = inpaint_tab(studio)
            with gr.Tab("Edit", id="edit"):
                edit_of, edited = edit_tab(studio)
        for results in (generated, inpainted, edited):
            results.hand_on(tabs, {"inpaint": paint_on, "edit": edit_of})

        def leave(request: gr.Request) -> None:  # the window is closed
            for tab in ("generate", "inpaint", "edit"):
                studio.stop(owner(request, tab))

        page.unload(leave)
    page.queue(default_concurrency_limit=LONGEST_LINE, api_open=False)
    return page


# ---------------------------------------------------------------- the tabs


def generate_tab(studio: Studio) -> Results:
    with gr.Row():
        with gr.Column(scale=2):
            controls = Controls(studio, "generate", "What to draw")
            go, cancel = buttons("generate")
            controls.add_details()
        with gr.Column(scale=3):
            results = Results("generate")

    def generate(values: Values, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        order = controls.order(values)
        pictures = studio.generate(owner(request, "generate"), order, bar(progress))
        return captioned(pictures, order), order.seed

    connect("generate", studio, generate, controls, set(), results, go, cancel)
    return results


def inpaint_tab(studio: Studio) -> tuple[gr.File, Results]:
    with gr.Row():
        with gr.Column(scale=2):
            file = picture_field("inpaint")
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

    def inpaint(values: Values, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        order = controls.order(values)
        pictures = studio.inpaint(
            owner(request, "inpaint"),
            order,
            bar(progress),
            values[file],
            (values[editor] or {}).get("layers", []),
            method=chosen(values[method]),
            strength=values[strength],
            feather=values[feather],
            padding_mask_crop=int(values[margin]) or None,
        )
        return captioned(pictures, order), order.seed

    inputs = {file, editor, method, strength, feather, margin}
    connect("inpaint", studio, inpaint, controls, inputs, results, go, cancel)
    return file, results


def edit_tab(studio: Studio) -> tuple[gr.File, Results]:
    with gr.Row():
        with gr.Column(scale=2):
            file = picture_field("edit")
            picture = gr.Image(label="Picture", interactive=False, height=320, buttons=[])
            source = gr.Textbox(
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

    file.change(show, file, picture, show_progress="hidden", api_visibility="private")

    def edit(values: Values, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        order = controls.order(values)
        pictures = studio.edit(
            owner(request, "edit"),
            order,
            bar(progress),
            values[file],
            values[source] or values[source_label] or "",
            chosen(values[method]),
            values[strength],
        )
        return captioned(pictures, order), order.seed

    inputs = {file, source, source_label, method, strength}
    connect("edit", studio, edit, controls, inputs, results, go, cancel)
    return file, results


# ---------------------------------------------------------------- what the tabs share


class Controls:
    """What to draw and how: the components that every tab has."""

    def __init__(self, studio: Studio, tab: str, prompt: str, example: str = "red apple") -> None:
        self._studio, self._tab = studio, tab
        self.prompt = gr.Textbox(
            label=prompt,
            placeholder=example,
            visible=studio.takes.text,
            max_length=LONGEST_PROMPT,
            elem_id=f"{tab}-prompt",
        )
        self.label = gr.Dropdown(
            list(studio.takes.labels), value=None, label="Class", visible=bool(studio.takes.labels)
        )
        self.pictures = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures", elem_id=f"{tab}-pictures")

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
            self.negative = gr.Textbox(label="Keep away from", visible=self._studio.takes.text)
            self.solver = choice("Solver", lambda: self._studio.solvers)

    @property
    def components(self) -> set[Any]:
        return {value for value in vars(self).values() if isinstance(value, gr.components.Component)}

    def order(self, values: Values) -> Order:
        takes_text = self._studio.takes.text
        return Order(
            prompt=values[self.prompt] or "" if takes_text and not values[self.label] else None,
            label=values[self.label],
            negative=values[self.negative] if takes_text else None,
            pictures=int(values[self.pictures]),
            seed=random.randrange(LARGEST_SEED) if values[self.new_seed] else int(values[self.seed] or 0),
            steps=int(values[self.steps]),
            guidance=values[self.guidance],
            solver=chosen(values[self.solver]),
        )


class Results:
    """The pictures that a tab has drawn, and what may be done with them."""

    def __init__(self, tab: str, height: int = 520) -> None:
        self.gallery = gr.Gallery(
            label="Pictures",
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
        with gr.Row():
            self._onward = {
                "inpaint": gr.Button("Paint on this one", size="sm", elem_id=f"{tab}-to-inpaint"),
                "edit": gr.Button("Edit this one", size="sm", elem_id=f"{tab}-to-edit"),
            }

    def hand_on(self, tabs: gr.Tabs, fields: dict[str, gr.File]) -> None:
        """Let the picture that is looked at, else the first, become the picture of another tab."""
        looked_at = gr.State(0)

        def look(event: gr.SelectData) -> Any:
            return event.index

        def take(index: int, pictures: list[tuple[str, str]] | None) -> Any:
            return pictures[min(index, len(pictures) - 1)][0] if pictures else gr.skip()

        self.gallery.change(lambda: 0, None, looked_at, show_progress="hidden", api_visibility="private")
        self.gallery.select(look, None, looked_at, show_progress="hidden", api_visibility="private")
        for tab, button in self._onward.items():
            taken = button.click(
                take, [looked_at, self.gallery], fields[tab], show_progress="hidden", api_visibility="private"
            )
            select = functools.partial(gr.Tabs, selected=tab)
            taken.success(select, None, tabs, show_progress="hidden", api_visibility="private")


def choice(label: str, offered: Callable[[], list[str]]) -> gr.Dropdown:
    """A choice that may be left open. What is ``offered`` is asked once a window shows the page.

    The page is there before torch is, whose tables these are.
    """
    field = gr.Dropdown([USUAL], value=USUAL, label=label)
    gr.on(  # no trigger: when the page is loaded
        None,
        lambda: gr.Dropdown([USUAL, *offered()]),
        outputs=field,
        show_progress="hidden",
        api_visibility="private",
    )
    return field


def chosen(value: str) -> str | None:
    return None if value == USUAL else value


def enlarged(studio: Studio, path: str) -> Image:
    """An uploaded picture as it is shown, small ones large enough to paint on."""
    picture, note = studio.opened(path)
    if note:
        gr.Info(note)
    from ..data.read import to_rgb  # not before the pipeline: the page is there before torch is

    picture = to_rgb(picture)  # the canvas is opaque
    scale = CANVAS / max(picture.size)
    return picture.resize([max(1, round(scale * side)) for side in picture.size])


def picture_field(tab: str) -> gr.File:
    return gr.File(label="Drop a picture here", height=100, elem_id=f"{tab}-file")


def buttons(tab: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        go = gr.Button(tab.capitalize(), variant="primary", elem_id=f"{tab}-go")
        return go, gr.Button("Cancel", elem_id=f"{tab}-cancel")


def captioned(pictures: list[Image], order: Order) -> list[tuple[Image, str]]:
    return [(picture, f"seed {order.seed + i}") for i, picture in enumerate(pictures)]


def connect(
    tab: str,
    studio: Studio,
    work: Callable[..., Any],
    controls: Controls,
    inputs: set[Any],
    results: Results,
    go: gr.Button,
    cancel: gr.Button,
) -> None:
    """The button, or Enter in the prompt, does the work; Cancel ends it."""

    def stop(request: gr.Request) -> None:
        studio.stop(owner(request, tab))

    gr.on(
        [go.click, controls.prompt.submit],
        told(work),
        controls.components | inputs,
        [results.gallery, controls.seed],
        show_progress_on=results.gallery,
        trigger_mode="once",
        api_name=tab,
    )
    cancel.click(stop, queue=False, api_visibility="private")


def owner(request: gr.Request, tab: str) -> str:
    """Whose request this is: one browser tab's, in one of the page's."""
    return f"{request.session_hash}/{tab}"


def bar(progress: gr.Progress) -> Progress:
    def show(done: int, total: int, what: str) -> None:
        progress((done, total), desc=what, unit="steps")

    return show


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work`` whose mistakes of the user and own defects become messages on the page."""

    @functools.wraps(work)
    def handler(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Stopped:
            gr.Info("Cancelled.", duration=3)
        except UserError as error:
            gr.Warning(html.escape(str(error)).replace("\n", "<br>"))
        except Exception:
            log.exception("a request failed")
            raise gr.Error("The terminal says what went wrong.", print_exception=False) from None
        return gr.skip()

    return handler


def serve(studio: Studio, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; the models are loaded while it is looked at.

    Raises:
        UserError: the port is taken or may not be listened on; the checkpoint cannot be loaded.
    """
    open_no_others()
    page = build(studio)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            theme=THEME,
            prevent_thread_lock=True,
        )
    except OSError:  # Gradio's message speaks of its own arguments
        raise UserError(
            f"{host}:{port} is taken, or no address of this machine", "Try --port 7861."
        ) from None
    print(f"http://{host}:{port}", flush=True)
    studio.pipe  # noqa: B018
    page.block_thread()
