"""Training on images of several aspect ratios, from the command line to the pipeline."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import LatentFlowPipeline
from latentflow.config import FlowConfig, FramingConfig
from latentflow.data import LatentTable, crop, find_source
from latentflow.errors import UserError
from latentflow.models import Condition, DiT, UNet
from latentflow.training.loop.data_order import DataOrder, SampleUse
from latentflow.training.loop.loader import by_group, groups_of, load_batch, load_batches
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

from .command import TINY, call, losses, opened, sampled

SHAPES = ((16, 16), (16, 16), (16, 16), (24, 10), (10, 24), (10, 24), (40, 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four aspect ratios, each of another colour."""
    folder = tmp_path_factory.mktemp("images")
    for row, size in enumerate(SHAPES * 2):
        image = np.full((*size[::-1], 3), 15 * row, dtype=np.uint8)
        image[0] = 255 - row
        Image.fromarray(image).save(folder / f"{row:02d}.png")
    return folder


def latent_data(folder: Path, **more: Any) -> LatentData:
    """What an image's latent says is its row and its crop."""
    source = find_source(str(folder), condition="none")
    framing = crop(source, 16, 4, FramingConfig(buckets=True, crops=2), size_conditioning=True)
    sized = []
    for number, (height, width) in enumerate(framing.sizes):
        rows = torch.tensor([[row, crop] for row in framing.members[number] for crop in (0, 1)])
        latents = rows[:, None, :, None, None].expand(-1, 2, -1, height // 4, width // 4).float()
        sized.append(BucketData(LatentTable(latents, None)))
    return LatentData(
        framing, sized, lambda rows, numbers: {"rows": torch.tensor(rows)}, size_conditioning=True, **more
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_every_image_once_each_at_its_size(folder: Path, workers: int) -> None:
    data = latent_data(folder)
    order = DataOrder(size=len(data), batch_size=4, seed=1, groups=groups_of(data))
    seen: Counter[int] = Counter()
    shapes = set()
    for parts in load_batches(data, order.batches(0, 7, 0), num_workers=workers, pin_memory=False):
        assert sum(len(part["sample_ids"]) for part in parts) == 4
        for part in parts:
            latents, rows = part["latents"], part["rows"]
            assert torch.equal(latents[:, 0, 0, 0].long(), rows)  # the right image's, not its neighbour's
            assert part["sizes"].shape == (len(rows), 6)
            assert (part["sizes"][:, 4:] == torch.tensor(latents.shape[2:]) * 4).all()
            natural = torch.tensor([(SHAPES * 2)[row][::-1] for row in rows.tolist()])
            assert torch.equal(part["sizes"][:, :2], natural.float())
            seen.update(rows.tolist())
            shapes.add(tuple(latents.shape[2:]))
    assert seen == Counter(dict.fromkeys(range(14), 2)) and len(shapes) == 4


def test_both_crops_of_an_image_are_drawn_by_seed_and_running_number(folder: Path) -> None:
    def crops(seed: int) -> list[int]:
        data = latent_data(folder, seed=seed)
        order = DataOrder(size=14, batch_size=14, groups=groups_of(data))
        drawn = {}
        for draws in order.batches(0, 20, 0):
            for part in by_group(draws, data.groups):
                batch = load_batch(data, part)
                drawn |= dict(
                    zip(batch["sample_ids"], batch["latents"][:, 1, 0, 0].int().tolist(), strict=True)
                )
        return [drawn[number] for number in sorted(drawn)]

    one = crops(0)
    assert 100 < sum(one) < 180 and crops(0) == one and crops(1) != one


def test_what_is_told_of_a_crop_needs_its_image_no_more(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    kept, gone = latent_data(folder), latent_data(copy)
    shutil.rmtree(copy)
    draws = [SampleUse(index, number) for index in (3, 10) for number in range(8)]
    sizes = [load_batch(data, draws)["sizes"] for data in (kept, gone)]
    assert torch.equal(*sizes) and len(sizes[0].unique(dim=0)) > 2


def test_a_batch_in_parts_has_the_loss_and_gradient_of_its_samples(folder: Path) -> None:
    torch.manual_seed(0)
    data = latent_data(folder)
    network = DiT(in_channels=2, width=32, depth=1, heads=2, size_conditioning=True)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    stage = FlowLoss(network, FlowConfig(condition_dropout=0.0), seed=0)
    draws = next(DataOrder(size=14, batch_size=14, groups=groups_of(data)).batches(0, 1, 0))

    def gradient(parts: list[Any]) -> tuple[float, Tensor]:
        network.zero_grad()
        total = 0.0
        for part in parts:
            loss = stage(load_batch(data, part))["loss"] * len(part) / 14
            loss.backward()
            total += float(loss.detach())
        grads = (weight.grad for weight in network.parameters())
        return total, torch.cat([grad.flatten() for grad in grads if grad is not None])

    together, alone = gradient(by_group(draws, data.groups)), gradient([[draw] for draw in draws])
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    torch.testing.assert_close(together[1], alone[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [DiT, UNet])
@pytest.mark.parametrize("more", [{}, {"num_classes": 3}, {"text_dim": 8}])
def test_sizes_say_nothing_at_first_and_something_once_learnt(
    make: Callable[..., Any], more: dict[str, int]
) -> None:
    torch.manual_seed(0)
    shape = {"channels": (16, 32), "head_dim": 8} if make is UNet else {"width": 32, "depth": 1, "heads": 2}
    network = make(in_channels=2, size_conditioning=True, **shape, **more).eval()
    for name, weight in network.named_parameters():
        if "size_embedder" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    x, sizes = torch.randn(2, 2, 8, 8), torch.tensor([[64.0, 64, 0, 0, 64, 64], [300, 200, 10, 0, 64, 64]])
    plain = network(x, 0.5, Condition())
    assert torch.equal(network(x, 0.5, Condition(sizes=sizes)), plain)
    torch.nn.init.normal_(network.size_embedder.mlp[2].weight)
    told = network(x, 0.5, Condition(sizes=sizes))
    assert (told - plain).abs().mean() > 1e-3
    assert torch.equal(network(x, 0.5, Condition(sizes=sizes).unconditional()), told)
    with pytest.raises(ValueError, match="must be"):
        network(x, 0.5, Condition(sizes=sizes[:, :4]))


def test_a_run_resumes_bit_for_bit_and_its_pipeline_is_told_sizes(folder: Path, tmp_path: Path) -> None:
    framing = ["--buckets", "--crops", 2, "--size-conditioning", "--inpainting", "--random-flip"]
    line = [folder, *TINY, *framing, "--condition", "none"]

    said = call(tmp_path / "cache", *line, "-o", tmp_path / "whole", "--max-train-steps", 8)
    assert re.search(r"sizes \(width x height: images\): .*16x16: \d.*; none left out", said)
    vae = ["--vae", tmp_path / "whole" / "autoencoder" / "autoencoder", "--lr-scheduler", "constant"]
    for steps in (4, 8):
        call(tmp_path / "cache", *line, *vae, "-o", tmp_path / "resumed", "--max-train-steps", steps)
    call(tmp_path / "cache", *line, *vae, "-o", tmp_path / "again", "--max-train-steps", 8)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "again")
    square = [*line, *vae, "--no-buckets", "-o", tmp_path / "again", "--max-train-steps", 9]
    assert "framing.buckets: True -> False" in call(tmp_path / "cache", *square, expect=2)

    pipe = opened(tmp_path / "again" / "pipeline")

    def drawn(**more: Any) -> Tensor:
        return sampled(pipe, height=16, width=24, output_type="pt", **more)

    assert drawn().shape == (1, 3, 16, 24)
    torch.nn.init.normal_(pipe.transformer.size_embedder.mlp[2].weight)
    assert torch.equal(drawn(), drawn(original_size=(16, 24), target_size=(16, 24)))
    assert not torch.equal(drawn(), drawn(original_size=(400, 600)))
    assert not torch.equal(drawn(), drawn(crops_coords_top_left=(0, 9)))


def test_a_checkpoint_that_knows_no_sizes_says_so() -> None:
    pipe = LatentFlowPipeline(vae=None, transformer=DiT(in_channels=2, width=32, depth=1, heads=2))
    with pytest.raises(UserError, match="not trained with sizes and crops as a condition"):
        pipe(height=16, width=16, original_size=(64, 64), output_type="latent")
