"""The loss of pretrained models against the formulas of diffusers' training programs, written out."""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentflow.config import FlowConfig
from latentflow.families import FAMILIES
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_pretrained import each_family, opened, rows_of, seeded
from .tiny import TINY, checkpoint

PLAIN = FlowConfig(condition_dropout=0.0)


def batch_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the model and a batch of two images."""
    _, model, tiny = opened(name)
    images = torch.rand(2, 3, tiny.side, tiny.side, generator=seeded(3)) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
    noise = torch.randn(latents.shape, generator=seeded(4))
    batch = {"latents": latents, "noise": noise, **in_batch(rows_of(name)), "sample_ids": [5, 6]}
    return model, batch


def official(name: str, model: Any, batch: dict[str, Any], t: Tensor) -> Tensor:
    """Return the loss in diffusers' terms: the noise level sigma or the timestep, and their targets."""
    x0, noise = batch["latents"], batch["noise"]
    velocity = model.velocity(rows_of(name), guidance_scale=model.unguided)
    sigma = (1.0 - t).float().view(-1, 1, 1, 1)
    state = (1.0 - sigma) * x0 + sigma * noise
    predicted = -velocity(state, t.float())  # of noise - x0
    if "beta_start" not in TINY[name].scheduler:
        return ((predicted - (noise - x0)) ** 2).mean()
    # alpha and s of a timestep of the scheduler; the network sees alpha x0 + s noise
    cumulative = model.pipeline.scheduler.alphas_cumprod
    steps = ((cumulative.double() / (1 - cumulative.double())).sqrt()[:, None] - t / (1 - t)).abs().argmin(0)
    alpha, s = (value[steps].view(-1, 1, 1, 1) for value in (cumulative.sqrt(), (1 - cumulative).sqrt()))
    data = state - sigma * predicted  # what the prediction says of the data
    seen = alpha * x0 + s * noise
    epsilon = (seen - alpha * data) / s
    if model.pipeline.scheduler.config.prediction_type == "epsilon":
        return ((epsilon - noise) ** 2).mean()
    return ((alpha * epsilon - s * data - (alpha * noise - s * x0)) ** 2).mean()


@each_family
def test_the_loss_and_its_gradient_are_the_official_ones(name: str) -> None:
    model, batch = batch_of(name)
    loss = PretrainedLoss(model, PLAIN, seed=1)
    weights = [weight for weight in model.network.parameters() if weight.ndim > 1][:6]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            made = loss(batch)
            ours = torch.autograd.grad(made["loss"], weights, allow_unused=True)
            expected = official(name, model, batch, made["t"])
            theirs = torch.autograd.grad(expected, weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
    torch.testing.assert_close(made["loss"], expected, rtol=1e-6, atol=0.0)
    assert any(part is not None and part.abs().max() > 0 for part in ours)
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert float((own - other).norm()) <= 5e-6 * float(other.norm()) + 1e-9


def quantiles(model: Any, size: tuple[int, int]) -> list[float]:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return [float(value) for value in 1.0 - model.training_density(*size).quantile(u)]


def test_times_are_those_of_each_family_s_training() -> None:
    """Noise levels at three quantiles, from the shifts that the families' configs have."""

    def shifted(sigma: float, shift: float) -> float:
        return shift * sigma / (1.0 + (shift - 1.0) * sigma)

    def logistic(value: float) -> float:
        return 1.0 / (1.0 + math.exp(-value))

    normal = [1.2815515655446004, 0.0, -1.2815515655446004]
    for name, expected in {
        "StableDiffusion3Pipeline": [shifted(logistic(z), 3.0) for z in normal],
        "ZImagePipeline": [shifted(s, 3.0) for s in (0.9, 0.5, 0.1)],
    }.items():
        pipe = copy(checkpoint(name))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        model = FAMILIES[name](pipe)
        assert quantiles(model, (64, 64)) == pytest.approx(expected, abs=1e-9), name
    pipe = copy(checkpoint("FluxPipeline"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    model = FAMILIES["FluxPipeline"](pipe)
    tokens = model.tokens(128, 128)
    shift = math.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256))
    expected = [shifted(logistic(z), shift) for z in normal]
    assert quantiles(model, (128, 128)) == pytest.approx(expected, abs=1e-9)


def test_times_of_diffusion_models_are_those_of_their_table() -> None:
    _, model, _ = opened("StableDiffusionPipeline")
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    times = model.training_density(16, 16).quantile(u)
    assert torch.equal(times, model.table[0])


def test_dropped_rows_are_the_empty_prompt() -> None:
    model, batch = batch_of("StableDiffusion3Pipeline")
    loss = PretrainedLoss(model, PLAIN, seed=1)
    rows = loss.prompts(batch, torch.tensor([True, False]))
    null = model.null(1)
    length = null.values["embeds"].shape[1]
    assert torch.equal(rows.values["embeds"][:1, :length], null.values["embeds"])
    assert torch.equal(rows.values["pooled"][0], null.values["pooled"][0])
    assert torch.equal(rows.values["pooled"][1], batch["rows.pooled"][1])
