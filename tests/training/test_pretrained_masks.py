"""Own masks weight the loss of a pretrained model: against a formula written out, and through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.training.losses.pretrained import PretrainedLoss, cell_factors

from .command import call, losses
from .pretrained import QUICK, base_flags, photos

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME, OUTSIDE = "Flux2KleinPipeline", 0.25


def factors(mask: np.ndarray, cells: int, outside: float) -> np.ndarray:
    """The share of white in each cell, from the factor of black to 1, divided by the mean over the image."""
    side = len(mask) // cells
    white = mask.reshape(cells, side, cells, side).mean((1, 3)) / 255.0
    found = outside + (1.0 - outside) * white
    return found / found.mean()


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images; masks of three: half white, a corner that is no whole cell, black."""
    data = photos(tmp_path_factory.mktemp("masked"), 16, 4)
    for number, corner in enumerate(
        [(slice(None), slice(0, 8)), (slice(0, 3), slice(0, 2)), (slice(0), slice(0))]
    ):
        pixels = np.zeros((16, 16), np.uint8)
        pixels[corner] = 255
        Image.fromarray(pixels).save(data / f"{number}-mask.png")
    return data


def test_factors_of_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 1, 16, 16, generator=generator) > 0.7).to(torch.uint8) * 255
    has_mask = torch.tensor([True, False, True])
    for outside in (0.0, 0.1, 1.0):
        found = cell_factors(masks, has_mask, torch.Size([4, 4]), outside)
        torch.testing.assert_close(found.mean((1, 2, 3)), torch.ones(3))
        assert torch.equal(found[1], torch.ones(1, 4, 4))
        for row in (0, 2):
            expected = torch.from_numpy(factors(masks[row, 0].numpy(), 4, outside)).float()
            torch.testing.assert_close(found[row, 0], expected)
    assert torch.equal(cell_factors(masks, has_mask, torch.Size([4, 4]), 1.0), torch.ones(3, 1, 4, 4))


def test_the_loss_of_a_run_is_weighted_by_the_masks_beside_the_images(
    masked: Path,
    pretrained: Callable[[str], Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected: list[float] = []
    error = PretrainedLoss.error

    def checked(
        loss: PretrainedLoss, output: Tensor, sample: Any, weight: Any, batch: dict[str, Any]
    ) -> Tensor:
        found = error(loss, output, sample, weight, batch)
        squares = (output - sample.velocity).detach().double().pow(2).numpy()
        cells = squares.shape[-1]
        rows = []
        for square, mask, has in zip(
            squares, batch["masks"].numpy(), batch["has_mask"].tolist(), strict=True
        ):
            rows.append((square * (factors(mask[0], cells, OUTSIDE) if has else 1.0)).mean())
        torch.testing.assert_close(found.detach().double(), torch.tensor(rows), rtol=1e-5, atol=0.0)
        if loss.training:
            expected.append(float(np.mean(rows)))
        return found

    monkeypatch.setattr(PretrainedLoss, "error", checked)
    line = [masked, "-o", tmp_path / "run", *base_flags(NAME, pretrained(NAME)), *QUICK, "--lora-rank", 2]
    said = call(cache, *line, "--max-train-steps", 3, "--train-batch-size", 4, "--outside-mask", OUTSIDE)
    assert "3 masks in files beside the images" in said
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4) and len(expected) == 3


def test_images_without_masks_and_runs_that_do_not_want_them_count_plainly(
    masked: Path, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(masked, plain, ignore=shutil.ignore_patterns("*-mask.png"))
    found = []
    for number, (data, flags) in enumerate(
        [(plain, []), (masked, ["--masks", "none"]), (masked, ["--outside-mask", 1]), (masked, [])]
    ):
        run = tmp_path / f"run{number}"
        line = [data, "-o", run, *base_flags(NAME, pretrained(NAME)), *QUICK, "--lora-rank", 2, *flags]
        call(cache, *line, "--max-train-steps", 2, "--train-batch-size", 4)
        found.append(losses(run))
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-4)
    assert found[3] != pytest.approx(found[0], rel=1e-4)


def test_with_the_factor_0_nothing_is_learnt_from_outside(
    masked: Path,
    pretrained: Callable[[str], Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the network's output, cell by cell; a mask that is all black leaves nothing at all."""
    seen = 0
    error = PretrainedLoss.error

    def checked(
        loss: PretrainedLoss, output: Tensor, sample: Any, weight: Any, batch: dict[str, Any]
    ) -> Tensor:
        nonlocal seen
        if loss.training:
            leaf = output.detach().requires_grad_(True)
            error(loss, leaf, sample, weight, batch).sum().backward()
            gradient = leaf.grad.abs().sum(1)
            cells = gradient.shape[-1]
            for row, mask, has in zip(gradient, batch["masks"], batch["has_mask"], strict=True):
                inside = torch.nn.functional.max_pool2d(mask.float(), 16 // cells)[0] > 0
                assert torch.equal(row > 0, inside if has else torch.ones_like(inside))
                seen += 1
        return error(loss, output, sample, weight, batch)

    monkeypatch.setattr(PretrainedLoss, "error", checked)
    line = [masked, "-o", tmp_path / "run", *base_flags(NAME, pretrained(NAME)), *QUICK, "--lora-rank", 2]
    call(cache, *line, "--max-train-steps", 1, "--train-batch-size", 4, "--outside-mask", 0)
    assert seen == 4
