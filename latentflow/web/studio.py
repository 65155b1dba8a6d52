"""Requests of the web page: bounds, images in, images out. Knows nothing of Gradio."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import AdapterChoice
from ..errors import UserError
from ..inference.checkpoint import open_pipeline, taken_by, takes
from ..inference.images import read_image
from ..inference.sample import BATCH, conditions, draw
from ..utils.arguments import finite, whole

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = BATCH
MOST_STEPS = 200
MOST_GUIDANCE = 20.0
LONGEST_PROMPT = 1000
LARGEST_IMAGE = 4  # times the side that the checkpoint was trained at
CANVAS = 512  # pixels of an image's longer side as it is shown
LARGEST_SEED = 2**32 - 1

#: Least and greatest of every number that a request gives, and whether it is a whole one.
BOUNDS: dict[str, tuple[float, float, type]] = {
    "images": (1, MOST_IMAGES, int),
    "seed": (0, LARGEST_SEED, int),
    "steps": (1, MOST_STEPS, int),
    "guidance": (0, MOST_GUIDANCE, float),
    "strength": (0, 1, float),
    "feather": (0, 32, int),
    "margin": (0, 64, int),
}

ANEW = "image-to-image"
#: Told (steps done, steps in all, what is going on); what it raises ends the drawing.
Progress = Callable[[int, int, str], None]


def number(name: str, value: Any) -> Any:
    """Return a request's number, a whole one as an int.

    Raises:
        UserError: it is no number, not whole, or outside of its bounds: what would keep the machine busy too long.
    """
    low, high, kind = BOUNDS[name]
    if kind is float:
        return finite(name, value, low, high)
    is_whole = isinstance(value, float) and value.is_integer()  # JavaScript has no other numbers
    return whole(name, int(value) if is_whole else value, int(low), int(high))


def text(name: str, value: Any) -> str | None:
    """Return a request's text, or None where it gives none.

    Raises:
        UserError: it is no text, or a long one.
    """
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name} is no text", "Give one in quotation marks.")
    if len(value or "") > LONGEST_PROMPT:
        raise UserError(f"{name} has {len(value or '')} characters", f"At most {LONGEST_PROMPT}.")
    return value


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every request says: what to show, how often, and how to draw it."""

    prompt: str | None = None
    label: str | None = None
    negative: str | None = None
    images: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    solver: str | None = None

    def checked(self) -> Order:
        """Return the order with its numbers as the drawing takes them.

        Raises:
            UserError: one is outside of its bounds, which are those of the page's sliders; or a text is none.
        """
        numbers = {
            name: number(name, getattr(self, name)) for name in ("images", "seed", "steps", "guidance")
        }
        text("prompt", self.prompt)
        text("class_label", self.label)
        text("negative_prompt", self.negative)
        text("solver", self.solver)
        return replace(self, **numbers)


class Studio:
    """One checkpoint, drawing for whoever asks, one request at a time."""

    def __init__(
        self, checkpoint: str | None = None, device: str = "auto", adapters: AdapterChoice | None = None
    ) -> None:
        self._checkpoint, self._device, self._adapters = checkpoint, device, adapters
        self._pipe: Any = None
        self._loading = threading.Lock()
        # The pipelines and tokenizers are not made for several threads.
        self._drawing = threading.Lock()
        known = (
            None if adapters is not None and (adapters.lora or adapters.fast) else takes(checkpoint)
        )  # they may bring classes
        self.takes = known or taken_by(self.pipe.config, self.pipe.transformer.config)

    @property
    def pipe(self) -> Any:
        """The pipeline; who asks first loads it, which takes half a minute on a slow machine.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._loading:
            if self._pipe is None:
                self._pipe = open_pipeline(
                    "LatentFlowPipeline", self._checkpoint, self._device, self._adapters
                )
            return self._pipe

    # Everything below asks for the pipeline before it imports anything: of two threads that import torch or
    # diffusers at once, one may see half a module, or both may wait for one another for ever.

    # ---------------------------------------------------------------- what the page offers

    @property
    def solvers(self) -> list[str]:
        self.pipe  # noqa: B018
        from ..flow import SOLVERS

        return list(SOLVERS)

    @property
    def inpainting_methods(self) -> list[str]:
        self.pipe  # noqa: B018
        from ..flow.inpainting import INPAINTING

        return [*(["trained"] if self.takes.masks else []), *INPAINTING]

    @property
    def editing_methods(self) -> list[str]:
        self.pipe  # noqa: B018
        from ..flow import EDITING

        return [*(EDITING if self.takes.condition else ()), ANEW]

    def unknown_words(self, *prompts: str | None) -> list[str]:
        """Return the words of prompts that the checkpoint's vocabulary lacks."""
        found: list[str] = self.pipe.unknown_words([prompt for prompt in prompts if prompt])
        return found

    def opened(self, upload: str) -> tuple[Image, str]:
        """An uploaded image, upright, RGB or RGBA; and "" or, if it was too large for the checkpoint, how it shrank.

        Raises:
            UserError: it cannot be read; the message names the file and not where the server keeps it.
        """
        pipe = self.pipe
        image = _hiding_folder(read_image, upload)
        side = pipe.transformer.config.get("sample_size") or 64
        trained = pipe.vae_scale_factor * (max(side) if isinstance(side, list | tuple) else side)
        width, height = image.size
        image.thumbnail((LARGEST_IMAGE * trained, LARGEST_IMAGE * trained))
        shrunk = f"Shrunk from {width} x {height} to {image.width} x {image.height} pixels."
        return image, shrunk if image.size != (width, height) else ""

    def stroke(self, upload: str) -> Image:
        """Return an uploaded image as it is, for its transparency.

        Raises:
            UserError: as ``opened``.
        """
        self.pipe  # noqa: B018
        from ..data.images import decode_image

        return _hiding_folder(decode_image, upload)

    # ---------------------------------------------------------------- requests

    def generate(self, order: Order, progress: Progress) -> list[Image]:
        """Return images of words or a class alone."""
        return self._draw("LatentFlowPipeline", order, progress)

    def inpaint(
        self,
        order: Order,
        progress: Progress,
        upload: str | None,
        strokes: list[Image],
        *,
        method: str | None = None,
        strength: float = 1.0,
        feather: int = 0,
        margin: int = 0,
    ) -> list[Image]:
        """Return an image with what was painted over drawn anew.

        Args:
            strokes: RGBA images of the canvas, opaque where it was painted over.
            margin: pixels around the hole that are looked at; 0: everywhere.
        """
        settings = {
            "method": text("method", method),
            "strength": number("strength", strength),
            "feather": number("feather", feather),
            "padding_mask_crop": number("margin", margin) or None,
        }
        image = self._needed(upload)
        mask = painted(strokes, image.size)
        if mask.getbbox() is None:
            raise UserError("nothing is painted over", "Paint over the part that is to be drawn anew.")
        kind = "LatentFlowInpaintPipeline"
        return self._draw(kind, order, progress, image=image, mask_image=mask, **settings)

    def edit(
        self,
        order: Order,
        progress: Progress,
        upload: str | None,
        source: str,
        method: str | None,
        strength: float,
    ) -> list[Image]:
        """Return an image changed by words, from what ``source`` says it shows, or drawn anew.

        Args:
            method: of ``editing_methods``; None: the pipeline's own, or anew where nothing can be said.
        """
        text("what it shows now", source)
        text("method", method)
        settings: dict[str, Any] = {"strength": number("strength", strength), "image": self._needed(upload)}
        if method == ANEW or not self.takes.condition:
            return self._draw("LatentFlowImg2ImgPipeline", order, progress, **settings)
        if method == "inversion":  # draws no noise: more would be equal
            order = replace(order, images=1)
        if source:
            shown = conditions(
                self.pipe, (source,) if order.label is None else (), (source,) if order.label else ()
            )
            settings |= {f"source_{name}": value for name, value in shown[0].items()}
        if method is not None:
            settings["method"] = method
        return self._draw("LatentFlowEditPipeline", order, progress, **settings)

    def _needed(self, upload: str | None) -> Image:
        if upload is None:
            raise UserError("there is no image", "Drop one into the field, or take one that was generated.")
        return self.opened(upload)[0]

    def _draw(self, kind: str, order: Order, progress: Progress, **settings: Any) -> list[Image]:
        import latentflow

        order = order.checked()
        if self.takes.labels and not self.takes.text and not order.label:
            some = ", ".join(self.takes.labels[:10]) + (", ..." if self.takes.labels[10:] else "")
            raise UserError("no class is chosen", f"Choose one: {some}.")
        if self._pipe is None:
            progress(0, 1, "Loading the models")
        loaded = self.pipe  # before the name of a pipeline imports it
        pipe = getattr(latentflow, kind).from_pipe(loaded)
        pipe.set_progress_bar_config(disable=True)
        shown = conditions(
            pipe,
            () if order.prompt is None else (order.prompt,),
            (order.label,) if order.label else (),
            order.negative or None,
        )
        with self._drawing:
            progress(0, 1, "Drawing")
            return draw(
                pipe,
                shown * order.images,
                order.seed,
                num_inference_steps=order.steps,
                guidance_scale=order.guidance,
                solver=order.solver,
                callback_on_step_end=_after_step(progress),
                **settings,
            )


def painted(strokes: list[Image], size: tuple[int, int]) -> Image:
    """The mask (mode "L", white where any stroke is) of an image of this size."""
    from PIL import Image, ImageChops

    mask = Image.new("L", size)
    for stroke in strokes:
        alpha = stroke.convert("RGBA").getchannel("A")
        mask = ImageChops.lighter(mask, alpha.resize(size, Image.Resampling.BOX))
    return mask.point(lambda level: 255 * (level >= 128))


def _hiding_folder(read: Callable[[str], Image], upload: str) -> Image:
    """Return what ``read`` does of a file; its errors name the file and not where the server keeps it."""
    if not Path(upload).is_file():  # the oldest make room for new ones
        raise UserError(f"{Path(upload).name} is kept no longer", "Upload it again.")
    try:
        return read(upload)
    except UserError as error:
        folder = f"{Path(upload).parent}{os.sep}"
        raise UserError(error.what.replace(folder, ""), error.fix.replace(folder, "")) from error


def _after_step(progress: Progress) -> Callable[..., dict[str, Any]]:
    def after_step(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(i + 1, pipe.num_timesteps, "Drawing")
        return {}

    return after_step
