"""Flow models that draw from images beside the prompt: images that it speaks of, such as one that it changes."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from ..errors import UserError, plural, reason
from .model import Rows, Size, Values
from .pretrained import PretrainedModel


class ReferenceModel(PretrainedModel):
    """Family whose network takes images beside the prompt.

    The stock pipeline itself prepares them, along with the prompt: its call is ended at the first evaluation of the
    network, and what the network would have been given becomes a row. Rows keep the tokens of the images as
    ``references``, a list of B tensors (N, C); guidance does not leave them out.
    """

    image_input = "reference"
    #: images that one prompt may draw from; None: any number
    most_images: int | None = 1
    #: the text encoder sees the images too; rows then keep the empty prompt beside them, which guidance leads away from
    text_sees_images: bool = False

    def describe_condition(self) -> str:
        if self.needs_images:
            return (
                "It takes an image and an instruction: latentflow edit IMAGE PROMPT, for a part of the image with "
                "--mask or --box; in Python LatentFlowEditPipeline. Its method is 'reference', the default."
            )
        return (
            "It takes a prompt, and images that the prompt speaks of: latentflow edit IMAGE PROMPT, in Python "
            "LatentFlowEditPipeline."
        )

    def encode_prompt(
        self, prompts: Sequence[str], images: Sequence[Any] = (), *, guided: bool = True, **options: Any
    ) -> Rows:
        """Return one row for each prompt.

        Args:
            images: PIL images of any mode, or tensors (3, H, W) in [-1, 1]: all of these prompts draw from all of them.
                With images nothing here can be differentiated.
            guided: where the text encoder sees the images, encode the empty prompt beside them too: guidance leads away
                from it where there is no negative prompt.
            options: see `PretrainedModel.encode_prompt`.

        Raises:
            UserError: the network needs an image and there is none, or it takes fewer or other images.
        """
        images = [images] if isinstance(images, Image | Tensor) else [*images]
        rows = super().encode_prompt(prompts, images, **options)
        if not (images and guided and self.text_sees_images):
            return rows
        null = super().encode_prompt([""], images, **options).repeat(len(rows))
        return replace(
            rows, kept={**rows.kept, **{f"null_{name}": value for name, value in null.values.items()}}
        )

    def encode_negative(self, prompts: Sequence[str], images: Sequence[Any] = (), **options: Any) -> Rows:
        """Return one row for each prompt that guidance leads away from; see `encode_prompt`."""
        return super().encode_negative(prompts, images if self.text_sees_images else (), **options)

    def unconditional(self, rows: Rows) -> Rows | None:
        """Return the empty negative prompt, beside the images of each row where the text encoder sees them.

        Raises:
            UserError: the rows lack it.
        """
        if not (self.text_sees_images and "references" in rows.kept):
            return super().unconditional(rows)
        null = {name: rows.kept[f"null_{name}"] for name in rows.values if f"null_{name}" in rows.kept}
        if not null:
            raise UserError(
                "the rows were encoded for use without guidance",
                "Leave guided=False out, or pass rows of a negative prompt.",
            )
        return Rows(self, null, rows.kept)

    def encode_part(
        self,
        embed: Callable[..., dict[str, Values]],
        prompts: list[str],
        images: Sequence[Any],
        options: dict[str, Any],
    ) -> Rows:
        images = [to_pil(image) for image in images]
        if images:
            return Rows.cat([self.row_of(text, images, options) for text in prompts])
        if self.needs_images:
            raise UserError(
                f"a {type(self.pipeline).__name__} draws from an image, and there is none",
                f"{self.describe_condition()} As rows: model.encode_prompt([...], images=[...]).",
            )
        return super().encode_part(embed, prompts, images, options)

    def row_of(self, prompt: str, images: list[Image], options: dict[str, Any]) -> Rows:
        """Return the row of one prompt and its images.

        Raises:
            UserError: the network takes fewer or other images.
        """
        if self.most_images is not None and len(images) > self.most_images:
            raise UserError(
                f"{len(images)} images are given to a {type(self.pipeline).__name__}",
                f"It draws from {plural(self.most_images, 'image')}: leave the others out.",
            )
        return Rows(self, *self.read_inputs(self.network_inputs(prompt, images, options)))

    def network_inputs(self, prompt: str, images: list[Image], options: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the network, as the stock pipeline's call with these ``options`` prepares them.

        Raises:
            UserError: the pipeline refuses something of this.
        """
        image = images[0] if self.most_images == 1 else images
        unguided = {self.guidance_argument: self.unguided}  # then the prompt alone is encoded
        try:
            return first_inputs(
                self.pipeline,
                self.network,
                prompt=prompt,
                image=image,
                **{**self.options, **options, **unguided},
            )
        except ValueError as error:
            raise UserError(
                f"the pipeline refuses the prompt, the images or an option: {reason(error)}", "Give others."
            ) from error

    @abstractmethod
    def read_inputs(self, inputs: dict[str, Any]) -> tuple[dict[str, Values], dict[str, Values]]:
        """Return the values of a row and what it keeps, see `Rows`, of the arguments of the network for one image."""

    def reference_size(self, image: Image | Tensor) -> Size:
        """Return (height, width) in pixels of the result of an edit of an image, where nobody asks for a size."""
        return self.size_for(to_pil(image))

    @abstractmethod
    def size_for(self, image: Image) -> Size:
        """Return what `reference_size` does."""

    def floored(self, height: int, width: int) -> Size:
        """Return the largest size that is no larger and that the network can draw, or the smallest that it can."""
        unit = self.size_multiple
        return max(height // unit, 1) * unit, max(width // unit, 1) * unit

    def megapixel(self, image: Image) -> Size:
        """Return a megapixel in the shape of an image, as the pipeline's module calculates it."""
        calculate: Any = vars(sys.modules[type(self.pipeline).__module__])["calculate_dimensions"]
        width, height, *_ = calculate(1024 * 1024, image.width / image.height)
        return self.floored(height, width)

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return values and what is kept by their names; of a list of what is kept, a list with the one tensor of all
        rows, empty where nothing is kept.

        Raises:
            UserError: the images of the rows differ in size or number.
        """
        kept = rows.kept
        if len({len(row) for row in kept.get("references", ())}) > 1:
            raise UserError(
                "the images that the rows draw from differ in size or number",
                "Draw them in calls of their own.",
            )
        stacked = {
            name: [torch.stack(value)] if isinstance(value, list) else value
            for name, value in kept.items()
            if name not in self.optional_extra
        }
        return {"references": [], "places": [], **super().arrange(rows), **stacked}


class _NetworkReached(Exception):  # noqa: N818 - no error: the way out of a pipeline's call
    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__("the network is reached")
        self.inputs = inputs


def first_inputs(pipeline: Any, network: Any, **call: Any) -> dict[str, Any]:
    """Return the arguments of a network's first evaluation in a pipeline's call, which ends there."""

    def stop(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        raise _NetworkReached(inputs)

    quiet = copy(pipeline)
    quiet.set_progress_bar_config(disable=True)
    hook = network.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        quiet(**{**call, "num_inference_steps": 2})
    except _NetworkReached as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise AssertionError("the pipeline did not evaluate its network")


def to_pil(image: Any) -> Image:
    """Return a PIL image of any mode as upright sRGB on white ground, and a tensor (3, H, W) in [-1, 1] as a PIL image.

    Raises:
        UserError: it is neither, or the image cannot be decoded.
    """
    if isinstance(image, Image):
        from ..data.images import to_rgb  # whose package brings the readers of data

        return to_rgb(image)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise UserError(
            f"one of the images is a {type(image).__name__}{shape}",
            "Give PIL images, or tensors (3, H, W) in [-1, 1].",
        )
    levels = ((image.detach().float().cpu() / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return fromarray(levels.permute(1, 2, 0).contiguous().numpy())
