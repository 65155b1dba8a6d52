"""Families of consistency models, held against their stock pipelines; what they cannot do is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from latentflow import (
    LatentFlowEditPipeline,
    LatentFlowImg2ImgPipeline,
    LatentFlowInpaintPipeline,
    LatentFlowPipeline,
)
from latentflow.errors import UserError
from latentflow.families import FAMILIES, SIBLINGS
from latentflow.flow import INPAINTING, integrate
from latentflow.inference.sample import model_capabilities

from .test_pretrained import PROMPTS, seeded
from .tiny import CONSISTENCY, Tiny, checkpoint

pytestmark = pytest.mark.usefixtures("no_grad")

SPRINT, LATENT = "SanaSprintPipeline", "LatentConsistencyModelPipeline"
each_family = pytest.mark.parametrize("name", CONSISTENCY)


@cache
def opened(name: str) -> tuple[Any, Any, Tiny]:
    """Return the stock pipeline, the flow model that shares it, and how they are called."""
    tiny, pipe = CONSISTENCY[name], checkpoint(name)
    return pipe, FAMILIES[name](pipe, **tiny.call), tiny


def over(kind: Any, name: str) -> Any:
    pipe = kind(opened(name)[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size(name: str) -> dict[str, int]:
    return {"height": opened(name)[2].side, "width": opened(name)[2].side}


def stock_call(name: str, steps: int) -> dict[str, Any]:
    """Return the options with which the stock pipeline takes ``steps`` steps: Sana Sprint has a time for two alone."""
    call = {"num_inference_steps": steps, **CONSISTENCY[name].call}
    return {**call, "intermediate_timesteps": None} if name == SPRINT and steps != 2 else call


def random_image(name: str) -> Tensor:
    side = opened(name)[2].side
    return torch.rand(1, 3, side, side, generator=seeded(5))


# ---------------------------------------------------------------- as the stock pipeline


@each_family
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("solver", [None, "scheduler"])
def test_it_draws_what_the_stock_pipeline_does(name: str, steps: int, solver: str | None) -> None:
    """With the same noise at the start and between the steps, at the family's own guidance and at another."""
    stock, ours = opened(name)[0], over(LatentFlowPipeline, name)
    for guidance in ({}, {"guidance_scale": 2.0}):
        both: dict[str, Any] = {**size(name), **guidance, "prompt": PROMPTS}
        for kind, tolerance in (("latent", 5e-6), ("pt", 1e-5)):
            theirs = stock(
                **both, **stock_call(name, steps), generator=[seeded(0), seeded(1)], output_type=kind
            ).images
            mine = ours(
                **both, num_inference_steps=steps, solver=solver, generator=[seeded(0), seeded(1)],
                output_type=kind,
            ).images  # fmt: skip
            assert theirs.std() > 0.05, "a flat image hides differences"
            scale = float(theirs.abs().max()) if kind == "latent" else 1.0
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=tolerance * scale)


@each_family
def test_what_is_wrong_is_seen(name: str) -> None:
    """The comparison would fail with the other sign, with reversed time, with other prompts and other guidance."""
    _, model, tiny = opened(name)
    times, rows = model.time_grid(4, tiny.side, tiny.side), model.encode_prompt(PROMPTS)
    noise = model.begin(model.noise(2, tiny.side, tiny.side, seeded()), times)

    def drawn(velocity: Any) -> Tensor:
        return integrate(velocity, noise, times, model.usual_solver, generator=seeded(1))

    right = model.velocity(rows, times=times)
    wrong = {
        "sign": lambda x, t: -right(x, t),
        "time": lambda x, t: right(x, (1.0 - t).clamp(max=0.99)),
        "prompt": model.velocity(rows[[1, 0]], times=times),
        "guidance": model.velocity(rows, 1.5, times=times),
    }
    expected = drawn(right)
    for what, velocity in wrong.items():
        assert (drawn(velocity) - expected).abs().max() > 1e-3 * expected.abs().max(), what


@each_family
@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_image_to_image(name: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours begins at t = 1 - strength, and is given the stock pipeline's time and steps.

    The stock pipeline draws a sample of the autoencoder's posterior, ours takes its mean.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    stock, model, _ = opened(name)
    sibling = next(one for one, base in SIBLINGS.items() if base == name)
    pipe = getattr(diffusers, sibling)(**stock.components)
    pipe.set_progress_bar_config(disable=True)
    image, steps = random_image(name), 4
    sized = size(name) if name == SPRINT else {}
    theirs = pipe(
        prompt=PROMPTS[0], image=image, strength=strength, generator=seeded(), output_type="pt", **sized,
        **stock_call(name, steps),
    ).images  # fmt: skip
    if name == SPRINT:
        times = model.time_grid(steps, 32, 32)[int(steps - steps * strength) :]
    else:  # whose grid of four steps begins at the strength
        scheduler = copy(stock.scheduler)
        scheduler.set_timesteps(steps, strength=strength)
        times = torch.cat([model.time_of(scheduler.timesteps), torch.ones(1, dtype=torch.float64)])
    ours = over(LatentFlowImg2ImgPipeline, name)(
        PROMPTS[0], image=image, strength=1.0 - float(times[0]), sigmas=(1.0 - times[:-1]).tolist(),
        generator=seeded(), output_type="pt",
    ).images  # fmt: skip
    assert theirs.std() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@each_family
def test_a_row_is_what_it_is_alone(name: str) -> None:
    """Prompts of different lengths in one batch do not see each other, nor each other's noise."""
    pipe = over(LatentFlowPipeline, name)
    call = {**size(name), "num_inference_steps": 3, "output_type": "latent"}
    both = pipe(PROMPTS, generator=[seeded(0), seeded(1)], **call).images
    for row, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, generator=seeded(row), **call).images
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0.0, atol=3e-6 * float(alone.abs().max()))


@each_family
def test_it_computes_in_half_precision(name: str) -> None:
    pipe, model, tiny = opened(name)
    half = type(model)(deepcopy(pipe).to(dtype=torch.bfloat16), **tiny.call)
    times = model.time_grid(4, tiny.side, tiny.side)
    x = model.begin(model.noise(2, tiny.side, tiny.side, seeded()), times)
    v = half.velocity(half.encode_prompt(PROMPTS), times=times)(x, times[1].float())
    expected = model.velocity(model.encode_prompt(PROMPTS), times=times)(x, times[1].float())
    assert v.dtype == torch.float32
    assert float((v - expected).norm() / expected.norm()) < 0.3


# ---------------------------------------------------------------- what else it can do


@each_family
def test_kept_pixels_are_kept(name: str) -> None:
    image = random_image(name)
    mask = torch.zeros_like(image[:, :1])
    mask[..., 1:9, 3:-3] = 1.0
    kept = (mask == 0).expand_as(image)
    for strength in (0.4, 1.0):
        filled = over(LatentFlowInpaintPipeline, name)(
            PROMPTS[0], image=image, mask_image=mask, strength=strength, generator=seeded(), output_type="pt"
        ).images
        assert torch.equal(filled[kept], image[kept]) and not torch.equal(filled, image)


@each_family
def test_a_hole_everywhere_is_drawn_as_an_image(name: str) -> None:
    """Inpainting takes the steps of the model itself, with the known values in place of what it predicts."""
    image, call = random_image(name), {"output_type": "latent", "num_inference_steps": 3}
    filled = over(LatentFlowInpaintPipeline, name)(
        PROMPTS[0], image=image, mask_image=torch.ones_like(image[:, :1]), generator=seeded(), **call
    ).images
    drawn = over(LatentFlowPipeline, name)(PROMPTS[0], **size(name), generator=seeded(), **call).images
    torch.testing.assert_close(filled, drawn, rtol=0.0, atol=3e-6 * float(drawn.abs().max()))


@each_family
def test_its_usual_settings(name: str) -> None:
    """The number of steps is the model's own in every call; the page offers its guidance, and no negative prompts."""
    steps, guidance = {SPRINT: (2, 4.5), LATENT: (4, 8.5)}[name]
    model, image = opened(name)[1], random_image(name)
    assert (model.usual_steps, model.usual_guidance) == (steps, guidance)
    assert model.distilled.certain and model.distilled.steps == steps
    offered = model_capabilities(model)
    assert (offered.steps, offered.guidance, offered.negative) == (steps, guidance, False)
    assert (offered.edit_guidance, offered.edit_strength, offered.edits_as_it_draws) == (guidance, 0.6, True)
    seen: list[int] = []

    def after_step(pipe: Any, i: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        seen.append(i)
        return {}

    call: dict[str, Any] = {"callback_on_step_end": after_step, "output_type": "latent"}
    over(LatentFlowPipeline, name)(PROMPTS[0], **size(name), **call)
    assert len(seen) == steps
    mask = torch.ones_like(image[:, :1])
    over(LatentFlowInpaintPipeline, name)(PROMPTS[0], image=image, mask_image=mask, **call)
    assert len(seen) == 2 * steps


# ---------------------------------------------------------------- what it cannot do


@each_family
def test_what_follows_a_velocity_is_refused(name: str) -> None:
    model = opened(name)[1]
    image, call = random_image(name), {"num_inference_steps": 2}
    mask = torch.ones_like(image[:, :1])
    draw, fill, edit = (
        over(kind, name) for kind in (LatentFlowPipeline, LatentFlowInpaintPipeline, LatentFlowEditPipeline)
    )
    refused: dict[str, Callable[[], Any]] = {
        "velocity": lambda: model.velocity(model.encode_prompt(PROMPTS)),
        "solver": lambda: draw(PROMPTS[0], **size(name), **call, solver="heun"),
        "flowedit": lambda: edit(PROMPTS[0], image=image, source_prompt=PROMPTS[1], **call),
        "direct": lambda: edit(PROMPTS[0], image=image, method="direct", **call),
        "invert": lambda: edit.invert(image, PROMPTS[0], **call),
        "reference": lambda: edit(PROMPTS[0], image=image, method="reference", **call),
        "trained": lambda: fill(PROMPTS[0], image=image, mask_image=mask, method="trained", **call),
        "solver of a hole": lambda: fill(PROMPTS[0], image=image, mask_image=mask, solver="heun", **call),
        "interpolate": lambda: edit.interpolate(PROMPTS, frames=2, **size(name), **call),
    }
    for method in INPAINTING.keys() - {"pnp-flow"}:
        refused[method] = lambda method=method: fill(  # type: ignore[misc]
            PROMPTS[0], image=image, mask_image=mask, method=method, **call
        )
    for what, asked in refused.items():
        with pytest.raises(UserError, match=r"is a consistency model: (.|\n)*pnp-flow"):
            asked()
            raise AssertionError(what)


def test_other_bad_input() -> None:
    for name, most in ((LATENT, 50), (SPRINT, 1000)):
        pipe = over(LatentFlowPipeline, name)
        with pytest.raises(
            UserError, match=f"{most + 1} steps of a consistency model\nIts scheduler has {most}"
        ):
            pipe(PROMPTS[0], num_inference_steps=most + 1, **size(name))
        with pytest.raises(UserError, match="has no negative prompts"):
            pipe(PROMPTS[0], negative_prompt="a hat", **size(name))
        with pytest.raises(UserError, match="guidance scale as an input"):
            pipe(PROMPTS[0], guidance_interval=(0.2, 0.8), **size(name))
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(UserError, match="is a consistency model"):
            pipe(PROMPTS[0], **size(name))


def test_a_folder_of_another_model_says_what_it_is() -> None:
    pipe = copy(checkpoint(LATENT))
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler, which knows no consistency model\nPut LCMScheduler"):
        FAMILIES[LATENT](pipe)
    unet = diffusers.UNet2DConditionModel.from_config(
        {**checkpoint(LATENT).unet.config, "time_cond_proj_dim": None}
    )
    with pytest.raises(UserError, match="no input for the guidance scale"):
        FAMILIES[LATENT](type(pipe)(**{**checkpoint(LATENT).components, "unet": unet}))


# ---------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny checkpoint, and an image and a mask beside it, once."""
    root = tmp_path_factory.mktemp("consistency")

    def saved(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            checkpoint(name).save_pretrained(folder)
            side = opened(name)[2].side
            pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            mask = np.zeros((side, side), np.uint8)
            mask[2:9, 3:10] = 255
            Image.fromarray(pixels).save(folder / "a.png")
            Image.fromarray(mask).save(folder / "mask.png")
        return folder

    return saved


def flags(name: str, folder: Path) -> list[str]:
    options = [f"{key}={json.dumps(value)}" for key, value in CONSISTENCY[name].call.items()]
    return ["--checkpoint", str(folder), *(["--family-options", *options] if options else [])]


@each_family
def test_programs(
    name: str, folders: Callable[[str], Path], load_program: Callable[[str], Any], tmp_path: Path
) -> None:
    """They draw and inpaint with the model's own steps, and say in one sentence what they cannot do."""
    folder, out = folders(name), tmp_path / "out.png"
    common = flags(name, folder)
    side = str(opened(name)[2].side)
    generate = ["red apple", "--height", side, "--width", side, "-o", str(out), *common]
    load_program("generate").main(generate)
    assert Image.open(out).size == (int(side), int(side))
    with pytest.raises(UserError, match="is a consistency model"):
        load_program("generate").main([*generate, "--solver", "heun", "--overwrite"])
    images = [str(folder / "a.png"), str(folder / "mask.png")]
    load_program("inpaint").main([*images, "red apple", "-o", str(tmp_path / "filled.png"), *common])
    filled, given, mask = (np.array(Image.open(file)) for file in (tmp_path / "filled.png", *images))
    assert np.array_equal(filled[mask == 0], given[mask == 0]) and not np.array_equal(filled, given)
    with pytest.raises(UserError, match="is a consistency model"):
        load_program("edit").main(
            [images[0], "red apple", "--from", "green hat", "-o", str(tmp_path / "edited.png"), *common]
        )
    with pytest.raises(UserError, match="is a consistency model"):
        load_program("interpolate").main(
            ["--images", images[0], images[0], "red apple", "-o", str(tmp_path / "way.png"), *common]
        )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == SPRINT else name  # it draws 1024 px
        for name in CONSISTENCY
    ],
)
def test_evaluate(
    name: str,
    folders: Callable[[str], Path],
    load_program: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All figures are measured, but the loss of a velocity."""
    side, data = opened(name)[2].side, tmp_path / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"red apple {number}")
    line = [str(folders(name)), str(data), "-n", "4", "--validation", "0.25", "--features", "pixels-16"]
    line += ["-o", str(tmp_path / "report.json"), *flags(name, folders(name))[2:]]
    load_program("evaluate").main(line)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["validation_loss"]["held_out"]["value"] is None and report["reconstruction"]
    assert "unknown (a consistency model has no velocity)" in " ".join(capsys.readouterr().out.split())


def test_the_options_of_sana_sprint_are_its_own() -> None:
    """Other times of the grid are the stock pipeline's, and others than the usual."""
    stock, _, tiny = opened(SPRINT)
    angles = {"max_timesteps": 1.5, "intermediate_timesteps": 1.1}
    assert angles.keys() <= inspect.signature(type(stock).__call__).parameters.keys()
    pipe = LatentFlowPipeline(FAMILIES[SPRINT](stock, **tiny.call, **angles))
    pipe.set_progress_bar_config(disable=True)
    call = {**size(SPRINT), "prompt": PROMPTS[0], "output_type": "latent"}
    theirs = stock(**call, **tiny.call, **angles, generator=seeded()).images
    usual = stock(**call, **tiny.call, generator=seeded()).images
    assert (usual - theirs).abs().max() > 1e-2
    begins = float(pipe.model.time_grid(2, 32, 32)[0])
    assert begins == pytest.approx(1.0 / (1.0 + np.tan(1.5)))
    torch.testing.assert_close(
        pipe(**call, generator=seeded()).images, theirs, rtol=0.0, atol=1e-5 * float(theirs.abs().max())
    )
