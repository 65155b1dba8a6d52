"""Sizes that a family can draw: every other one is refused in the same words, wherever noise is asked for."""

from __future__ import annotations

import pytest
import torch

from latentflow import LatentFlowPipeline
from latentflow.errors import UserError

from .test_pretrained import opened
from .tiny import TINY


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_sizes(name: str) -> None:
    _, model, tiny = opened(name)
    multiple, side = model.size_multiple, tiny.side
    pipe = LatentFlowPipeline(model)
    condition = {"prompt": "red apple"} if model.takes_text else {"class_labels": 1}
    assert side % multiple == 0 and pipe.canvas_size((side + 1, side)) == (side + multiple, side)
    nearest = rf"is not a multiple of {multiple}, .*\nNearest: {side} and {side + multiple}\.$"
    for draw in (
        lambda height, width: pipe.prepare_noise(2, height, width),
        lambda height, width: model.noise(2, height, width),
        lambda height, width: pipe(**condition, height=height, width=width),
    ):
        with pytest.raises(UserError, match=f"height {side + 1} {nearest}"):
            draw(side + 1, side)
        with pytest.raises(UserError, match=f"width {side + 1} {nearest}"):
            draw(side, side + 1)
    with pytest.raises(UserError, match=rf"multiple of {multiple}, .*\nNearest: {multiple}\.$"):
        model.noise(1, side, 1 if multiple > 1 else 0)
    shape = model.noise(1, side + multiple, side).shape
    assert shape == (1, *model.latent_shape(side + multiple, side))
    assert shape[-2] * side == shape[-1] * (side + multiple)  # nothing is rounded
