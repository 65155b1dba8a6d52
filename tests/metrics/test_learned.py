"""FID's wiring, with a network of our own in Inception's place."""

from __future__ import annotations

import pytest
import torch

from latentflow.metrics import frechet_distance, learned


class Levels(torch.nn.Module):
    """uint8 images -> mean of each channel."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.double().mean((2, 3))


def test_fid_of_several_sets_is_the_frechet_distance_of_their_features() -> None:
    generator = torch.Generator().manual_seed(0)
    generated, beside, real, others = (
        torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1 for n in (30, 20, 40, 9)
    )
    metric = learned.open_fid(Levels())
    levels = [
        Levels()(((images + 1) * 127.5).round().to(torch.uint8))
        for images in (generated, beside, real, others)
    ]
    for reference, features in ((real, levels[2]), (others, levels[3])):  # a metric holds nothing of before
        values = learned.inception_fid(metric, [generated, beside], reference, batch_size=7)
        assert values == pytest.approx([frechet_distance(one, features) for one in levels[:2]], rel=1e-4)
