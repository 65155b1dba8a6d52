"""Folders of the tiny checkpoints, for the programs; images that are seen small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers.pipelines.longcat_image.pipeline_longcat_image_edit as longcat_edit
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as qwen_edit
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as qwen_edit_plus
import pytest
import torch

from .tiny import checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny checkpoint as its users have it, once."""
    root = tmp_path_factory.mktemp("families")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            checkpoint(name).save_pretrained(root / name)
        return root / name

    return saved


@pytest.fixture
def small_megapixel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have images seen at an area of 32 x 32 pixels, in their own shape, in the place of a megapixel; no gradients."""

    def dimensions(area: int, ratio: float) -> tuple[int, int]:
        width, height = ((32 * 32 * shape) ** 0.5 for shape in (ratio, 1.0 / ratio))
        return round(width / 8) * 8, round(height / 8) * 8

    monkeypatch.setattr(longcat_edit, "calculate_dimensions", dimensions)
    monkeypatch.setattr(qwen_edit, "calculate_dimensions", lambda *asked: (*dimensions(*asked), None))
    monkeypatch.setattr(qwen_edit_plus, "calculate_dimensions", dimensions)
    with torch.no_grad():
        yield
