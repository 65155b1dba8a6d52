"""Agreement of images with the label maps and edge maps that they were drawn under."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentflow import metrics
from latentflow.data import find_source, read_image
from latentflow.data.images import to_tensor
from latentflow.data.labels import read_label_ids
from latentflow.data.sources import shape_layouts, shapes
from latentflow.evaluation import control
from latentflow.evaluation import lines as printed
from latentflow.inference.control_images import EDGES, open_maker, write_control_images


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
        maps = [control_image["labels"] for control_image in controls]
        for control_image in maps:
            assert read_label_ids(control_image, shape_layouts.LABELS).any()
        return torch.stack([to_tensor(image.convert("RGB")) for image in maps])


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


def test_edges_agree_where_they_are_at_most_a_pixel_away() -> None:
    asked = torch.zeros(1, 12, 12, dtype=torch.bool)
    asked[0, 2:10, 5] = True

    def agreement(*columns: int) -> float:
        found = torch.zeros_like(asked)
        found[0, 2:10, list(columns)] = True
        return float(metrics.edge_agreement(found, asked))

    assert [agreement(column) for column in (4, 5, 6)] == [1.0] * 3
    assert agreement(3) == agreement(7) == agreement() == 0.0
    assert (
        agreement(5, 10) == 2 * 0.5 / 1.5
    )  # half of what is found is right, and all that is asked for is there
    half = asked.clone()
    half[0, 5:] = False  # and four of eight pixels have a neighbour in the half that is left
    assert float(metrics.edge_agreement(half, asked)) == 2 * 0.5 / 1.5
    nothing = torch.zeros_like(asked)
    assert float(metrics.edge_agreement(nothing, nothing)) == 1.0


def test_the_figure_of_edges_is_of_images_with_maps_of_the_command(tmp_path: Path) -> None:
    for number in range(6):
        image = Image.new("RGB", (64, 64), "white")
        image.paste("navy", (8 + 4 * number, 12, 40 + 2 * number, 50))
        image.save(tmp_path / f"{number}.png")
    request: Any = {"condition": "none", "control": "image"}
    write_control_images(
        find_source(str(tmp_path), **request), tmp_path, open_maker("edges", None, EDGES, "cpu")
    )
    Image.open(tmp_path / "5.png").save(tmp_path / "5-control.png")  # another's
    model: Any = SimpleNamespace(
        native_size=(32, 32), control_kinds=("image",), encode=lambda x: x, decode=lambda x: x
    )
    source = find_source(str(tmp_path), **request)
    led = control.led_by_edges(model, source)
    assert led is not None and [example.name for example in led.examples] == [
        f"{number}.png" for number in range(5)
    ]
    assert control.led_by_edges(SimpleNamespace(control_kinds=("labels",)), source) is None  # type: ignore[arg-type]
    drawn = {
        hash(control.cut_control(e, (32, 32), "image").tobytes()): read_image(e, 32) for e in led.examples
    }

    def sample(captions: Sequence[str], stream: int, description: str, controls: Any = None) -> Tensor:
        """Draw what each map is of; without them white images with a line where there is no edge."""
        if controls is not None:
            return torch.stack([to_tensor(drawn[hash(each["image"].tobytes())]) for each in controls])
        white = torch.ones(len(captions), 3, 32, 32)
        white[:, :, 1] = -1
        return white

    sampler: Any = SimpleNamespace(model=model, seed=0, batch_size=2, sample=sample)
    found = control.edges(sampler, led, "white", 4)
    assert found["images"] == 4
    assert found["map"] == found["real"] == found["autoencoder"]  # maps of 64 pixels, edges of 32
    assert found["map"]["f1"] > 0.95 and found["nothing"] == {"f1": 0.0, "interval_95": [0.0, 0.0]}
    low, high = found["map"]["interval_95"]
    assert low <= found["map"]["f1"] <= high <= 1.0
    (line,) = printed._edges({"edges": found})
    assert "0.000 (95 %: 0.000 to 0.000) without" in " ".join(line.split())
