"""Every family of pretrained models, held against its stock pipeline on tiny random checkpoints of the real classes."""

from __future__ import annotations

import inspect
from copy import copy, deepcopy
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentflow.families import FAMILIES
from latentflow.families.diffusion import DiffusionModel
from latentflow.families.pretrained import PretrainedModel
from latentflow.flow import EDITING, INPAINTING, SOLVERS, integrate, time_grid

from .tiny import TINY, Tiny, checkpoint

pytestmark = pytest.mark.usefixtures("no_grad")

PROMPTS = ["a red apple", "big green tree over a small house"]
STEPS = 4
#: families whose guidance scale 0 is no guidance; elsewhere it is 1
FROM_ZERO = {"ZImagePipeline", "ZImageOmniPipeline", "Krea2Pipeline"}
each_family = pytest.mark.parametrize("name", TINY)
#: a network of each layout: convolutions, classes, plain latents, packed ones, packed ones of videos, linear attention
LAYOUTS = (
    "StableDiffusionPipeline", "DiTPipeline", "StableDiffusion3Pipeline", "FluxPipeline-dev", "QwenImagePipeline",
    "SanaPipeline",
)  # fmt: skip
#: for what all families do with the same code, on their velocity: beyond one of each layout they are slow
each_layout = pytest.mark.parametrize(
    "name", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in TINY]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def opened(name: str) -> tuple[Any, PretrainedModel, Tiny]:
    """Return the stock pipeline, the flow model that shares it, and how they are called."""
    tiny, pipe = TINY[name], checkpoint(name)
    family = FAMILIES[type(pipe).__name__]
    assert issubclass(family, PretrainedModel)
    return pipe, family(pipe, **tiny.call), tiny


def rows_of(name: str, prompts: list[str] = PROMPTS) -> Any:
    model = opened(name)[1]
    return model.encode_prompt(prompts) if model.takes_text else model.encode_class([1, 3][: len(prompts)])


def stock(name: str, prompts: list[str] = PROMPTS, pipe: Any = None, **options: Any) -> Tensor:
    """Return the stock pipeline's images (B, 3, H, W) in [0, 1]; CogView4's one by one, since it pads a batch.

    ``pipe`` is a pipeline with other weights, in the place of the tiny checkpoint's.
    """
    tiny = opened(name)[2]
    pipe = opened(name)[0] if pipe is None else pipe
    accepted = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt", **tiny.call, **options}
    if "height" in accepted:
        call |= {"height": tiny.side, "width": tiny.side}
    if "guider" in call:  # HunyuanImage's is a component
        pipe = copy(pipe)
        pipe.guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=call.pop("guider"))
    images = []
    for row, prompt in enumerate(prompts):
        asked: dict[str, Any] = {"class_labels": [[1, 3][row]]}
        if "prompt" in accepted:
            asked = {"prompt": prompt if "DreamLite" in name else [prompt]}
        drawn = pipe(generator=seeded(row), **asked, **call)
        images.append(drawn.image if "Kandinsky5" in name else drawn.images)
    return torch.cat(images)


def grid(name: str, steps: int = STEPS) -> Tensor:
    """Return the scheduler's own times; diffusion models end where DDIM does, with a rest of noise."""
    pipe, model, tiny = opened(name)
    times = model.time_grid(steps, tiny.side, tiny.side)
    if isinstance(model, DiffusionModel) and not pipe.scheduler.config.set_alpha_to_one:
        times = torch.cat([times[:-1], model.time_of(torch.zeros(1))])
    return times


def drawn(name: str, velocity: Any, times: Tensor, solver: str = "euler") -> Tensor:
    """Return latents (B, C, h, w) from the noise of `stock`."""
    _, model, tiny = opened(name)
    noise = model.noise(2, tiny.side, tiny.side, [seeded(0), seeded(1)])
    x1 = integrate(velocity, model.begin(noise, times), times, solver)
    return x1 / model._norm(times[-1]) if isinstance(model, DiffusionModel) else x1


def images(name: str, latents: Tensor) -> Tensor:
    return (opened(name)[1].decode(latents) / 2.0 + 0.5).clamp(0.0, 1.0)


def assert_near(value: Tensor, expected: Tensor, share: float = 3e-6) -> None:
    """Compare with a tolerance of a share of the largest value."""
    torch.testing.assert_close(
        value, expected, rtol=0.0, atol=share * float(expected.abs().max().clamp_min(1.0))
    )


def unguided(name: str) -> dict[str, Any]:
    """Return how the stock pipeline is called without guidance, the scale first."""
    model = opened(name)[1]
    if model.embeds_guidance:
        return {}
    if name == "Ideogram4Pipeline":
        return {"guidance_scale": 1.0, "guidance_schedule": None}
    if name == "HunyuanImagePipeline":
        return {"guider": 1.0}
    return {model.guidance_argument: 0.0 if name in FROM_ZERO else 1.0}


@each_family
@pytest.mark.parametrize("guided", [False, True])
def test_it_draws_what_the_stock_pipeline_does(name: str, guided: bool) -> None:
    """With Euler's method on the scheduler's own noise levels, without guidance and at the family's own."""
    model = opened(name)[1]
    options: dict[str, Any] = {} if guided else unguided(name)
    if guided and "QwenImage" in name:  # which guides only where there is a negative prompt
        options["negative_prompt"] = ""
    scale = None if guided else next(iter(options.values()), None)
    times = grid(name)
    ours = drawn(name, model.velocity(rows_of(name), scale, times=times), times)
    theirs = stock(name, **options)
    assert theirs.std() > 0.05, "a flat image hides differences"
    torch.testing.assert_close(images(name, ours), theirs, rtol=0.0, atol=1e-5)


@each_family
def test_what_is_wrong_is_seen(name: str) -> None:
    """The comparison would fail with the other sign, with reversed time, with other prompts and other guidance."""
    model = opened(name)[1]
    times, rows = grid(name), rows_of(name)
    off = next(iter(unguided(name).values()), None)
    right = model.velocity(rows, off)
    expected = drawn(name, right, times)
    wrong = {
        "sign": lambda x, t: -right(x, t),
        "time": lambda x, t: right(x, 1.0 - t),
        "prompt": model.velocity(rows[[1, 0]], off),
        "guidance": model.velocity(rows, 7.5)
        if model.true_guidance(model.guidance(7.5)) != 1.0 or model.embeds_guidance
        else None,
    }
    for what, velocity in wrong.items():
        if velocity is not None:
            assert (drawn(name, velocity, times) - expected).abs().max() > 1e-4, what


@each_family
def test_a_row_is_what_it_is_alone(name: str) -> None:
    """Prompts of different lengths in one batch do not see each other."""
    _, model, tiny = opened(name)
    times, side = grid(name), tiny.side
    both = drawn(name, model.velocity(rows_of(name)), times)
    noise = model.begin(model.noise(2, side, side, [seeded(0), seeded(1)]), times)
    for row, prompt in enumerate(PROMPTS):
        rows = model.encode_prompt([prompt]) if model.takes_text else model.encode_class([[1, 3][row]])
        alone = integrate(model.velocity(rows), noise[row : row + 1], times, "euler")
        if isinstance(model, DiffusionModel):
            alone = alone / model._norm(times[-1])
        assert_near(both[row : row + 1], alone, share=1e-5)


#: solvers of fixed steps that draw nothing
OF_ORDER = [
    "euler", "midpoint", "heun", "ralston", "adams-bashforth-2", "adams-bashforth-3", "dpm-solver++2m",
    "exponential-adams",
]  # fmt: skip


@each_layout
def test_every_solver_follows_the_velocity(name: str) -> None:
    """All solvers end somewhere; on the velocity of one time, which is smooth, fixed steps are of their order."""
    _, model, tiny = opened(name)
    velocity, times = model.velocity(rows_of(name)), model.time_grid(3, tiny.side, tiny.side)
    noise = model.begin(model.noise(2, tiny.side, tiny.side, seeded()), times)
    for solver in SOLVERS:
        rough = integrate(velocity, noise, times, solver, rtol=0.1, atol=0.1, generator=seeded())
        assert torch.isfinite(rough).all(), solver

    def still(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, torch.full_like(t, 0.5))

    def error(solver: str, steps: int) -> float:
        return float((integrate(still, noise, time_grid(steps) / 2, solver) - exact).norm())

    exact = integrate(still, noise, time_grid(16) / 2, "rk4")
    for solver in OF_ORDER:  # float32 hides how the errors of order 4 fall
        order = SOLVERS[solver].order
        assert error(solver, 4) > 0.55 * 2.0**order * error(solver, 8), solver
    assert error("rk4", 4) < 0.2 * error("midpoint", 4)


@each_layout
def test_every_inpainting_keeps_what_is_known(name: str) -> None:
    _, model, tiny = opened(name)
    velocity, times = model.velocity(rows_of(name)), model.time_grid(STEPS, tiny.side, tiny.side)
    known = model.encode(torch.rand(2, 3, tiny.side, tiny.side, generator=seeded()) * 2 - 1)
    mask = torch.zeros_like(known[:, :1])
    mask[..., : mask.shape[-1] // 2] = 1.0
    noise = model.begin(model.noise(2, tiny.side, tiny.side, seeded()), times)
    for method, fill in INPAINTING.items():
        filled = fill(velocity, noise, known, mask, times, generator=seeded())
        kept = mask.expand_as(known) == 0.0
        assert torch.isfinite(filled).all(), method
        assert torch.equal(filled[kept], known[kept]), method
        assert not torch.equal(filled, known), method


@each_layout
def test_an_edit_to_the_same_prompt_changes_nothing(name: str) -> None:
    _, model, tiny = opened(name)
    velocity = model.velocity(rows_of(name))
    latents = model.encode(torch.rand(2, 3, tiny.side, tiny.side, generator=seeded()) * 2 - 1)
    edited = EDITING["flowedit"](velocity, velocity, latents, grid(name), generator=seeded())
    assert_near(edited, latents, 5e-5)


@each_family
def test_images_come_back(name: str) -> None:
    """Latents of images have the shape of noise, and what they decode to is what the autoencoder alone makes."""
    _, model, tiny = opened(name)
    pixels = torch.rand(2, 3, tiny.side, tiny.side, generator=seeded()) * 2 - 1
    latents = model.encode(pixels)
    assert latents.shape == model.noise(2, tiny.side, tiny.side).shape
    vae, video = model.vae, pixels.ndim == 4 and "z_dim" in model.vae.config
    encoded = vae.encode(pixels.unsqueeze(2) if video else pixels)
    raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    alone = vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(
        model.decode(latents), alone.squeeze(2) if video else alone, rtol=1e-4, atol=1e-5
    )


@each_family
def test_it_computes_in_half_precision(name: str) -> None:
    """Networks take their times, scales and embeddings in the precision that they need."""
    pipe, _, tiny = opened(name)
    model = type(opened(name)[1])(deepcopy(pipe).to(dtype=torch.bfloat16), **tiny.call)
    for part, module in model.network.named_modules():  # as from_pretrained leaves them
        if part and part.rpartition(".")[2] in (model.network._keep_in_fp32_modules or []):
            module.float()
    rows = model.encode_prompt(PROMPTS) if model.takes_text else model.encode_class([1, 3])
    times = grid(name)
    x = model.begin(model.noise(2, tiny.side, tiny.side, seeded()), times)
    v = model.velocity(rows, times=times)(x, times[1].float())
    expected = opened(name)[1].velocity(rows_of(name), times=times)(x, times[1].float())
    assert v.dtype == torch.float32
    assert float((v - expected).norm() / expected.norm()) < 0.3


def test_one_step_with_a_terminal_noise_level() -> None:
    """The stock scheduler divides 0 by 0 there; the grid is from noise to data all the same."""
    _, model, tiny = opened("QwenImagePipeline")
    assert model.time_grid(1, tiny.side, tiny.side).tolist() == [0.0, 1.0]
