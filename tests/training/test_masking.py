"""Training with hidden parts: which part is a pure function of the draw, and the network is told the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from latentflow import LatentFlowPipeline
from latentflow.autoencoder import build_autoencoder, mask_channels
from latentflow.config import AutoencoderConfig, FlowConfig
from latentflow.data import LatentTable, Source, find_source, one_size
from latentflow.data.sources.shapes import ShapeExample, all_specs
from latentflow.models import Condition, DiT, UNet
from latentflow.training.fine_tune.base import open_base
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.losses.flow import FlowLoss, Masking
from latentflow.training.losses.latent_data import BucketData, LatentData
from latentflow.training.trained_model import networks_from

from .command import TINY, call

SIDE, CHANNELS, FACTOR = 16, 4, 2
SPEC = all_specs()[0]
SHAPES = {"rectangle": 1.0, "full": 1.0}


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        autoencoder_widths=(8, 16), encoder_layers=(0, 1), decoder_layers=(0, 1), latent_channels=CHANNELS
    )
    one = build_autoencoder(config, SIDE)
    one.register_to_config(latents_mean=[0.1] * CHANNELS, latents_std=[0.5] * CHANNELS)
    return one.eval().requires_grad_(False)


def hole(channels: Tensor) -> Tensor:
    """(B, 1, h, w): the cells with pixels to repaint, by the first channels of a masked condition."""
    return (channels[:, : FACTOR**2] == 0).any(1, keepdim=True)


def batch(numbers: list[int]) -> dict[str, Any]:
    """Rows that depend on their number alone."""
    rows = [torch.Generator().manual_seed(number) for number in numbers]
    draw = [torch.randint(256, (3, SIDE, SIDE), generator=one, dtype=torch.uint8) for one in rows]
    latents = torch.stack([torch.randn(CHANNELS, 8, 8, generator=one) for one in rows])
    return {"pixels": torch.stack(draw), "latents": latents, "sample_ids": numbers}


class Recorder(nn.Module):
    """A network that keeps what it was shown."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.x, self.t, self.cond = x, t, cond
        return torch.zeros_like(x)


def test_the_mask_is_decided_by_seed_and_number(vae: AutoencoderDC) -> None:
    together = Masking(vae, SHAPES, seed=5)(batch([3, 4, 9]))
    for row, number in enumerate([3, 4, 9]):
        alone = Masking(vae, SHAPES, seed=5)(batch([number]))
        assert torch.equal(hole(alone)[0], hole(together)[row])
        torch.testing.assert_close(alone[0], together[row])
    other = Masking(vae, SHAPES, seed=6)(batch([3, 4, 9]))
    assert not torch.equal(hole(other), hole(together))


def test_own_masks_come_in_their_share_and_only_where_there_are_some(vae: AutoencoderDC) -> None:
    numbers = list(range(400))
    given = batch(numbers)
    given["masks"] = torch.zeros(400, 1, SIDE, SIDE, dtype=torch.uint8)
    given["masks"][:, :, 5, 5] = 255  # no random rectangle is so small
    given["has_mask"] = torch.arange(400) < 300
    masked = Masking(vae, {"rectangle": 1.0, "data": 1.0}, seed=0)(given)
    own = hole(masked).sum((1, 2, 3)) == 1
    assert own.sum() == own[:300].sum()
    assert abs(own[:300].float().mean() - 0.5) < 4 * 0.5 / 300**0.5


def test_own_masks_only_fall_back_to_random_ones(vae: AutoencoderDC) -> None:
    assert Masking(vae, {"data": 1.0}, seed=0)(batch([0, 1, 2]))[:, 0].eq(0).any()


def test_the_network_is_told_what_is_known(vae: AutoencoderDC) -> None:
    masking = Masking(vae, SHAPES, seed=0)
    stage = FlowLoss(Recorder(), FlowConfig(inpainting=True), seed=0, masking=masking)
    given = batch([0, 1, 2, 3])
    stage(given)
    assert torch.equal(stage.network.cond.channels, masking(given))
    plain = FlowLoss(Recorder(), FlowConfig(), seed=0)
    plain(given)
    assert plain.network.cond.channels is None
    assert torch.equal(plain.network.x, stage.network.x)  # masks change no other draw


def test_data_dependent_coupling_starts_from_the_known_part(vae: AutoencoderDC) -> None:
    masking = Masking(vae, SHAPES, seed=0)
    config = FlowConfig(inpainting=True, coupling="data-dependent")
    stage = FlowLoss(Recorder(), config, seed=0, masking=masking)
    plain = FlowLoss(Recorder(), FlowConfig(), seed=0)
    given = batch(list(range(8)))
    stage(given), plain(given)
    masked, t = masking(given), stage.network.t.view(-1, 1, 1, 1)
    known = (1 - t) * masked[:, -CHANNELS:] + t * given["latents"]
    kept = (~hole(masked)).expand_as(known)
    assert kept.any() and not kept.all()
    torch.testing.assert_close(stage.network.x[kept], known[kept])
    torch.testing.assert_close(stage.network.x[~kept], plain.network.x[~kept])


def test_masks_and_pixels_are_mirrored_with_the_latents() -> None:
    numbers = list(range(32))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    source = Source("one", (ShapeExample("a", spec=SPEC, seed=0),), "unconditional")
    table = LatentTable(torch.stack([ramp, ramp.flip(-1)], 1), None)
    data = LatentData(one_size(source, (64, 64)), [BucketData(table, {"pixels": ramp.to(torch.uint8)})], {})
    rows = data.__getitems__([SampleUse(0, number) for number in numbers])
    assert torch.equal(rows["latents"], rows["pixels"].float())
    assert 8 < sum(bool(row[0, 0, 0] == 7) for row in rows["pixels"]) < 24


@pytest.mark.parametrize("network", [DiT, UNet])
def test_an_extended_network_draws_what_it_drew_before(
    network: Any, vae: AutoencoderDC, images: Path, tmp_path: Path
) -> None:
    sizes: Any = (
        {"width": 16, "depth": 1, "heads": 1} if network is DiT else {"channels": (16, 16), "head_dim": 8}
    )
    old = network(in_channels=CHANNELS, sample_size=8, **sizes)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.normal_(0, 0.2)
    LatentFlowPipeline(vae, old).save_pretrained(tmp_path / "plain")
    source = find_source(str(images), condition="none")

    def fitted(checkpoint: Path, **options: bool) -> Any:
        return networks_from(open_base(str(checkpoint)), "", source, **options)["transformer"]

    new = fitted(tmp_path / "plain", inpainting=True, size_conditioning=True)
    assert new.config.condition_channels == mask_channels(vae)
    x, t = torch.randn(2, CHANNELS, 8, 8), torch.tensor([0.3, 0.8])
    told = Condition(channels=torch.randn(2, mask_channels(vae), 8, 8), sizes=torch.rand(2, 6) * 512)
    expected = old(x, t)
    assert torch.equal(new(x, t, told), expected)
    assert torch.equal(new(x, t), expected)
    same = fitted(tmp_path / "plain")
    assert same.config.condition_channels == 0 and not same.config.size_conditioning
    LatentFlowPipeline(vae, new).save_pretrained(tmp_path / "extended")
    assert fitted(tmp_path / "extended").config.size_conditioning


def test_one_flag_trains_to_inpaint_and_extends_a_checkpoint(images: Path, tmp_path: Path) -> None:
    """The real command: from nothing, from a checkpoint without masks, and on from one that has learnt it."""
    line = [images, *TINY, "--max-train-steps", 2, "--checkpointing-steps", 2]
    call(tmp_path / "cache", *line, "-o", tmp_path / "plain")
    extend = ["--init-from", tmp_path / "plain" / "pipeline", "--inpainting", "--coupling", "data-dependent"]
    call(tmp_path / "cache", *line, "-o", tmp_path / "extended", *extend)
    more = ["--init-from", tmp_path / "extended" / "pipeline", "--mask-shapes", "strokes", "1", "full", "1"]
    call(tmp_path / "cache", *line, "-o", tmp_path / "more", *more)
    channels = []
    for name in ("plain", "extended", "more"):
        pipe = LatentFlowPipeline.from_pretrained(tmp_path / name / "pipeline")
        channels.append(pipe.transformer.config.condition_channels)
    assert channels == [0, mask_channels(pipe.vae), mask_channels(pipe.vae)]
    weight = pipe.transformer.x_embedder.proj.weight
    assert weight[:, pipe.transformer.config.in_channels :].abs().max() > 0  # learnt from what is known
