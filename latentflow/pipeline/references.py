"""Editing by instruction: models that draw from images, such as FLUX.2, Kontext and Qwen-Image-Edit, draw from the one
that is edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..errors import UserError
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


def edit_by_reference(pipe: CallMixin, given: Mapping[str, Any]) -> Any:
    """Draw from noise what an instruction says of images, which the network sees beside the prompt.

    Without a mask the result has ``height`` and ``width``, or the size that suits the model: about that of the image in
    shape, a megapixel at most. With a mask it has the image's size, and every pixel outside of the mask is the image's
    own.

    Args:
        given: the arguments of ``LatentFlowEditPipeline``'s call. Steps, guidance and solver that are None are the
            model's own.

    Raises:
        UserError: as ``LatentFlowEditPipeline``; the model does not draw from images, or an argument is of another
            method.
    """
    if pipe.model.image_input != "reference":
        raise UserError(
            "method 'reference' is given, but this model does not draw from images",
            "Use method='flowedit', and describe the whole result in the prompt.",
        )
    for name in _OTHERS:
        if given[name] is not None:
            raise UserError(
                f"{name} is given, but method 'reference' has no such setting",
                "Leave it out, or choose another method, such as flowedit.",
            )
    image, mask, height, width = (given[name] for name in ("image", "mask_image", "height", "width"))
    # 1. The images that each prompt draws from
    size = {"height": None, "width": None} if mask is None else {"height": height, "width": width}
    window = {name: given[name] for name in ("mask_image", "padding_mask_crop", "feather", "seamless")}
    originals = read_masked_originals(pipe, image, None, **size, **window)
    seen, drawn = originals.values, originals.canvas
    if mask is None:
        seen = seen[..., : originals.size[0], : originals.size[1]]  # without the padding
        usual = cast("ReferenceModel", pipe.model).reference_size(seen[0])
        drawn = height or usual[0], width or usual[1]
        originals = replace(originals, size=drawn, canvas=drawn)
    further = _further(given["reference_images"])
    # 2. The conditions, one row per image
    asked = replace(ConditionArguments.of(given), references=[[row, *further] for row in seen])
    call = pipe.start_call(asked, *drawn, images=len(seen))
    # 3. From noise to data
    noise = pipe.prepare_noise(len(call.rows), *drawn, asked.generator)
    grid = given["num_inference_steps"], given["sigmas"], given["solver"]
    x1 = pipe.sample(call.velocity, noise, *grid, asked.generator, call.after_step)
    # 4. From latents to images
    images = originals.to_images(pipe, x1, given["output_type"], image)
    return pipe.finish_call(images, given["return_dict"])


def _further(images: Images) -> list[Tensor]:
    """Return further images as tensors (3, H, W) in [-1, 1], of any sizes."""
    listed = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return [2.0 * row - 1.0 for entry in listed for row in read_images(entry, name="reference_images")]
