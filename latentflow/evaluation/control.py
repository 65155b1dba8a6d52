"""Figures of a checkpoint that draws under control images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from ..data import Example, Source, to_pil
from ..data.control import cut_control
from ..data.images import to_tensor
from ..data.labels import to_label_image
from ..data.sources import shape_layouts, shapes
from ..families import FlowModel
from ..inference.control_images import edge_map, edge_thresholds
from .data import ConditionKind, load_images
from .sampler import CONTROLS, Sampler


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
    controls = [{"labels": to_label_image(ids, shape_layouts.LABELS)} for ids in asked]
    captions, nothing = [shapes.caption(spec) for spec in chosen], [""] * count

    def iou(images: Any) -> float:
        return shape_layouts.mean_iou(asked, [shape_layouts.read_label_map(image) for image in images])

    real = [shapes.render(spec, side, seed)[0] for seed, spec in enumerate(chosen)]
    batches = torch.stack([to_tensor(image) for image in real]).split(sampler.batch_size)
    with torch.no_grad():
        copies = [image for batch in batches for image in model.decode(model.encode(batch)).cpu()]
    found = {
        "map": iou(sampler.sample(nothing, CONTROLS, "label maps", controls)),
        "nothing": iou(sampler.sample(nothing, CONTROLS, "nothing")),
        "real": iou(real),
        "autoencoder": iou(copies),
    }
    if sampler.condition_kind == "prompt":
        found["map_and_caption"] = iou(
            sampler.sample(captions, CONTROLS, "label maps with captions", controls)
        )
    return {"mean_iou": found, "images": count}


# ---------------------------------------------------------------- edge maps


def led_by_edges(model: FlowModel, source: Source) -> Source | None:
    """Return the images whose control images `latentflow control --kind edges` made; None: a figure of them says
    nothing, as there are none or the checkpoint takes none."""
    if "image" not in model.control_kinds or "image" not in source.control:
        return None
    rows = [row for row, example in enumerate(source.examples) if _thresholds(example) is not None]
    return source.subset(rows) if rows else None


def edges(sampler: Sampler, source: Source, background: str, count: int) -> dict[str, Any]:
    """Measure how well the edges of images agree with the edge maps that they were drawn under.

    `metrics.edge_agreement` is taken of up to ``count`` images of ``source``, of which each is drawn once with its
    caption or class under its edge map, and from the same noise without the map; and of the real images and of these
    through the autoencoder, which is as much as can be reached. Edges are found at the size that is drawn, with the
    thresholds that the maps were made with.

    Args:
        source: of `led_by_edges`; images that were not trained on.
    """
    model, size = sampler.model, sampler.model.native_size
    assert size is not None  # `load_images` has refused such a checkpoint
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(sampler.seed)).tolist()
    source = source.subset(sorted(order[:count]))
    real = load_images(model, source, background)
    thresholds = [_thresholds(example) for example in source.examples]
    maps = [cut_control(example, size, "image") for example in source.examples]
    asked = torch.stack([_lines(np.asarray(control.convert("L"), np.float32)) for control in maps])

    def agreement(images: Tensor) -> dict[str, Any]:
        pairs = zip(images, thresholds, strict=True)
        found = [np.asarray(edge_map(to_pil(image), *(values or ()))) for image, values in pairs]
        return _mean(
            metrics.edge_agreement(torch.stack([torch.from_numpy(each > 0) for each in found]), asked)
        )

    with torch.no_grad():
        batches = real.images.split(sampler.batch_size)
        copies = torch.cat([model.decode(model.encode(batch)).cpu() for batch in batches])
    controls = [{"image": control} for control in maps]
    return {
        "images": len(source),
        "map": agreement(sampler.sample(real.captions, CONTROLS, "edge maps", controls)),
        "nothing": agreement(sampler.sample(real.captions, CONTROLS, "no edge maps")),
        "real": agreement(real.images),
        "autoencoder": agreement(copies),
    }


def _thresholds(example: Example) -> tuple[float, float] | None:
    control = example.open_control("image")
    return None if control is None else edge_thresholds(control)


def _lines(grey: Any) -> Tensor:
    """Return the lines of an edge map (H, W), bool. One that was made smaller has them in grey: a quarter of the
    brightest pixel is enough."""
    return torch.from_numpy(grey > max(float(grey.max()) / 4, 1.0))


def _mean(values: Tensor) -> dict[str, Any]:
    """Return the mean of figures in [0, 1] with its 95 % interval, by the normal approximation."""
    mean, interval = float(values.mean()), [0.0, 1.0]
    if len(values) > 1:
        error = 1.96 * float(values.std()) / len(values) ** 0.5
        interval = [max(0.0, mean - error), min(1.0, mean + error)]
    return {"f1": mean, "interval_95": interval}
