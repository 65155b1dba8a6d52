"""Figures of a checkpoint that draws under control images."""

from __future__ import annotations

from typing import Any

import torch

from ..data.images import to_tensor
from ..data.labels import to_label_image
from ..data.sources import shape_layouts, shapes
from ..families import FlowModel
from .data import ConditionKind
from .sampler import LAYOUTS, Sampler


def draws_layouts_of_shapes(model: FlowModel, kind: ConditionKind) -> bool:
    """Return whether the checkpoint draws under the label maps of the procedural set, and without a class."""
    return kind != "class_labels" and model.control_labels == shape_layouts.LABELS


def layouts(sampler: Sampler, count: int) -> dict[str, Any]:
    """Measure how well images agree with the label maps of specs that were held out, by the exact checker of shapes.

    Each of ``count`` maps has moved objects of its own. `shape_layouts.mean_iou` is taken of images under the map
    alone, under the map and its caption, and without both; of real images, which is as much as the checker can find;
    and of these through the autoencoder, which is as much as the network can reach.
    """
    model = sampler.model
    side = model.native_side
    assert side is not None  # a network that latentflow trained says it
    specs = sorted(filter(shapes.is_held_out, shapes.all_specs()), key=shapes.caption)
    order = torch.randperm(len(specs), generator=torch.Generator().manual_seed(sampler.seed)).tolist()
    chosen = [specs[order[i % len(order)]] for i in range(count)]
    asked = [shape_layouts.label_map(spec, side, seed) for seed, spec in enumerate(chosen)]
    controls = [to_label_image(ids, shape_layouts.LABELS) for ids in asked]
    captions, nothing = [shapes.caption(spec) for spec in chosen], [""] * count

    def iou(images: Any) -> float:
        return shape_layouts.mean_iou(asked, [shape_layouts.read_label_map(image) for image in images])

    real = [shapes.render(spec, side, seed)[0] for seed, spec in enumerate(chosen)]
    batches = torch.stack([to_tensor(image) for image in real]).split(sampler.batch_size)
    with torch.no_grad():
        copies = [image for batch in batches for image in model.decode(model.encode(batch)).cpu()]
    found = {
        "map": iou(sampler.sample(nothing, LAYOUTS, "label maps", controls)),
        "nothing": iou(sampler.sample(nothing, LAYOUTS, "nothing")),
        "real": iou(real),
        "autoencoder": iou(copies),
    }
    if sampler.condition_kind == "prompt":
        found["map_and_caption"] = iou(
            sampler.sample(captions, LAYOUTS, "label maps with captions", controls)
        )
    return {"mean_iou": found, "images": count}
