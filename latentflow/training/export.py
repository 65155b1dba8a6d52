"""The pipeline that a run makes of what it has trained: previews of it while it trains, and its export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import Source, cached_pixels, to_pil
from ..data.control import cut_control
from ..data.masks import DEFAULT_SHAPES, random_masks
from ..families import FlowModel
from ..families.pretrained import PretrainedModel
from ..models.text import UnknownWords
from ..pipeline.inpaint import LatentFlowInpaintPipeline
from .data import shown_by
from .fine_tune.adapters import Adapter
from .fine_tune.prior import in_turn
from .loop.distributed import has_fast_bfloat16
from .loop.run_folder import write_folder, writing
from .report.card import CardFacts, write_adapter_card, write_card
from .report.export import carry_over
from .trained_model import TrainedModel

_IMAGES, _ROW = 16, 8


def export_pipeline(
    folder: Path,
    model: TrainedModel,
    source: Source,
    output: Path,
    dtype: torch.dtype,
    repository: str | None,
    measure: Callable[[], None] = lambda: None,
) -> None:
    """Write the pipeline of a run's networks as they are now, with its card; with an adapter the merged one, and the
    adapter beside it.

    Args:
        folder: where it is written, before it replaces the ``pipeline`` in the run folder ``output``.
        model: what is trained.
        source: the run's images, with those that were held out.
        dtype: precision of the exported weights.
        repository: the name on the hub that the card names; None: the folder's.
        measure: called before, with the averaged weights in place.

    Raises:
        RunError: the disk gave out.
    """
    earlier, adapter, result = output / "pipeline", model.adapter, model.pipeline()
    if dtype != torch.float32:
        result = copy.deepcopy(result).to(dtype=dtype)
    measure()
    with writing(f"the result {earlier}", earlier):
        result.save_pretrained(folder)
        write_card(folder, output, facts := card_facts(model, source, output, repository))
        carry_over(earlier, folder)
        if adapter is not None:
            write_folder(output / "adapter", partial(write_adapter, adapter, facts, output))


def write_adapter(adapter: Adapter, facts: CardFacts, output: Path, folder: Path) -> None:
    """Write a run's adapter with its card into ``folder``, which replaces ``adapter`` in the run folder ``output``.

    Args:
        facts: the pipeline's.
    """
    earlier = output / "adapter"
    adapter.save(folder)
    write_adapter_card(folder, output, replace(facts, where=str(earlier)))
    if earlier.is_dir():
        carry_over(earlier, folder)


def card_facts(model: TrainedModel, source: Source, output: Path, repository: str | None) -> CardFacts:
    """Return the facts for the card of a run's pipeline; see `export_pipeline`."""
    where, example = repository or str(output / "pipeline"), shown_by(source, [0], model.flow_model)[0]
    return pipeline_facts(model.pipeline(), where, example)


def pipeline_facts(pipeline: Any, where: str, example: str = "") -> CardFacts:
    """Return the facts for a pipeline's card.

    Args:
        where: folder, or name on the hub, that the card loads it from.
        example: a caption or class that it was trained on; "": its first class, or a placeholder for a caption.
    """
    model = pipeline.model
    placeholders = {"text": "a caption like those of its data", "class": next(iter(model.classes), "")}
    return CardFacts(
        where=where,
        kind=model.condition_kind,
        example=example or placeholders.get(model.condition_kind, ""),
        classes=tuple(model.classes),
        parts={name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)},
        inpaints=model.takes_masks or model.draws_tokens,
        control=() if isinstance(model, PretrainedModel) else model.control_kinds,
        varies=model.latent_variable is not None,
        sample_steps=preview_steps(model),
        few_steps=model.few_steps,
        resolution=model.native_side,
        stock=type(model.pipeline).__name__ if isinstance(model, PretrainedModel) else "",
    )


def preview_source(training: Source, validation: Source) -> Source:
    """Return the images whose conditions previews show: held-out ones, if there are enough for a grid."""
    return validation if len(validation) >= _IMAGES else training


def preview_steps(model: FlowModel) -> tuple[int, ...]:
    """Return a preview's numbers of steps: half of the usual one, but all those that a network for few was made for."""
    return (model.few_steps.step_counts or (model.usual_steps,)) if model.few_steps else (10,)


def preview_grid(model: FlowModel, source: Source, device: torch.device) -> Image.Image:
    """Sample 16 images with fixed seeds, of captions or classes spread over ``source``, for each of `preview_steps`.

    Below them, if the network inpaints: eight images of ``source`` with holes (grey), and the holes filled.
    """
    from torchvision.utils import make_grid

    pipe = model.pipeline
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(device)
    spread = source.spread(_IMAGES)
    rows = [spread[index % len(spread)] for index in range(_IMAGES)]
    if source.kind == "class":
        texts = shown_classes(
            model.classes, {source.classes[number] for number in source.class_ids() if number >= 0}
        )
    else:
        texts = shown_by(source, rows, model)
    condition = model.call_arguments(texts)
    if source.control:
        size = model.native_size
        assert size is not None  # a run's network says it
        condition["control_image"] = {
            kind: [cut_control(source.examples[row], size, kind, source.labels) for row in rows]
            for kind in source.control
        }
    encoder = pipe.text_encoder
    home = None if encoder is None else encoder.device  # the CPU, if the encoder is not trained along
    if encoder is not None:
        encoder.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)), catch_warnings():
        simplefilter("ignore", UnknownWords)  # held-out captions may well have some
        grids = [
            pipe(**condition, num_inference_steps=steps, output_type="pt", generator=_generators(_IMAGES))
            for steps in preview_steps(model)
        ]
        images = torch.cat([grid.images.float().cpu() for grid in grids])
        if model.takes_masks or model.draws_tokens:
            images = torch.cat([images, *_inpainted(model, source, rows[::2], preview_steps(model)[-1])])
    if encoder is not None:
        encoder.to(home)
    return to_pil(make_grid(images * 2 - 1, nrow=_ROW, padding=2, pad_value=1.0))


def shown_classes(classes: Sequence[str], seen: Collection[str]) -> list[str]:
    """Return a class for each image: first those ``seen`` in the data, then others of the model; of many, some that are
    spread over all."""
    own, others = ([name for name in classes if (name in seen) == wanted] for wanted in (True, False))
    names = in_turn(own, min(_IMAGES, len(own)))
    names += in_turn(others, min(_IMAGES - len(names), len(others)))
    return in_turn(names, _IMAGES)


def _inpainted(model: FlowModel, source: Source, rows: list[int], steps: int) -> tuple[Tensor, Tensor]:
    """Return images (8, 3, H, W) in [0, 1] with grey holes, and the same with the holes filled."""
    side = model.native_side
    assert side is not None  # a run's network says it
    originals = cached_pixels(source.subset(rows), side, progress=False)[:].float() / 255.0
    shapes = {name: share for name, share in DEFAULT_SHAPES.items() if name != "full"}
    masks = random_masks(shapes, (side, side), [np.random.default_rng([1, row]) for row in range(len(rows))])
    inpaint = LatentFlowInpaintPipeline.from_pipe(model.pipeline)
    inpaint.set_progress_bar_config(disable=True)
    condition = {}
    if model.condition_kind != "unconditional":
        condition = model.call_arguments(shown_by(source, rows, model))
    images = inpaint(
        **condition,
        image=originals,
        mask_image=masks,
        generator=_generators(len(rows)),
        num_inference_steps=steps,
        output_type="pt",
    ).images
    return torch.where(masks > 0, 0.5, originals), images.float().cpu()


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]
