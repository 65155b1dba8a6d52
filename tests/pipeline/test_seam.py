"""The seam of inpainting against closed forms, and through the pipeline with an autoencoder whose error is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline
from latentflow.pipeline.seam import _membrane, match_border

from .conftest import close, seeds

Images = Callable[..., Tensor]
#: masks in the middle, at two edges of the image, in two parts, and thin
HOLES = {
    "box": [(slice(8, 20), slice(9, 23))],
    "corner": [(slice(0, 12), slice(18, 32))],
    "two": [(slice(2, 9), slice(3, 9)), (slice(14, 24), slice(20, 30))],
    "thin": [(slice(11, 12), slice(4, 28))],
}


def hole(name: str, height: int = 24, width: int = 32) -> Tensor:
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    for part in HOLES[name]:
        mask[(..., *part)] = True
    return mask


def noise(seed: int, height: int = 24, width: int = 32) -> Tensor:
    """(1, 3, H, W) in [0.3, 0.7]."""
    return 0.3 + 0.4 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("depth", [0.5, 4.0, 64.0])
def test_a_constant_error_of_each_channel_is_removed(name: str, depth: float) -> None:
    image, error = noise(0), torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1)
    result = match_border(image - error, image, hole(name), depth)
    inside = hole(name).expand_as(image)
    close(result[inside], image[inside], 1e-6)
    assert torch.equal(result[~inside], (image - error)[~inside])


@pytest.mark.parametrize("name", HOLES)
def test_without_an_error_at_the_border_not_a_bit_changes(name: str) -> None:
    image = noise(0)
    drawn = torch.where(hole(name), noise(1), image)
    assert torch.equal(match_border(drawn, image, hole(name), 4.0), drawn)


@pytest.mark.parametrize("everywhere", [True, False])
def test_where_nothing_or_everything_is_kept_there_is_no_border(everywhere: bool) -> None:
    mask = torch.full((1, 1, 24, 32), everywhere)
    assert torch.equal(match_border(noise(1), noise(0), mask, 4.0), noise(1))


@pytest.mark.parametrize("depth", [2.0, 4.0, 8.0])
def test_a_difference_at_a_part_of_the_border_fades_with_the_distance(depth: float) -> None:
    """The left border differs by 0.4, which the median of all does not see: 0.4 exp(-i / depth) at pixel i."""
    image, mask = torch.full((1, 3, 16, 96), 0.5), torch.zeros(1, 1, 16, 96, dtype=torch.bool)
    mask[..., 1:80] = mask[..., 90:95] = True  # the borders are columns 0, 80, 89 and 95
    drawn = image.clone()
    drawn[..., 0] = 0.1
    shift = (match_border(drawn, image, mask, depth) - drawn)[..., 1:9]
    expected = 0.4 * torch.exp(-torch.arange(8.0) / depth).expand(1, 3, 16, 8)
    assert (shift <= expected + 1e-6).all()  # the membrane itself falls slowly, to 0 at the other border
    close(shift, expected, 0.06)


def test_the_membrane_goes_on_as_a_slope_between_its_ends() -> None:
    """x solves Laplace's equation: known all around, it is found inside, nearly."""
    slope = torch.linspace(-1.0, 1.0, 33).expand(1, 1, 33, 33)
    known = torch.zeros(1, 1, 33, 33)
    known[..., 0] = known[..., -1] = known[..., 0, :] = known[..., -1, :] = 1.0
    found = _membrane(slope * known, known)
    close(found, slope, 0.2)
    assert (found - slope).square().mean() < 0.05 * slope.square().mean()


def test_an_object_that_the_border_cuts_leaves_the_middle_alone() -> None:
    """A tenth of the border differs by 0.5: it is met there, and far from it what was drawn stays."""
    image, mask = torch.full((1, 3, 64, 64), 0.25), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 8:56, 8:56] = True
    drawn = image.clone()
    drawn[..., 20:40, 7:30] = 0.75
    result = match_border(drawn, image, mask, 4.0)
    assert (result - image)[..., 24:36, 8].abs().max() < 0.25 < 0.5 == (drawn - image)[..., 24:36, 8].max()
    close(result[..., 40:, 40:], image[..., 40:, 40:], 0.01)
    close(result[..., 28:32, 28:30], drawn[..., 28:32, 28:30], 0.02)


def test_the_result_stays_an_image() -> None:
    result = match_border(noise(1) + 0.25, noise(0) - 0.25, hole("box"), 4.0)
    assert result.min() == 0.0 and result.max() <= 1.0


# ------------------------------------------------------------------ through the pipeline


@pytest.fixture
def fill(
    inpaint_pipe: LatentFlowInpaintPipeline, images: Images, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Tensor]:
    """Inpaint a box, with an autoencoder that decodes everything to the image and an error: (B, 3, H, W)."""

    def filled(error: Tensor | float, mask: Tensor, crop: int | None = None, **options: Any) -> Tensor:
        image = 0.2 + 0.6 * images(1, *mask.shape[-2:])
        if crop is None:
            inside: Any = ...
        else:  # the crop that is as large as the network draws: 8 x 8
            inside = (..., slice(6, 14), slice(10, 18))
        monkeypatch.setattr(
            inpaint_pipe,
            "decode_latents",
            lambda latents: 2.0 * (image[inside] + error).repeat(len(latents), 1, 1, 1) - 1.0,
        )
        call = {"image": image, "mask_image": mask, "class_labels": 0, "num_inference_steps": 1}
        result: Tensor = inpaint_pipe(**call, padding_mask_crop=crop, output_type="pt", **options).images
        away = F.max_pool2d(
            (mask >= 0.5).float(), 2 * int(options.get("feather", 0)) + 1, 1, int(options.get("feather", 0))
        )
        kept = ((mask == 0.0) & (away == 0.0)).expand_as(result)
        assert torch.equal(result[kept], image.expand_as(result)[kept])
        return result - image

    return filled


def box(height: int = 20, width: int = 30) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., 8:12, 12:16] = 1.0
    return mask


@pytest.mark.parametrize("crop", [None, 2])
def test_an_autoencoder_s_error_in_colour_is_removed_unless_it_is_to_stay(
    fill: Callable[..., Tensor], crop: int | None
) -> None:
    close(fill(0.1, box(), crop), torch.zeros(1, 3, 20, 30), 1e-6)
    close(fill(0.1, box(), crop, seamless=False), (0.1 * box()).expand(1, 3, 20, 30), 1e-6)
    close(fill(0.0, box(), crop), torch.zeros(1, 3, 20, 30), 1e-6)


def test_a_soft_mask_is_matched_where_it_ends(fill: Callable[..., Tensor]) -> None:
    soft = box()
    soft[..., 7, 12:16] = 0.3
    close(fill(0.1, soft), torch.zeros(1, 3, 20, 30), 1e-6)
    close(fill(0.1, box(), feather=2), torch.zeros(1, 3, 20, 30), 1e-6)
    # Without a single kept pixel nothing is known to match.
    close(fill(0.1, box().clamp_min(0.25)), (0.1 * box().clamp_min(0.25)).expand(1, 3, 20, 30), 1e-6)


def test_each_image_of_a_batch_is_matched_by_itself(fill: Callable[..., Tensor]) -> None:
    error = 0.1 * torch.randn(1, 3, 20, 30, generator=torch.Generator().manual_seed(1))
    alone = fill(error, box(), generator=seeds(3)[0])
    assert alone.any()
    assert torch.equal(fill(error, box(), generator=seeds(3)[0]), alone)
    both = fill(error, box(), generator=seeds(3, 4), num_images_per_prompt=2)
    assert torch.equal(both[:1], alone) and torch.equal(both[1:], alone)  # what is decoded is the same here
