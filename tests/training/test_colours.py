"""A run that was begun before colour profiles were converted goes on as it was; a new one converts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ..data.profiles import rgb_profile
from .command import TINY, call


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """Images of which half have a profile."""
    folder = Path(shutil.copytree(images, tmp_path / "data"))
    for number in range(6):
        path = folder / f"{number:02d}.png"
        Image.open(path).save(path, icc_profile=rgb_profile("Display P3"))
    return folder


@pytest.mark.parametrize("file", ["flow", "autoencoder"])
def test_a_run_begun_before_goes_on_with_the_colours_as_they_are_stored(data, tmp_path, file) -> None:
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    flags = [*TINY, "--max-train-steps", 2] if file == "flow" else [*TINY[:15], "--autoencoder-steps", 2]
    often = ["--checkpointing-steps", 1, "--preview-steps", 0, "--validation-steps", 0]

    def train(run: Path, *more: object, expect: int = 0) -> str:
        line = [data, "-o", run, *flags, *often, *more]
        return call(tmp_path / "cache", *line, file=file, expect=expect)

    train(whole, "--colours", "stored")
    shutil.copytree(whole, begun)
    shutil.rmtree(begun / "checkpoints" / "step-000002")
    settings = yaml.safe_load((begun / "config.yaml").read_text())
    assert settings.pop("colours") == "stored"
    (begun / "config.yaml").write_text(yaml.safe_dump(settings))  # as it was written before

    said = train(begun)
    assert len(re.findall("was begun before colour profiles were converted", said)) == 1
    assert "6 images with another colour profile than sRGB, not used (--colours stored)" in said
    one, other = (
        load_file(run / f"checkpoints/step-000002/{file}-weights.safetensors") for run in (begun, whole)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert yaml.safe_load((begun / "config.yaml").read_text())["colours"] == "stored"  # and so for good
    assert "data: " in train(begun, "--colours", "srgb", expect=2)
