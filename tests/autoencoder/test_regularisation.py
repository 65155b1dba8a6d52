"""Levers that make latents easier to model: transformed alike, and noisy; exact where an autoencoder is exact."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from latentflow.autoencoder import build_autoencoder
from latentflow.autoencoder.losses import SMALLEST_IMAGE, PatchDiscriminator, noisy, scales, transformed
from latentflow.config import AutoencoderConfig, DataConfig, LoopConfig
from latentflow.data.sources.shapes import train_source
from latentflow.training.loop.random_numbers import CounterRandom
from latentflow.training.losses import autoencoder as training
from latentflow.training.losses.autoencoder import AutoencoderLoss, DiscriminatorLoss
from latentflow.training.train_autoencoder import train_autoencoder

HALF, QUARTER = Fraction(1, 2), Fraction(1, 4)
SMALL = AutoencoderConfig(
    latent_channels=4, autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(1, 1), autoencoder_steps=6,
    autoencoder_batch_size=8,
)  # fmt: skip
ON = dataclasses.replace(SMALL, equivariance=0.5, latent_noise=0.5)


class Toy(nn.Module):
    """An autoencoder of two functions, without weights; it remembers what it decoded."""

    seen: Tensor

    def __init__(self, encoded: Callable[[Tensor], Tensor], decoded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoded, self.decoded = encoded, decoded

    def encode(self, images: Tensor) -> Any:
        return SimpleNamespace(latent=self.encoded(images))

    def decode(self, latents: Tensor) -> Any:
        self.seen = latents
        return SimpleNamespace(sample=self.decoded(latents))


def pooling() -> Toy:
    """Means of 2 x 2 pixels, repeated: commutes with rotations, and with scales that its images leave in blocks."""
    return Toy(
        lambda images: F.avg_pool2d(images, 2), lambda latents: F.interpolate(latents, scale_factor=2.0)
    )


def shuffling() -> Toy:
    """Pixels as channels and back: loses nothing, and commutes with no rotation and no scale."""
    return Toy(lambda images: F.pixel_unshuffle(images, 2), lambda latents: F.pixel_shuffle(latents, 2))


def blocks(side: int, rows: int = 8) -> Tensor:
    """Images of 16 px, constant on squares of this side."""
    colours = torch.rand(rows, 3, 16 // side, 16 // side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(colours, size=(16, 16), mode="nearest")


def batch(images: Tensor, step: int = 0) -> dict[str, Any]:
    return {"images": images, "sample_ids": list(range(step * len(images), (step + 1) * len(images)))}


# ---- equivariance ----


@pytest.mark.parametrize(
    ("side", "factors"),
    [(8, [HALF, QUARTER]), (4, [HALF]), (2, [Fraction(1)])],
    ids=["1/4", "1/2", "turns only"],
)
def test_an_equivariant_autoencoder_has_no_equivariance_loss(
    side: int, factors: list[Fraction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "scales", lambda *_: factors)
    stage = AutoencoderLoss(pooling(), dataclasses.replace(SMALL, equivariance=1.0), 0)
    for step in range(12):
        assert float(stage(batch(blocks(side), step))["loss"]) == pytest.approx(0, abs=1e-6)


def test_one_that_loses_nothing_but_is_not_equivariant_has() -> None:
    images = blocks(1)
    assert float(AutoencoderLoss(shuffling(), SMALL, 0)(batch(images))["loss"]) == 0
    stage = AutoencoderLoss(shuffling(), dataclasses.replace(SMALL, equivariance=1.0), 0)
    assert all(float(stage(batch(images, step))["loss"]) > 0.1 for step in range(12))
    # Nor is one that is, at a scale that its images do not fit.
    small = transformed(pooling().encoded(blocks(2)), HALF, 0)
    assert float((pooling().decoded(small) - transformed(blocks(2), HALF, 0)).abs().mean()) > 0.1


@pytest.mark.parametrize("scale", scales(8, 8))
@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_latents_and_images_are_transformed_alike(scale: Fraction, quarter_turns: int) -> None:
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    slope = (row + 3 * column)[None, None]  # bilinear interpolation and means are exact on it
    latents = transformed(F.avg_pool2d(slope, 2), scale, quarter_turns)
    image = transformed(slope, scale, quarter_turns)
    assert image.shape[2:] == (int(16 * scale),) * 2
    torch.testing.assert_close(F.avg_pool2d(image, 2), latents)
    # And both are what they are called: the corner of (0, 0) turns anticlockwise.
    first = image.rot90(-quarter_turns, (2, 3))
    assert float(first[0, 0, 0, 0]) == float(first.min())


def test_scales_leave_whole_sides() -> None:
    assert scales(8, 8) == [Fraction(side, 8) for side in range(2, 8)]
    assert scales(32, 32)[0] == QUARTER and len(scales(32, 32)) == 24  # as in the paper's code
    assert scales(2, 2) == [HALF] and scales(1, 1) == [1] and scales(3, 3) == [Fraction(1, 3), Fraction(2, 3)]
    assert scales(8, 12) == [QUARTER, HALF, Fraction(3, 4)]
    assert scales(8, 8, smallest=5)[0] == Fraction(5, 8) and scales(8, 8, smallest=8) == [1]
    assert tuple(transformed(torch.zeros(1, 1, 8, 12), QUARTER, 1).shape) == (1, 1, 3, 2)


def test_steps_are_transformed_with_the_given_probability_each_in_its_own_way() -> None:
    config = dataclasses.replace(SMALL, equivariance=0.3)
    images, vae = blocks(2), pooling()
    stage, kinds = AutoencoderLoss(vae, config, 0), []
    for step in range(400):
        stage(batch(images, step))
        plain = vae.seen.shape == (8, 3, 8, 8)
        turns = [
            turn
            for turn in (1, 2, 3)
            if not plain
            and torch.equal(vae.seen, transformed(vae.encoded(images), Fraction(vae.seen.shape[2], 8), turn))
        ]
        assert len(turns) == (0 if plain else 1)  # the whole batch in one way
        kinds.append(None if plain else (vae.seen.shape[2], turns[0]))
    assert 0.23 < sum(kind is not None for kind in kinds) / 400 < 0.37
    assert len(set(kinds)) == 1 + 6 * 3
    noisy_stage = AutoencoderLoss(pooling(), ON, 0)
    for step in range(20):  # plain reconstruction where nothing is trained
        for evaluated in (stage.eval(), noisy_stage.eval()):
            assert float(evaluated(batch(blocks(2), step))["loss"]) == 0


def test_a_step_in_parts_is_the_same_step() -> None:
    config = dataclasses.replace(SMALL, equivariance=1.0)
    stage = AutoencoderLoss(pooling(), config, 0)
    whole = batch(blocks(2), 3)
    parts = [{name: rows[at : at + 2] for name, rows in whole.items()} for at in range(0, 8, 2)]
    losses = torch.cat([stage(part)["per_sample"] for part in parts])
    assert torch.equal(losses, stage(whole)["per_sample"])


@pytest.mark.parametrize("kind", ["dc", "kl"])
def test_all_classes_decode_them_and_the_adversary_judges_what_was_decoded(kind: Any) -> None:
    config = dataclasses.replace(
        ON, autoencoder_class=kind, equivariance=1.0, adversarial_weight=0.1, adversarial_start=0
    )
    torch.manual_seed(0)
    vae, discriminator = build_autoencoder(config, 32), PatchDiscriminator(8)
    stage = AutoencoderLoss(vae, config, 0, discriminator)
    sizes = set()
    for step in range(8):
        values = stage(batch(torch.rand(8, 3, 32, 32) * 2 - 1, step))
        values["loss"].backward()
        assert values["loss"].isfinite() and all(weight.grad is not None for weight in vae.parameters())
        assert stage.pairs is not None
        images, reconstructions = stage.pairs
        assert images.shape == reconstructions.shape and images.shape[2] < 32
        sizes.add(images.shape[2])
        assert DiscriminatorLoss(discriminator, stage)({})["loss"].isfinite()
    assert min(sizes) >= SMALLEST_IMAGE and len(sizes) > 2


# ---- noise ----


def test_noise_is_uniform_in_level_and_normal_and_follows_the_spread_of_each_channel() -> None:
    config = dataclasses.replace(SMALL, latent_noise=0.8)
    images = blocks(2, rows=256) * torch.tensor([1.0, 3.0, 0.2]).view(-1, 1, 1)
    vae = pooling()
    AutoencoderLoss(vae, config, 0)(batch(images))
    latents = vae.encoded(images)
    relative = (vae.seen - latents) / latents.std((0, 2, 3), correction=0).view(-1, 1, 1)
    levels = relative.square().mean((1, 2, 3)).sqrt()  # of 192 values: 5 % off
    assert stats.kstest(levels.numpy() / 0.8, "uniform").pvalue > 0.01
    assert stats.kstest((relative / levels.view(-1, 1, 1, 1)).flatten().numpy(), "norm").pvalue > 0.01
    by_channel = relative.square().mean((0, 2, 3))
    torch.testing.assert_close(by_channel, torch.full((3,), 0.8**2 / 3), rtol=0.15, atol=0)


def test_larger_latents_do_not_escape_the_noise() -> None:
    latents = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noise, level = torch.randn(4, 3, 5, 5), torch.full((4,), 0.5)
    seen = noisy(latents, level, noise)
    torch.testing.assert_close(noisy(7 * latents, level, noise), 7 * seen)
    # Any loss of what is seen, relative to its size, has no slope along the size of the latents (Euler).
    loss = (seen / seen.std() * torch.randn(4, 3, 5, 5)).sum()
    (slope,) = torch.autograd.grad(loss, latents)
    assert float((slope * latents.detach()).sum()) == pytest.approx(0, abs=1e-4)


def test_a_constant_channel_gets_no_noise_and_finite_gradients() -> None:
    latents = torch.ones(1, 2, 1, 1, requires_grad=True)
    seen = noisy(latents, torch.ones(1), torch.ones(1, 2, 1, 1))
    torch.testing.assert_close(seen, latents, atol=1e-5, rtol=0)
    seen.sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all()


# ---- runs ----


@pytest.mark.parametrize("kind", ["dc", "kl"])
def test_switched_off_the_loss_is_that_of_plain_reconstruction_to_the_bit(kind: Any) -> None:
    config = dataclasses.replace(SMALL, autoencoder_class=kind)
    torch.manual_seed(0)
    vae, images = build_autoencoder(config, 16), blocks(2)
    values = AutoencoderLoss(vae, config, 5)(batch(images, 1))
    encoded = vae.encode(images.contiguous(memory_format=torch.channels_last))
    latents = encoded.latent if kind == "dc" else encoded.latent_dist.mean
    if kind == "kl":
        noise = CounterRandom(5, list(range(8, 16))).normal((4, 8, 8))
        latents = latents + encoded.latent_dist.std * noise
    l1 = (vae.decode(latents).sample - images).abs().flatten(1).mean(1)
    assert torch.equal(values["per_sample"], l1.detach())


def test_runs_of_before_go_on_and_a_lever_is_no_small_change() -> None:
    assert "equivariance" not in SMALL.describe() and "latent_noise" not in SMALL.describe()
    assert SMALL.describe()["perceptual_weight"] == 0.0
    assert ON.describe()["equivariance"] == 0.5 and ON.describe()["latent_noise"] == 0.5


@pytest.fixture(scope="module", params=["dc", "kl", "vq"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of six steps, and one that resumes at its third."""
    source = train_source()
    train, validation = source.subset(list(range(0, 120, 4))), source.subset(list(range(1, 20, 4)))
    # With more codes than latents of a step: some are started again in every step.
    vq = {"codebook_size": 600, "codebook_width": 2, "latent_noise": 0.0} if request.param == "vq" else {}
    config = dataclasses.replace(ON, autoencoder_class=request.param, **vq)
    loop = LoopConfig(
        checkpointing_steps=3, preview_steps=0, lr_warmup_steps=1, log_steps=1, mixed_precision="no"
    )
    whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
    for folder in (whole, resumed):
        data = DataConfig(data="", resolution=16, random_flip=True)
        train_autoencoder(train, validation, config, loop, folder, data)
        if folder == whole:
            shutil.copytree(whole / "checkpoints" / "step-000003", resumed / "checkpoints" / "step-000003")
    return whole, resumed


def test_a_resumed_run_equals_one_that_never_stopped_to_the_bit(runs: tuple[Path, Path]) -> None:
    losses = []
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append({row["step"]: row["loss"] for row in rows if "loss" in row})
    assert min(losses[1]) == 4 and losses[0][4] == losses[1][4]
    whole, resumed = (load_file(next((run / "autoencoder").glob("*.safetensors"))) for run in runs)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
