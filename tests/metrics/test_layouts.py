"""Agreement of images with the label maps that they were drawn under."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentflow.data.images import to_tensor
from latentflow.data.labels import read_label_ids
from latentflow.data.sources import shape_layouts, shapes
from latentflow.evaluation import control
from latentflow.evaluation import lines as printed


class Painter:
    """A sampler that paints each label in its colour, and nothing without a map."""

    model = SimpleNamespace(
        native_side=32, control_labels=shape_layouts.LABELS, encode=lambda x: x, decode=lambda x: x
    )
    condition_kind, seed, batch_size = "prompt", 0, 5

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], bool]] = []

    def sample(
        self, captions: Sequence[str], stream: int, description: str, controls: Sequence[Any] | None = None
    ) -> Tensor:
        self.calls.append(([*captions], controls is not None))
        if controls is None:
            return torch.ones(len(captions), 3, 32, 32)
        for control_image in controls:
            assert read_label_ids(control_image, shape_layouts.LABELS).any()
        return torch.stack([to_tensor(image.convert("RGB")) for image in controls])


def test_images_in_the_colours_of_the_map_agree_with_it_and_white_ones_do_not() -> None:
    sampler: Any = Painter()
    found = control.layouts(sampler, 12)
    iou = found["mean_iou"]
    assert iou["map"] > 0.9  # hard edges, which the checker expects to be soft
    assert iou["map_and_caption"] == iou["map"]
    assert iou["nothing"] == 0.0
    assert iou["real"] > 0.93
    assert iou["autoencoder"] == iou["real"]
    captions = next(captions for captions, led in sampler.calls if led and any(captions))
    assert all(shapes.is_held_out(shapes.parse(text)) for text in captions)
    assert [any(captions) for captions, _ in sampler.calls].count(True) == 1
    (line,) = printed._layouts({"layouts": found})
    assert "0.000 without" in line
    assert control.draws_layouts_of_shapes(sampler.model, "prompt")
    assert not control.draws_layouts_of_shapes(sampler.model, "class_labels")


def test_the_mean_is_over_the_objects_that_are_asked_for() -> None:
    spec = shapes.Pair("red", "circle", "left of", "blue", "square")
    asked = shape_layouts.label_map(spec, 32)
    one_missing = asked.copy()
    one_missing[:, 16:] = 0
    assert shape_layouts.mean_iou([asked], [one_missing]) == 0.5
    halved = asked.copy()
    rows = asked[:, :16].nonzero()[0]
    halved[: (rows.min() + rows.max() + 1) // 2, :16] = 0  # half of the left one
    share = (halved[:, :16] > 0).sum() / (asked[:, :16] > 0).sum()
    assert abs(shape_layouts.mean_iou([asked], [halved]) - (1 + share) / 2) < 1e-9
