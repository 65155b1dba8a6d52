"""Tiny checkpoints for the web page's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="module")
def formats_of_pillow() -> Iterator[None]:
    """A server gives up all but a few formats and sizes, for as long as its process lives."""
    Image.init()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "OPEN", dict(Image.OPEN))
        patch.setattr(Image, "ID", list(Image.ID))
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        yield


# The networks' libraries are imported below, as the browser's test does without them.


@pytest.fixture(scope="session")
def caption_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 pixels, factor 2, a real network with random weights."""
    from ..pipeline.conftest import LatentFlowPipeline, tiny_dit, tiny_text, tiny_vae

    folder = tmp_path_factory.mktemp("captions") / "pipeline"
    LatentFlowPipeline(tiny_vae(), tiny_dit(text_dim=16), **tiny_text()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def control_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``caption_checkpoint``, without captions, and led by images and label maps."""
    from ..pipeline.conftest import LatentFlowPipeline, tiny_dit, tiny_vae

    folder, labels = tmp_path_factory.mktemp("control") / "pipeline", [["sky", "#0000ff"], ["sea", "#00ff00"]]
    network = tiny_dit(control={"image": 2, "labels": labels, "cell": 2, "label_width": 2})
    LatentFlowPipeline(tiny_vae(), network).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pixels, 8 x 8 tokens of 5 codes, two classes, random weights."""
    import torch

    from ..pipeline.test_tokens import TokenDiT, pipeline

    folder, pipe = tmp_path_factory.mktemp("tokens") / "pipeline", pipeline(network=TokenDiT)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.normal_(std=0.2)
    pipe.save_pretrained(folder)
    return folder


#: A class whose name would be a program in the page.
MARKUP = "</script><script>alert(1)</script>"


@pytest.fixture(scope="session")
def class_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``caption_checkpoint``, of two classes."""
    from ..pipeline.conftest import LatentFlowPipeline, tiny_dit, tiny_vae

    folder, names = tmp_path_factory.mktemp("classes") / "pipeline", {0: "hat", 1: MARKUP}
    LatentFlowPipeline(tiny_vae(), tiny_dit(num_classes=2), id2label=names).save_pretrained(folder)
    return folder
