"""Random masks for training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentflow.data.masks import DEFAULT_SHAPES, MASK_SHAPES, check_shapes, random_masks
from latentflow.errors import UserError

SIZE = (48, 80)
DRAWS = 300
# shape -> bounds of the share of the area, of a single mask and on average
AREAS = {
    "rectangle": ((0.03, 0.75), (0.3, 0.45)),
    "strokes": ((0.0, 0.7), (0.05, 0.3)),
    "ellipse": ((0.0, 0.8), (0.1, 0.35)),
    "half-plane": ((0.15, 0.85), (0.45, 0.55)),
    "frame": ((0.25, 0.97), (0.55, 0.7)),
    "full": ((1.0, 1.0), (1.0, 1.0)),
    "none": ((0.0, 0.0), (0.0, 0.0)),
}


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_each_shape_has_its_area_and_lies_anywhere(shape: str) -> None:
    masks = random_masks({shape: 1.0}, SIZE, generators(DRAWS))
    assert masks.shape == (DRAWS, 1, *SIZE)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    (low, high), (mean_low, mean_high) = AREAS[shape]
    areas = masks.mean((1, 2, 3))
    assert low <= areas.min() and areas.max() <= high
    assert mean_low <= areas.mean() <= mean_high
    if shape not in ("full", "none"):
        assert len({mask.numpy().tobytes() for mask in masks}) > 0.8 * DRAWS
        everywhere = masks.mean((0, 1))
        assert everywhere.min() > 0 and everywhere.max() < 1  # no pixel always or never hidden


def test_shapes_come_in_their_shares() -> None:
    masks = random_masks({"full": 3.0, "none": 1.0}, SIZE, generators(1000))
    share = masks.mean((1, 2, 3)).mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 1000) ** 0.5


def test_a_generator_decides_its_mask_alone() -> None:
    alone = [random_masks(DEFAULT_SHAPES, SIZE, [one]) for one in generators(20)]
    assert torch.equal(torch.cat(alone), random_masks(DEFAULT_SHAPES, SIZE, generators(20)))
    assert not torch.equal(torch.cat(alone), random_masks(DEFAULT_SHAPES, SIZE, generators(20, seed=1)))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 200)])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_small_and_long_images(shape: str, size: tuple[int, int]) -> None:
    assert random_masks({shape: 1.0}, size, generators(20)).shape == (20, 1, *size)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"rectangles": 1.0}, "(?s)unknown mask shape 'rectangles'.*'rectangle'"),
        ({"rectangle": -1.0, "full": 2.0}, "is -1.0"),
        ({"rectangle": float("nan")}, "is nan"),
        ({"rectangle": 0.0}, "no mask shape"),
        ({"data": 1.0}, "unknown mask shape"),
    ],
)
def test_shares_that_cannot_be_drawn_are_refused(shapes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shapes(shapes)


def test_the_default_can_be_drawn() -> None:
    check_shapes(DEFAULT_SHAPES)
    check_shapes({"data": 1.0}, more=["data"])
