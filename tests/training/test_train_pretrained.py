"""`latentflow train --init-from` a pretrained model: what it learns, and what stock diffusers opens of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentflow import LatentFlowPipeline

from ..families.test_family_programs import STAND_INS
from ..families.test_lora_training import LAYOUTS, LOADED
from ..families.test_pretrained import drawn, grid, images, stock
from ..families.tiny import TINY
from .command import call
from .pretrained import QUICK, adapter, base_flags, photos, validated

PROMPT = "a red apple"
pytestmark = pytest.mark.usefixtures("no_memorisation")


def opened(folder: Path, name: str) -> Any:
    """Return our pipeline over a saved checkpoint."""
    pipe = LatentFlowPipeline.from_pretrained(folder, family_options=TINY[name].call)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipe: Any, name: str) -> torch.Tensor:
    """Draw as `stock` does: by Euler's method, on the noise levels of the pipeline's scheduler."""
    times = grid(name)
    with torch.no_grad():
        rows = pipe.model.encode_prompt([PROMPT]).repeat(2)
        found = drawn(name, pipe.model.velocity(rows, times=times), times)
        return images(name, found)[:1]


def theirs(pipe: Any, name: str) -> torch.Tensor:
    options = {"negative_prompt": ""} if "QwenImage" in name else {}  # without one it does not guide
    with torch.no_grad():
        return stock(name, [PROMPT], pipe, **options)


each_adapted = pytest.mark.parametrize(
    "name",
    [
        name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow)
        for name in LOADED
        if name not in STAND_INS
    ],
)


@each_adapted
def test_30_steps_on_8_images_learn_an_adapter_that_the_stock_pipeline_opens(
    name: str, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    base, data = pretrained(name), photos(tmp_path / "data", TINY[name].side)
    line = [
        data,
        "-o",
        tmp_path / "run",
        *base_flags(name, base),
        *QUICK,
        "--lora-rank",
        2,
        "--lora-alpha",
        3,
    ]
    line += [
        "--validation",
        0.25,
        "--validation-steps",
        10,
        "--max-train-steps",
        30,
        "--learning-rate",
        "3e-3",
    ]
    said = call(cache, *line)
    assert "6 images to train on, 2 held out; condition: text" in said
    losses = validated(tmp_path / "run")
    assert losses.keys() == {10, 20, 30} and losses[30] < losses[20] < losses[10]
    learned = json.loads((tmp_path / "run" / "learning.json").read_text())
    assert learned["after"] < learned["before"] - 2 * learned["error"]

    kind = getattr(diffusers, name.partition("-")[0])
    ours_, stock_ = opened(base, name), kind.from_pretrained(base)
    stock_.set_progress_bar_config(disable=True)
    plain = ours(ours_, name)
    ours_.load_lora_weights(tmp_path / "run" / "adapter")
    stock_.load_lora_weights(tmp_path / "run" / "adapter")  # by diffusers' own loader
    learned = ours(ours_, name)
    assert float((learned - plain).abs().max()) > 1e-3
    torch.testing.assert_close(theirs(stock_, name), learned, rtol=0.0, atol=1e-5)
    for pipe, draw in ((ours_, ours), (stock_, theirs)):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(draw(pipe, name), learned, rtol=0.0, atol=2e-5)
    assert {key.rpartition(".lora_")[2] for key in adapter(tmp_path / "run")} >= {"A.weight", "B.weight"}
