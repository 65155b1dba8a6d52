"""Preview images of a run, through the pipeline classes that users load."""

from __future__ import annotations

from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ..autoencoder import downscale_factor
from ..data import Source, cached_pixels, to_pil
from ..data.masks import DEFAULT_SHAPES, random_masks
from ..models.text import UnknownWords
from ..pipeline.generate import LatentFlowPipeline
from ..pipeline.inpaint import LatentFlowInpaintPipeline
from .loop.distributed import has_fast_bfloat16

_IMAGES, _ROW = 16, 8


def preview_source(training: Source, validation: Source) -> Source:
    """What previews are of: images that are held out, if there are enough for a grid."""
    return validation if len(validation) >= _IMAGES else training


def preview_steps(pipe: LatentFlowPipeline) -> tuple[int, ...]:
    """Numbers of steps of a preview: half of the usual one, but all those that a network for few was made for."""
    return (pipe.few_steps.step_counts or (pipe.usual_steps,)) if pipe.few_steps else (10,)


def preview_grid(pipe: LatentFlowPipeline, source: Source, device: torch.device) -> Image.Image:
    """A grid of 16 images with fixed seeds, of captions or classes spread over ``source``; the same again for each
    number of `preview_steps`.

    Below them, of a network that inpaints: eight images of ``source`` with holes (grey), and what fills them.
    """
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(device)
    rows = torch.linspace(0, len(source) - 1, _IMAGES).long().tolist()
    asked: dict[str, Any] = {"num_images_per_prompt": _IMAGES}
    if source.kind == "text":
        captions = source.captions()
        asked = {"prompt": [captions[row] for row in rows]}
    elif source.kind == "class":
        shown = set(source.class_ids())  # first: a fine-tune's own classes, beside those of its checkpoint
        order = sorted(range(len(source.classes)), key=lambda number: number not in shown)
        asked = {"class_labels": [order[index % len(order)] for index in range(_IMAGES)]}
    drawn = [asked | {"num_inference_steps": steps, "output_type": "pt"} for steps in preview_steps(pipe)]
    encoder = pipe.text_encoder
    frozen_on = (
        None if encoder is None else encoder.device
    )  # one that is not trained along stays on the CPU else
    if encoder is not None:
        encoder.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)), catch_warnings():
        simplefilter("ignore", UnknownWords)  # captions that are held out may well have some
        images = torch.cat(
            [pipe(**one, generator=_generators(_IMAGES)).images.float().cpu() for one in drawn]
        )
        if pipe.takes_masks:
            images = torch.cat([images, *_filled(pipe, source, rows[::2], preview_steps(pipe)[-1])])
    if encoder is not None:
        encoder.to(frozen_on)
    return to_pil(make_grid(images * 2 - 1, nrow=_ROW, padding=2, pad_value=1.0))


def _filled(pipe: LatentFlowPipeline, source: Source, rows: list[int], steps: int) -> tuple[Tensor, Tensor]:
    """Images (8, 3, H, W) in [0, 1] with grey holes, and the same with the holes filled."""
    some = source.subset(rows)
    side = pipe.transformer.config.sample_size * downscale_factor(pipe.vae)
    originals = cached_pixels(some, side, progress=False)[:].float() / 255.0
    shapes = {name: share for name, share in DEFAULT_SHAPES.items() if name != "full"}
    masks = random_masks(shapes, (side, side), [np.random.default_rng([1, row]) for row in range(len(rows))])
    asked: dict[str, Any] = {}
    if source.kind == "text":
        asked["prompt"] = some.captions()
    elif source.kind == "class":
        asked["class_labels"] = some.class_ids()
    painter = LatentFlowInpaintPipeline.from_pipe(pipe)
    painter.set_progress_bar_config(disable=True)
    images = painter(
        **asked,
        image=originals,
        mask_image=masks,
        generator=_generators(len(rows)),
        num_inference_steps=steps,
        output_type="pt",
    ).images
    return torch.where(masks > 0, 0.5, originals), images.float().cpu()


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]
