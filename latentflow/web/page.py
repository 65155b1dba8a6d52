"""The layout of the web page, of the parts in :mod:`tab`; :mod:`inference_server` answers its requests."""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import printable
from .inference_server import CANVAS, GenerationRequest, InferenceServer, Progress
from .tab import AT_ONCE, Painted, Tab, Values, reporting_errors, source_of

MOST_WAITING = 16  # requests in Gradio's queue


def build(server: InferenceServer, listeners: Counter[str] | None = None) -> Any:
    """Return the page of one checkpoint.

    Args:
        listeners: number of open streams by session or event; a request ends once its own is closed.
    """
    listeners = Counter() if listeners is None else listeners
    layouts = {"generate": lay_out_generate, "inpaint": lay_out_inpaint, "edit": lay_out_edit}
    layouts = {name: layouts[name] for name in server.capabilities.calls}
    title = f"{printable(server.name)} - latentflow"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        add_header(server)
        filled = {name: Tab(name, server, listeners) for name in layouts}
        with gr.Tabs() as tabs:
            for name, lay_out in layouts.items():
                with gr.Tab(name.capitalize(), id=name):
                    lay_out(filled[name])
        for tab in filled.values():
            files = {name: other.file for name, other in filled.items() if name != "generate"}
            tab.connect_send_buttons(tabs, files)
    # A request uses all cores, or the only GPU: two at once would finish no sooner.
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def add_header(server: InferenceServer) -> None:
    """Add the title, the checkpoint's name and, once the model is loaded, what it knows."""

    def header(facts: list[str]) -> str:
        shown = [html.escape(printable(fact)) for fact in (server.name, *facts)]
        spans = " ".join(f'<span class="fact">{fact}</span>' for fact in shown[1:])
        data = f"<p>Training data: {html.escape(server.card.data)}.</p>" if server.card.data else ""
        return f'<h1>latentflow</h1><span class="model">{shown[0]}</span><div>{spans}</div>{data}'

    field = gr.HTML(header(["loading the model ..."]), elem_id="header")
    gr.on(
        None, reporting_errors(lambda: header(server.facts)), outputs=field, **AT_ONCE
    )  # when the page is loaded


def lay_out_generate(tab: Tab) -> None:
    """Fill the tab "Generate"."""
    with gr.Row(elem_classes=["workspace"]):
        with gr.Column(elem_classes=["ask"]):
            tab.add_conditions("Prompt", examples=tab.server.card.prompts)
            tab.add_control()
            tab.add_buttons()
        with gr.Column(elem_classes=["result"]):
            tab.add_results()
        with gr.Column(elem_classes=["settings"]):
            tab.add_adapters()
            tab.add_settings()
            with gr.Accordion("Advanced settings", open=False):
                tab.add_prompt("negative_prompt", "Negative prompt", "What the image should not show")
                tab.add_sampling()
                tab.add_jumps()
                tab.add_choice("solver", "Solver", "solver")
    tab.connect(lambda request, values, progress: tab.server.generate(request, progress))


def lay_out_inpaint(tab: Tab) -> None:
    """Fill the tab "Inpaint"."""
    usual = tab.server.capabilities
    with gr.Row(elem_classes=["workspace", "of-image"]):
        with gr.Column(elem_classes=["source"]):
            tab.add_upload()
            hint = gr.HTML("Paint over the area to replace:", visible=False, elem_id="inpaint-hint")
            editor = gr.ImageEditor(
                show_label=False,
                elem_id="inpaint-editor",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=40, colors=["#d040ff"], color_mode="fixed"),
                canvas_size=(CANVAS, CANVAS),
                height="min(480px, 92vw)",
                visible=False,
            )
            painted = Painted(editor)
        with gr.Column(elem_classes=["ask"]):
            tab.add_conditions("Prompt for the masked area")
            tab.add_control()
            tab.add_buttons()
        with gr.Column(elem_classes=["result"]):
            tab.add_results(height=400)
        with gr.Column(elem_classes=["settings"]):
            tab.add_adapters(fast=tab.server.capabilities.masks)
            tab.add_settings()
            with gr.Accordion("Advanced settings", open=False):
                tab.add_prompt("negative_prompt", "Negative prompt", "What the area should not show")
                tab.add_sampling(few_steps=usual.masks or not usual.has_velocity)
                tab.add_jumps()
                with gr.Row():
                    feather = gr.Slider(0, 32, 0, step=1, label="Mask feather (px)")
                    margin = gr.Slider(
                        0, 64, 0, step=1, label="Padding around the mask (px)", info="0: the whole image"
                    )
                strength = gr.Slider(
                    0, 1, 1, step=0.05, label="Strength", info="0 keeps the masked area, 1 ignores it"
                )
                with gr.Row():
                    tab.add_choice("method", "Method", "inpaint")
                    tab.add_choice("solver", "Solver", "solver")
    tab.inputs |= {"strokes": editor, "strength": strength, "feather": feather, "margin": margin}
    tab.show_upload(editor, lambda image: {"background": image, "layers": [], "composite": None}, hint)

    def inpaint(request: GenerationRequest, values: Values, progress: Progress) -> list[Image.Image]:
        settings = {name: values[name] for name in ("method", "strength", "feather", "margin")}
        strokes = painted.files(values["strokes"])
        return tab.server.inpaint(request, progress, values["image"], strokes, **settings)

    tab.connect(inpaint)


def lay_out_edit(tab: Tab) -> None:
    """Fill the tab "Edit"."""
    usual = tab.server.capabilities
    with gr.Row(elem_classes=["workspace", "of-image"]):
        with gr.Column(elem_classes=["source"]):
            tab.add_upload()
            shown = gr.Image(
                show_label=False,
                interactive=False,
                height=370,
                buttons=[],
                visible=False,
                elem_id="edit-original",
            )
            if usual.has_velocity and not usual.needs_images:
                tab.add_prompt(
                    "source_prompt",
                    "Source prompt" + " (not for reference)" * usual.instructions,
                    "What the image shows now, such as red apple",
                    "edit-source",
                )
                tab.add_class("source_class", "Source class", optional=True)
        with gr.Column(elem_classes=["ask"]):
            if usual.instructions:
                tab.add_conditions("Instruction", "What to change, such as: make the apple green")
            else:
                tab.add_conditions("Target prompt", "What it should show instead, such as green apple")
            tab.add_buttons()
        with gr.Column(elem_classes=["result"]):
            tab.add_results(height=400)
        with gr.Column(elem_classes=["settings"]):
            tab.add_adapters(fast=False)
            tab.add_settings()
            with gr.Accordion("Advanced settings", open=False):
                tab.add_prompt("negative_prompt", "Negative prompt", "What the result should not show")
                tab.add_sampling(guidance=usual.edit_guidance, few_steps=usual.edits_as_it_draws)
                if not usual.has_velocity:  # edits that follow one draw no tokens
                    tab.add_jumps()
                strength = gr.Slider(
                    0,
                    1,
                    usual.edit_strength,
                    step=0.05,
                    label="Strength",
                    info="0 keeps the image" + "; not for reference" * usual.instructions,
                    visible=not usual.needs_images,
                )
                with gr.Row():
                    tab.add_choice("method", "Method", "edit")
                    tab.add_choice("solver", "Solver", "solver")
    tab.inputs |= {"strength": strength}
    tab.show_upload(shown, lambda image: image)

    def edit(request: GenerationRequest, values: Values, progress: Progress) -> list[Image.Image]:
        settings = {name: values[name] for name in ("method", "strength")}
        return tab.server.edit(request, progress, values["image"], source_of(values), **settings)

    tab.connect(edit)
