"""What a request of the web page does: bounds, pictures in, pictures out. Knows nothing of Gradio."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drawing.adapters import AdapterChoice
from ..drawing.checkpoint import open_pipeline, taken_by, takes
from ..drawing.conditions import conditions
from ..drawing.draw import BATCH, draw
from ..drawing.pictures import read_picture
from ..errors import UserError
from .turns import Turn, Turns

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PICTURES = BATCH
MOST_STEPS = 200
MOST_GUIDANCE = 20.0
LONGEST_PROMPT = 1000
LARGEST_PICTURE = 4  # times the side that the checkpoint was trained at
CANVAS = 512  # pixels of a picture's longer side as it is shown
LARGEST_SEED = 2**32 - 1

ANEW = "image-to-image"
#: (steps done, steps in all, what is going on)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every request says: what to show, how often, and how to draw it."""

    prompt: str | None = None
    label: str | None = None
    negative: str | None = None
    pictures: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    solver: str | None = None

    def check(self) -> None:
        """Refuse what would keep the machine busy for too long; the page's sliders end at the same bounds.

        Raises:
            UserError: names the bound.
        """
        bounds = {
            "pictures": (1, MOST_PICTURES),
            "seed": (0, LARGEST_SEED),
            "steps": (1, MOST_STEPS),
            "guidance": (0, MOST_GUIDANCE),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} is {getattr(self, name)}", f"It goes from {low} to {high}.")
        for text in (self.prompt, self.negative):
            if len(text or "") > LONGEST_PROMPT:
                raise UserError(f"a prompt of {len(text or '')} characters", f"At most {LONGEST_PROMPT}.")


class Studio:
    """One checkpoint, drawing for whoever asks, one request at a time."""

    def __init__(
        self, checkpoint: str | None = None, device: str = "auto", adapters: AdapterChoice | None = None
    ) -> None:
        self._checkpoint, self._device, self._adapters = checkpoint, device, adapters
        self._pipe: Any = None
        self._loading = threading.Lock()
        self._turns = Turns()
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

    def opened(self, upload: str) -> tuple[Image, str]:
        """An uploaded picture, upright, RGB or RGBA; and "" or, if it was too large for the checkpoint, how it shrank.

        Raises:
            UserError: it cannot be read; the message names the file and not where the server keeps it.
        """
        pipe = self.pipe
        try:
            picture = read_picture(upload)
        except UserError as error:
            raise UserError(error.what.replace(upload, Path(upload).name), error.fix) from error
        side = pipe.transformer.config.get("sample_size") or 64
        trained = pipe.vae_scale_factor * (max(side) if isinstance(side, list | tuple) else side)
        width, height = picture.size
        picture.thumbnail((LARGEST_PICTURE * trained, LARGEST_PICTURE * trained))
        shrunk = f"Shrunk from {width} x {height} to {picture.width} x {picture.height} pixels."
        return picture, shrunk if picture.size != (width, height) else ""

    # ---------------------------------------------------------------- requests

    def stop(self, owner: str) -> None:
        """End what ``owner`` has waiting or running."""
        self._turns.stop(owner)

    def generate(self, owner: str, order: Order, progress: Progress) -> list[Image]:
        """Pictures of words or a class alone."""
        return self._draw("LatentFlowPipeline", owner, order, progress)

    def inpaint(
        self,
        owner: str,
        order: Order,
        progress: Progress,
        upload: str | None,
        strokes: list[Image],
        **settings: Any,
    ) -> list[Image]:
        """A picture with what was painted over drawn anew.

        Args:
            strokes: RGBA pictures of the canvas, opaque where it was painted over.
            settings: of ``LatentFlowInpaintPipeline``.
        """
        picture = self._needed(upload)
        mask = painted(strokes, picture.size)
        if mask.getbbox() is None:
            raise UserError("nothing is painted over", "Paint over the part that is to be drawn anew.")
        kind = "LatentFlowInpaintPipeline"
        return self._draw(kind, owner, order, progress, image=picture, mask_image=mask, **settings)

    def edit(
        self,
        owner: str,
        order: Order,
        progress: Progress,
        upload: str | None,
        source: str,
        method: str | None,
        strength: float,
    ) -> list[Image]:
        """A picture changed by words, from what ``source`` says it shows, or drawn anew.

        Args:
            method: of ``editing_methods``; None: the pipeline's own, or anew where nothing can be said.
        """
        picture = self._needed(upload)
        settings: dict[str, Any] = {"image": picture, "strength": strength}
        if method == ANEW or not self.takes.condition:
            return self._draw("LatentFlowImg2ImgPipeline", owner, order, progress, **settings)
        if method == "inversion":  # draws no noise: more would be equal
            order = replace(order, pictures=1)
        if source:
            shown = conditions(
                self.pipe, (source,) if order.label is None else (), (source,) if order.label else ()
            )
            settings |= {f"source_{name}": value for name, value in shown[0].items()}
        if method is not None:
            settings["method"] = method
        return self._draw("LatentFlowEditPipeline", owner, order, progress, **settings)

    def _needed(self, upload: str | None) -> Image:
        if upload is None:
            raise UserError("there is no picture", "Drop one into the field, or take one that was generated.")
        return self.opened(upload)[0]

    def _draw(self, kind: str, owner: str, order: Order, progress: Progress, **settings: Any) -> list[Image]:
        import latentflow

        order.check()
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
        with self._turns.take(owner, lambda ahead: progress(0, 1, f"Waiting, {ahead} ahead")) as turn:
            return draw(
                pipe,
                shown * order.pictures,
                order.seed,
                num_inference_steps=order.steps,
                guidance_scale=order.guidance,
                solver=order.solver,
                callback_on_step_end=_after_step(turn, progress),
                **settings,
            )


def painted(strokes: list[Image], size: tuple[int, int]) -> Image:
    """The mask (mode "L", white where any stroke is) of a picture of this size."""
    from PIL import Image, ImageChops

    mask = Image.new("L", size)
    for stroke in strokes:
        alpha = stroke.convert("RGBA").getchannel("A")
        mask = ImageChops.lighter(mask, alpha.resize(size, Image.Resampling.BOX))
    return mask.point(lambda level: 255 * (level >= 128))


def _after_step(turn: Turn, progress: Progress) -> Callable[..., dict[str, Any]]:
    def after_step(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        turn.check()
        progress(i + 1, pipe.num_timesteps, "Drawing")
        return {}

    return after_step
