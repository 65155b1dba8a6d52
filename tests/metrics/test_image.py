"""PSNR and SSIM against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from latentflow.metrics import psnr, ssim


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    originals = torch.rand(3, 3, 16, 16) - 0.5
    errors = torch.tensor([0.2, 0.02, 0.002])
    shifted = originals + errors[:, None, None, None]
    # On a scale of 1 the error is half of what it is on [-1, 1].
    expected = torch.tensor([-20 * math.log10(e / 2) for e in errors.tolist()])
    torch.testing.assert_close(psnr(shifted, originals), expected, atol=1e-2, rtol=0)


def test_exact_copies_are_perfect_and_values_outside_are_clipped() -> None:
    originals = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.isinf(psnr(originals, originals)).all()
    torch.testing.assert_close(ssim(originals, originals), torch.ones(2))
    white = torch.ones(1, 3, 16, 16)
    assert torch.isinf(psnr(white * 3, white)).all()


def test_ssim_is_per_image_and_falls_with_noise() -> None:
    originals = torch.linspace(-1, 1, 32).expand(3, 3, 32, 32)
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.0, 0.1, 0.5])[:, None, None, None]
    values = ssim(originals + levels * noise, originals)
    assert values.shape == (3,)
    assert values[0] > values[1] > values[2]


def test_ssim_of_two_flat_images_is_its_luminance_term() -> None:
    # Without texture only (2 a b + C1) / (a^2 + b^2 + C1) is left, C1 = 0.01^2, on a scale of [0, 1].
    a, b = 0.25, 0.75
    flat = [torch.full((1, 3, 16, 16), 2 * value - 1) for value in (a, b)]
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    torch.testing.assert_close(ssim(*flat), torch.tensor([expected]), atol=1e-3, rtol=0)


def test_ssim_needs_its_window() -> None:
    assert ssim(torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 11)).isfinite().all()
    with pytest.raises(ValueError, match="11-pixel window"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
