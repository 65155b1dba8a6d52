"""Checkpoints of average velocities: exact in any number of steps, and themselves in every pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from latentflow import (
    LatentFlowEditPipeline,
    LatentFlowImg2ImgPipeline,
    LatentFlowInpaintPipeline,
    LatentFlowPipeline,
)
from latentflow.autoencoder import mask_channels
from latentflow.errors import UserError
from latentflow.models import Condition

from .conftest import NAMES, GaussianFlow, quiet, tiny_dit, tiny_vae


class AverageGaussianFlow(GaussianFlow):
    """The exact average velocity of the Gaussian; without an end its velocity."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: int = 4, num_classes: int | None = None) -> None:
        GaussianFlow.__init__(self, in_channels, sample_size, num_classes)
        self.ends: list[float | None] = []

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, cond: Condition | None = None, *, end: Tensor | None = None
    ) -> Tensor:
        self.ends.append(None if end is None else round(float(end.flatten()[0]), 6))
        if end is None or bool((end == t).all()):
            return super().forward(x, t, cond)
        m, r, s = self.mean(cond, len(x))[:, :, None, None], t.view(-1, 1, 1, 1), end.view(-1, 1, 1, 1)
        ratio = (self.variance(s) / self.variance(r)).sqrt()
        return (s * m + ratio * (x - r * m) - x) / (s - r)

    def variance(self, t: Tensor) -> Tensor:
        return (t * self.SPREAD) ** 2 + (1 - t) ** 2


def pipeline(**more: Any) -> LatentFlowPipeline:
    network = AverageGaussianFlow(num_classes=3)
    return quiet(LatentFlowPipeline(tiny_vae(), network, id2label=NAMES, average=True, **more))


def noise(rows: int = 2) -> Tensor:
    return torch.randn(rows, 2, 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("steps", [1, 2, 3, None])
def test_any_number_of_steps_is_exact(steps: int | None) -> None:
    pipe, x0 = pipeline(), noise()
    labels = ["apple", "tree"]
    drawn = pipe(
        class_labels=labels, latents=x0, guidance_scale=1.0, num_inference_steps=steps, output_type="latent"
    )
    torch.testing.assert_close(
        drawn.images, pipe.transformer.end(pipe.transformer.means[[0, 2]], x0).detach()
    )
    count = steps or 4
    assert pipe.transformer.ends == [round((k + 1) / count, 6) for k in range(count)]
    # Nothing of the call stays: what asks for the velocity afterwards gets it.
    pipe.model.velocity(pipe.model.null(len(x0)))(x0, torch.tensor(0.5))
    assert pipe.transformer.ends[-1] is None


def test_a_solver_or_a_scheduler_follows_the_velocity() -> None:
    pipe, x0 = pipeline(), noise(1)
    pipe(class_labels="hat", latents=x0, guidance_scale=1.0, num_inference_steps=3, solver="euler")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe(class_labels="hat", latents=x0, guidance_scale=1.0, num_inference_steps=3)
    assert pipe.transformer.ends == [None] * 6
    assert pipe.usual_steps == 20


def test_image_to_image_starts_where_it_is_told() -> None:
    given = pipeline()
    pipe = quiet(LatentFlowImg2ImgPipeline.from_pipe(given, transformer=given.transformer))
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = pipe(
        class_labels="hat",
        image=image,
        strength=0.6,
        latents=noise(1),
        guidance_scale=1.0,
        output_type="latent",
    ).images
    assert pipe.few_steps.average and pipe.transformer.ends == [0.5, 0.75, 1.0]
    start = 0.4 * pipe.encode_images(2.0 * image - 1.0) + 0.6 * noise(1)
    expected = pipe.transformer.end_from(pipe.transformer.means[[1]], start, 0.4)
    torch.testing.assert_close(drawn, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "masked", "expected"),
    [(None, True, [0.25, 0.5, 0.75, 1.0]), ("repaint", True, [None]), (None, False, [None])],
)
def test_inpainting_leaps_where_masks_were_trained(
    method: str | None, masked: bool, expected: list[float | None]
) -> None:
    """Without being told; the methods that steer a velocity are given one, in the usual number of steps."""
    vae = tiny_vae()
    network = tiny_dit(interval_conditioning=True, condition_channels=mask_channels(vae) if masked else 0)
    pipe = quiet(LatentFlowInpaintPipeline(vae, network, average=True))
    ends: list[float | None] = []

    def see(_: Any, given: Any, named: dict[str, Any]) -> None:
        ends.append(float(named["end"][0]) if "end" in named else None)

    network.register_forward_pre_hook(see, with_kwargs=True)
    image, mask = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe(image=image, mask_image=(mask[:, :1] > 0.5).float(), method=method, output_type="latent")
    assert ends == (expected if len(expected) > 1 else [None] * len(ends)) and len(ends) >= len(expected)
    assert len(expected) > 1 or pipe.num_timesteps == 20


def test_learned_guidance_is_not_added_to(caplog: pytest.LogCaptureFixture) -> None:
    pipe, x0 = pipeline(folded_guidance=3.0), noise(1)
    with caplog.at_level(logging.WARNING):
        asked = {"class_labels": "hat", "latents": x0, "output_type": "latent"}
        plain = [pipe(**asked, guidance_scale=scale).images for scale in (None, 1.0, 3.0)]
        assert not caplog.records
        warned = pipe(**asked, guidance_scale=7.0).images
    assert "guidance_scale 7 is ignored" in caplog.text
    assert all(torch.equal(warned, images) for images in plain)
    assert {rows for rows, _, _ in pipe.transformer.calls} <= {1}  # never a doubled batch
    editor = quiet(LatentFlowEditPipeline.from_pipe(pipe, transformer=pipe.transformer))
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    editor(image=image, class_labels="tree", source_class_labels="hat", num_inference_steps=2)
    assert pipe.usual_guidance == 1.0 and editor.guidance_scale == 1.0
    caplog.clear()
    editor.interpolate(class_labels=["hat", "tree"], frames=2, num_inference_steps=1)
    assert not caplog.records  # nobody asked for a scale


def test_a_checkpoint_has_a_guidance_scale_of_its_own(tmp_path: Path) -> None:
    pipe, asked = (
        pipeline(usual_guidance=2.0),
        {"class_labels": "hat", "latents": noise(1), "output_type": "latent"},
    )
    usual, two, four = (pipe(**asked, guidance_scale=scale).images for scale in (None, 2.0, 4.0))
    assert torch.equal(usual, two) and not torch.equal(usual, four)
    LatentFlowPipeline(tiny_vae(), tiny_dit(), usual_guidance=2.0).save_pretrained(tmp_path)
    read = LatentFlowPipeline.from_pretrained(tmp_path)
    assert read.usual_guidance == LatentFlowEditPipeline.from_pipe(read).usual_guidance == 2.0


def test_other_checkpoints_take_their_guidance_and_stay_as_they_are(class_pipe: LatentFlowPipeline) -> None:
    assert class_pipe.usual_guidance == 4.0 and class_pipe.usual_steps == 16
    assert not {"average", "folded_guidance"} & set(class_pipe.config)
    asked = {"class_labels": "hat", "latents": noise(1), "output_type": "latent"}
    usual = class_pipe(**asked).images
    assert torch.equal(usual, class_pipe(**asked, num_inference_steps=16, guidance_scale=4.0).images)


def test_what_it_is_survives_saving(tmp_path: Path) -> None:
    network = tiny_dit(interval_conditioning=True)
    LatentFlowPipeline(tiny_vae(), network, average=True, folded_guidance=2.5).save_pretrained(tmp_path)
    read = quiet(LatentFlowPipeline.from_pretrained(tmp_path))
    assert read.few_steps.average and read.config.folded_guidance == 2.5
    x0 = noise(1)
    drawn = read(latents=x0, num_inference_steps=1, output_type="latent").images
    with torch.no_grad():
        torch.testing.assert_close(drawn, x0 + network(x0, 0.0, end=1.0))
    with pytest.raises(UserError, match="average velocities with prediction data"):
        LatentFlowPipeline(tiny_vae(), network, average=True, prediction="data")
