"""The perceptual loss of a vision network's features."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from latentflow.autoencoder import build_autoencoder
from latentflow.autoencoder.losses import stage_distance
from latentflow.config import AutoencoderConfig, DataConfig, LoopConfig
from latentflow.data.sources.shapes import train_source
from latentflow.errors import UserError
from latentflow.training.losses.autoencoder import AutoencoderLoss, FeatureDistance
from latentflow.training.report.folder import read_metrics
from latentflow.training.train_autoencoder import train_autoencoder

from ..models.test_vision import installed
from ..models.tiny import save_dinov2

SMALL = AutoencoderConfig(
    latent_channels=4, autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(1, 1), autoencoder_steps=4,
    autoencoder_batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_dinov2(tmp_path_factory.mktemp("dinov2"), layers=4))


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_are_compared_at_length_one_and_averaged() -> None:
    stages = [torch.tensor([[[3.0, 1.0], [4.0, 0.0]]]), torch.tensor([[[1.0], [0.0]]])]  # (1, 2, positions)
    others = [torch.tensor([[[0.3, 0.0], [0.4, 2.0]]]), torch.tensor([[[-5.0], [0.0]]])]
    # Equal directions: 0; at right angles: 2; opposite: 4.
    assert stage_distance(stages, others).tolist() == pytest.approx([((0 + 2) / 2 + 4) / 2])


def check(name: str) -> None:
    distance = FeatureDistance(name)
    same = distance(images(), images())
    torch.testing.assert_close(same, torch.zeros(3))
    other = images(seed=1).requires_grad_()
    apart = distance(other, images())
    assert apart.shape == (3,) and (apart > 1e-4).all() and (apart < 4).all()
    apart.sum().backward()
    assert other.grad is not None and (other.grad.flatten(1).norm(dim=1) > 0).all()
    assert list(distance.parameters()) == [] and distance.state_dict() == {}
    weights = list(distance._vision._network.parameters())
    assert weights and not any(weight.requires_grad or weight.grad is not None for weight in weights)


def test_equal_images_are_zero_apart_and_gradients_reach_images_alone(network: str) -> None:
    check(network)


@installed
def test_so_it_is_with_efficientnet_lite0_which_sees_smaller_changes_as_smaller() -> None:
    check("efficientnet-lite0")
    distance, noise = FeatureDistance("efficientnet-lite0"), images(seed=2)
    levels = [float(distance(images() + level * noise, images()).mean()) for level in (0.01, 0.1, 1.0)]
    assert levels == sorted(levels) and levels[0] < 0.1 * levels[2]


def test_the_loss_is_l1_and_the_weighted_distance(network: str) -> None:
    config = dataclasses.replace(SMALL, perceptual_weight=0.3, perceptual_features=network)
    torch.manual_seed(0)
    vae = build_autoencoder(config, 16)
    loss = AutoencoderLoss(vae, config, 0)
    values = loss({"images": images(), "sample_ids": [0, 1, 2]})
    made = vae.decode(vae.encode(images()).latent).sample
    apart = FeatureDistance(network)(made, images()).mean()
    torch.testing.assert_close(values["perceptual"], apart.detach())
    expected = (made - images()).abs().mean() + 0.3 * apart
    torch.testing.assert_close(values["loss"].detach(), expected.detach())
    assert all(name.startswith("vae.") for name in loss.state_dict())


def test_a_run_reports_it_saves_nothing_of_it_and_resumes(network: str, tmp_path: Path) -> None:
    source = train_source().subset(list(range(0, 400, 20)))
    loop = LoopConfig(
        validation_steps=0, preview_steps=0, lr_warmup_steps=1, log_steps=1, mixed_precision="no"
    )
    config = dataclasses.replace(SMALL, perceptual_weight=0.1, perceptual_features=network)
    data = DataConfig(data="", resolution=16)

    def train(config: AutoencoderConfig) -> Any:
        return train_autoencoder(source, source.subset([]), config, loop, tmp_path, data)

    assert train(config) is not None
    assert all(row["perceptual"] > 0 for row in read_metrics(tmp_path))
    [file] = (tmp_path / "autoencoder").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) <= build_autoencoder(SMALL, 16).state_dict().keys() | {"latents"}
    assert train(config) is not None  # finished: nothing is left to do, and nothing refused
    with pytest.raises(UserError, match=r"perceptual_features|autoencoder"):
        other = shutil.copytree(network, tmp_path / "other")
        train(dataclasses.replace(config, perceptual_features=str(other)))


def test_runs_of_before_have_no_such_setting() -> None:
    lpips = dataclasses.replace(SMALL, perceptual_weight=1.0)
    assert "perceptual_features" not in lpips.describe() and "perceptual_features" not in SMALL.describe()
    with pytest.raises(UserError, match=r"(?s)--perceptual-features x without --perceptual-weight.*0.1"):
        AutoencoderConfig(perceptual_features="x")
