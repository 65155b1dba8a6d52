"""Editing by instruction: models that draw from images, such as FLUX.2, Kontext and Qwen-Image-Edit, draw from the one
that is edited."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..errors import UserError
from ..families.few_steps import require_velocity
from ..families.model import Rows
from ..families.sizes import fit_size
from .arguments import ConditionArguments
from .calls import CallMixin
from .images import Images, read_images
from .originals import read_masked_originals

if TYPE_CHECKING:
    from ..families.references import ReferenceModel

#: arguments of an edit that other methods have
_OTHERS = (
    "source_prompt", "source_prompt_embeds", "source_class_labels", "source_guidance_scale", "strength", "draws",
    "plain_from", "latents",
)  # fmt: skip
#: those of them that the command calls otherwise -> its flag
_FLAGS = {"source_prompt": " (--from)", "source_class_labels": " (--from)"}


def edit_by_reference(pipe: CallMixin, given: Mapping[str, Any]) -> Any:
    """Draw from noise what an instruction says of images, which the network sees beside the prompt.

    Without a mask the result has the size that is drawn: ``height`` and ``width``, of which one follows from the other
    and the image's shape, or the size that suits the model, about that of the image in shape, a megapixel at most.
    With a mask the result has the image's size, and every pixel outside of the mask is the image's own; an image that
    is larger than what suits the model is drawn at that size, or at ``height`` and ``width``, and resized where it is
    pasted.

    Args:
        given: the arguments of ``LatentFlowEditPipeline``'s call. Steps, guidance and solver that are None are the
            model's own.

    Raises:
        UserError: as ``LatentFlowEditPipeline``; the model does not draw from images, or an argument is of another
            method.
    """
    if pipe.model.image_input != "reference":
        require_velocity(pipe.model)
        raise UserError(
            "method 'reference' is given, but this model does not draw from images",
            "Use method 'flowedit', and describe the whole result in the prompt.",
        )
    for name in _OTHERS:
        if given[name] is not None:
            raise UserError(
                f"{name}{_FLAGS.get(name, '')} is given, but method 'reference' has no such setting",
                "Leave it out."
                if pipe.model.needs_images
                else "Leave it out, or choose another method, such as 'flowedit'.",
            )
    model = cast("ReferenceModel", pipe.model)
    _check_rows(model, given)
    image, height, width, margin = (given[name] for name in ("image", "height", "width", "padding_mask_crop"))
    # 1. The images that each prompt draws from
    window = {name: given[name] for name in ("mask_image", "padding_mask_crop", "feather", "seamless")}
    size = (None, None) if margin is None else (height, width)
    originals = read_masked_originals(pipe, image, None, *size, **window)
    seen = originals.values
    if margin is None:  # else what is around the mask is drawn at the size of the canvas
        seen = seen[..., : originals.size[0], : originals.size[1]]  # without the padding
        drawn = model.reference_size(seen[0])
        too_large = math.prod(model.floored(*originals.size)) > math.prod(drawn)
        if height or width:
            drawn = fit_size(originals.size, height, width, model.size_multiple)
        if originals.batch is None or height or width or too_large:
            originals = originals.drawn_at(drawn)
        seen = seen if originals.batch is None else originals.values
    further = _further(given["reference_images"])
    # 2. The conditions, one row per image
    asked = ConditionArguments.of(given)
    if not asked.refers:
        asked = replace(asked, references=[[row, *further] for row in seen])
    call = pipe.start_call(asked, *originals.canvas, images=len(seen))
    # 3. From noise to data
    noise = pipe.prepare_noise(len(call.rows), *originals.canvas, asked.generator)
    grid = given["num_inference_steps"], given["sigmas"], given["solver"]
    x1 = pipe.sample(call.velocity, noise, *grid, asked.generator, call.after_step)
    # 4. From latents to images
    images = originals.to_images(pipe, x1, given["output_type"], image)
    return pipe.finish_call(images, given["return_dict"])


def _check_rows(model: ReferenceModel, given: Mapping[str, Any]) -> None:
    """Refuse rows in the place of a prompt that draw from no images, or beside them what only a prompt can draw from.

    Raises:
        UserError: says which.
    """
    rows = given["prompt_embeds"]
    if not isinstance(rows, Rows):
        return
    if "references" not in rows.kept:
        raise UserError(
            "prompt_embeds are rows that draw from no images",
            "Encode the prompts with them: pipe.model.encode_prompt([...], images=[...]).",
        )
    if given["reference_images"] is not None:
        raise UserError(
            "reference_images are given beside prompt_embeds",
            "Leave them out: rows draw from the images that they were encoded with.",
        )
    if given["negative_prompt"] is not None and model.text_sees_images:
        raise UserError(
            "a negative_prompt is given beside prompt_embeds, but has to be encoded with the same images",
            "Pass negative_prompt_embeds=pipe.model.encode_negative([...], images=[...]).",
        )


def _further(images: Images) -> list[Tensor]:
    """Return further images as tensors (3, H, W) in [-1, 1], of any sizes."""
    listed = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return [2.0 * row - 1.0 for entry in listed for row in read_images(entry, name="reference_images")]
