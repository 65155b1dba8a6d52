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


def test_fid_is_the_frechet_distance_of_its_features() -> None:
    pytest.importorskip("torch_fidelity", reason='needs pip install -e ".[metrics]"')
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.rand(30, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    real = real * 0.5
    value = learned.inception_fid(generated, real, batch_size=7, network=Levels())
    levels = [Levels()(((images + 1) * 127.5).round().to(torch.uint8)) for images in (generated, real)]
    assert value == pytest.approx(frechet_distance(*levels), rel=1e-4)
