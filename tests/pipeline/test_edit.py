"""Editing against closed forms: of the stub's Gaussians every method moves an image by the difference of the means."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import EDITING, slerp
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline

from . import conftest
from .conftest import latents_of, quiet, seeds

Noise = Callable[[int], Tensor]
Mean = Callable[..., Tensor]
LATENT: dict[str, Any] = {"output_type": "latent", "solver": "rk4"}
APPLE, TREE, HAT = "a red apple", "green tree", "a small blue hat"


@pytest.fixture
def images() -> Tensor:
    """(2, 3, 8, 8) in [0, 1]."""
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def editor(pipe: LatentFlowPipeline) -> LatentFlowEditPipeline:
    # from_pipe hands over our own networks only, which the stub is not.
    return quiet(LatentFlowEditPipeline(**pipe.components, id2label=pipe.config.id2label))


def share(strength: float, spread: float = 0.5) -> float:
    """How much of the difference of the means an edit makes; see ``latentflow.flow.editing``."""
    start = 1 - strength
    return 1 - start * spread / math.sqrt((start * spread) ** 2 + (1 - start) ** 2)


close = partial(conftest.close, tolerance=1e-3)


# ------------------------------------------------------------------ edits


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("method", EDITING)
def test_words_move_an_image_by_the_difference_of_their_means(
    method: str, strength: float, text_pipe: LatentFlowPipeline, images: Tensor, text_mean: Mean
) -> None:
    means = {text: text_mean(text_pipe, text) for text in (APPLE, TREE, HAT)}
    edit = editor(text_pipe)
    out = edit(
        [TREE, HAT],
        images,
        [APPLE, TREE],
        method,
        strength,
        guidance_scale=1.0,
        num_images_per_prompt=2,
        **LATENT,
    ).images
    moved = torch.stack([means[TREE] - means[APPLE], means[HAT] - means[TREE]])
    expected = latents_of(edit, images) + share(strength) * moved[:, :, None, None]
    close(out, expected.repeat_interleave(2, 0))


@pytest.mark.parametrize("method", EDITING)
def test_each_side_has_its_own_guidance_and_the_target_its_negative_prompt(
    method: str, text_pipe: LatentFlowPipeline, images: Tensor, text_mean: Mean
) -> None:
    edit, null = editor(text_pipe), text_pipe.transformer.null
    scales = {"guidance_scale": 3.0, "source_guidance_scale": 2.0}
    out = edit(TREE, images, APPLE, method, 1.0, negative_prompt=HAT, **scales, **LATENT).images
    target = text_mean(edit, HAT) + 3.0 * (text_mean(edit, TREE) - text_mean(edit, HAT))
    source = null + 2.0 * (text_mean(edit, APPLE) - null)
    close(out, latents_of(edit, images) + (target - source)[:, None, None])


@pytest.mark.parametrize("method", EDITING)
def test_without_a_source_the_edit_leads_from_the_null(
    method: str,
    text_pipe: LatentFlowPipeline,
    class_pipe: LatentFlowPipeline,
    images: Tensor,
    text_mean: Mean,
) -> None:
    for pipe, target in ((text_pipe, {"prompt": TREE}), (class_pipe, {"class_labels": "tree"})):
        edit = editor(pipe)
        out = edit(**target, image=images, method=method, strength=1.0, guidance_scale=1.0, **LATENT).images
        end = text_mean(edit, TREE) if pipe is text_pipe else pipe.transformer.means[2]
        close(out, latents_of(edit, images) + (end - pipe.transformer.null)[:, None, None])


@pytest.mark.parametrize("method", EDITING)
def test_classes_edit_too(method: str, class_pipe: LatentFlowPipeline, images: Tensor) -> None:
    edit, means = editor(class_pipe), class_pipe.transformer.means
    out = edit(
        image=images[:1],
        class_labels=["hat", 2],
        source_class_labels="apple",
        method=method,
        strength=1.0,
        guidance_scale=1.0,
        **LATENT,
    ).images
    close(out, latents_of(edit, images[:1]) + (means[[1, 2]] - means[0])[:, :, None, None])


@pytest.mark.parametrize("method", EDITING)
def test_strength_zero_is_the_image_through_the_autoencoder(
    method: str, text_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    edit = editor(text_pipe)
    out = edit(TREE, images, APPLE, method, 0.0, output_type="pt").images
    close(out, (edit.decode_latents(latents_of(edit, images)).detach() / 2 + 0.5).clamp(0, 1), tolerance=1e-6)
    assert not text_pipe.transformer.calls


def test_solver_steps_and_settings_reach_the_method(text_pipe: LatentFlowPipeline, images: Tensor) -> None:
    edit = editor(text_pipe)

    def evaluations(**settings: Any) -> int:
        text_pipe.transformer.calls.clear()
        edit(TREE, images, APPLE, num_inference_steps=4, guidance_scale=1.0, output_type="latent", **settings)
        return len(text_pipe.transformer.calls)

    assert evaluations(strength=1.0) == 2 * 4
    assert evaluations(strength=0.5) == 2 * 2
    assert evaluations(strength=1.0, solver="heun") == 2 * 8
    assert evaluations(strength=1.0, draws=3) == 2 * 12
    assert evaluations(strength=1.0, plain_from=0.5) == 2 * 2 + 2
    assert evaluations(strength=1.0, method="inversion") == 2 * 8
    assert evaluations(strength=1.0, method="inversion", solver="euler") == 2 * 4


# ------------------------------------------------------------------ callbacks


@pytest.mark.parametrize("method", EDITING)
def test_callbacks_see_each_step_where_it_began(
    method: str, text_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    seen: list[tuple[int, float, float]] = []

    def callback(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(tensors) == {"latents", "prediction"} and tensors["latents"].shape == (2, 2, 4, 4)
        seen.append((i, round(float(timestep)), pipe.guidance_scale))
        return {"latents": torch.full_like(tensors["latents"], 9.0)} if i == pipe.num_timesteps - 1 else {}

    out = editor(text_pipe)(
        TREE,
        images,
        APPLE,
        method,
        0.5,
        4,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prediction"],
        output_type="latent",
    ).images
    begins = [500, 250] if method == "flowedit" else [0, 250, 500, 250]
    assert seen == [(i, t, 2.0) for i, t in enumerate(begins)]
    assert bool((out == 9.0).all())


@pytest.mark.parametrize("method", EDITING)
def test_an_interrupted_edit_stops_there(method: str, text_pipe: LatentFlowPipeline, images: Tensor) -> None:
    steps = []

    def callback(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"])
        pipe._interrupt = i == 1

    edit = editor(text_pipe)
    out = edit(TREE, images, APPLE, method, callback_on_step_end=callback, output_type="latent").images
    assert len(steps) == 2 and torch.equal(out, steps[-1])


# ------------------------------------------------------------------ inversion


def test_inversion_finds_the_noise_that_makes_the_image(
    text_pipe: LatentFlowPipeline, images: Tensor, text_mean: Mean
) -> None:
    edit = editor(text_pipe)
    inversion = edit.invert(images, [APPLE, TREE], 20, solver="rk4")
    means = torch.stack([text_mean(edit, APPLE), text_mean(edit, TREE)])[:, :, None, None]
    x1 = latents_of(edit, images)
    close(inversion.latents, (x1 - means) / 0.5)
    again = text_pipe(
        [APPLE, TREE], latents=inversion.latents, guidance_scale=1.0, num_inference_steps=20, **LATENT
    ).images
    assert inversion.error is not None and inversion.error.shape == (2,)
    close(inversion.error, (again - x1).square().mean((1, 2, 3)).sqrt(), tolerance=1e-6)
    assert inversion.size == (8, 8)


def test_the_error_of_the_round_trip_falls_with_the_solver_s_order(
    text_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    edit = editor(text_pipe)
    errors = [edit.invert(images, APPLE, steps, solver="euler").error for steps in (40, 80)]
    assert all(error is not None for error in errors)
    assert math.log2(float(errors[0].mean() / errors[1].mean())) == pytest.approx(1.0, abs=0.15)
    assert edit.invert(images, APPLE, 4, measure=False).error is None


def test_inversion_needs_no_condition(
    class_pipe: LatentFlowPipeline, plain_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    for pipe in (class_pipe, plain_pipe):
        edit, network = editor(pipe), pipe.transformer
        noise = edit.invert(images, num_inference_steps=20, solver="rk4").latents
        close(noise, (latents_of(edit, images) - network.null[:, None, None]) / 0.5)
    guided = editor(class_pipe).invert(images, "", 20, 3.0, class_labels="hat", solver="rk4").latents
    network = class_pipe.transformer
    mean = network.null + 3.0 * (network.means[1] - network.null)
    close(guided, (latents_of(class_pipe, images) - mean[:, None, None]) / 0.5)


# ------------------------------------------------------------------ interpolation


def test_between_two_images_noise_takes_the_arc_and_the_mean_the_line(
    text_pipe: LatentFlowPipeline, images: Tensor, text_mean: Mean
) -> None:
    edit = editor(text_pipe)
    texts = [APPLE, "big yellow sun over a house"]  # of different lengths
    out = edit.interpolate(texts, list(images), 5, 20, **LATENT).images
    means = [text_mean(edit, text)[:, None, None] for text in texts]
    x1 = latents_of(edit, images)
    noise = [(x - mean) / 0.5 for x, mean in zip(x1, means, strict=True)]
    for frame, s in zip(out, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        middle = slerp(noise[0][None], noise[1][None], s)[0]
        close(frame, torch.lerp(means[0], means[1], s) + 0.5 * middle, tolerance=2e-3)
    close(out[[0, -1]], x1, tolerance=2e-3)


def test_between_two_prompts_there_is_one_noise_or_two(text_pipe: LatentFlowPipeline) -> None:
    edit = editor(text_pipe)

    def drawn(prompt: str, seed: int, scale: float) -> Tensor:
        [generator] = seeds(seed)
        settings = {"num_inference_steps": 20, "guidance_scale": scale, **LATENT}
        image: Tensor = text_pipe(prompt, generator=generator, **settings).images
        return image

    one = edit.interpolate([APPLE, TREE], frames=3, generator=seeds(1)[0], **LATENT).images
    close(one[[0, -1]], torch.cat([drawn(APPLE, 1, 4.0), drawn(TREE, 1, 4.0)]))
    close(one[1], (one[0] + one[2]) / 2)
    two = edit.interpolate(
        [APPLE, TREE], frames=3, generator=seeds(1, 2), guidance_scale=2.0, **LATENT
    ).images
    close(two[[0, -1]], torch.cat([drawn(APPLE, 1, 2.0), drawn(TREE, 2, 2.0)]))


def test_between_classes_and_without_any_condition(
    class_pipe: LatentFlowPipeline, plain_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    edit = editor(class_pipe)
    settings = {"frames": 3, "guidance_scale": 1.0, "generator": seeds(1)[0], **LATENT}
    first, middle, last = edit.interpolate(class_labels=["apple", 2], **settings).images
    means = class_pipe.transformer.means
    close(last - first, (means[2] - means[0])[:, None, None].expand(2, 4, 4))
    close(middle, (first + last) / 2)
    plain = editor(plain_pipe)
    out = plain.interpolate(image=list(images), frames=4, **LATENT).images
    close(out[[0, -1]], latents_of(plain, images))
    assert max(rows for rows, _, _ in plain_pipe.transformer.calls) == 4  # one condition is evaluated once


# ------------------------------------------------------------------ mistakes

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "flowedits"}, "did you mean 'flowedit'"),
    "stochastic solver": ({"solver": "euler-maruyama"}, "stochastic"),
    "another method's setting": ({"method": "inversion", "draws": 2}, "draws is given"),
    "source prompts": ({"source_prompt": [TREE, HAT, APPLE]}, "source_prompt has 3 entries\nPass one, or 2."),
    "classes": ({"source_class_labels": 1}, "does not take class_labels"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(
    changes: dict[str, Any], message: str, text_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    with pytest.raises(UserError, match=message):
        editor(text_pipe)(**{"prompt": TREE, "image": images, "source_prompt": APPLE, **changes})


def test_words_for_a_class_checkpoint_list_its_classes(
    class_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    edit = editor(class_pipe)
    for words in ({"prompt": TREE}, {"class_labels": 1, "source_prompt": APPLE}):
        with pytest.raises(UserError, match="apple, hat, tree"):
            edit(image=images, **words)
    with pytest.raises(UserError, match="class_labels is missing"):
        edit(image=images)


def test_an_unconditional_checkpoint_has_nothing_to_edit_by(
    plain_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    with pytest.raises(UserError, match="nothing to edit by"):
        editor(plain_pipe)(TREE, images)


def test_mistakes_in_inversion_and_interpolation_are_named(
    text_pipe: LatentFlowPipeline, class_pipe: LatentFlowPipeline, images: Tensor
) -> None:
    edit, of_classes = editor(text_pipe), editor(class_pipe)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: edit.invert(images, solver="ddpm"), "stochastic"),
        (lambda: edit.invert(images, [APPLE, TREE, HAT]), "3 prompts"),
        (lambda: of_classes.invert(images, negative_prompt="x"), "negative prompt without a prompt"),
        (lambda: of_classes.invert(images, "x"), "apple, hat, tree"),
        (lambda: edit.interpolate([APPLE, TREE, HAT]), "prompt has 3 entries\nPass one, or 2."),
        (lambda: edit.interpolate([APPLE, TREE], negative_prompt=[HAT, HAT]), "2 negative prompts\nPass one"),
        (
            lambda: of_classes.encode_prompt("x"),
            "does not take prompt\nIt takes class_labels: apple, hat, tree",
        ),
        (lambda: edit.interpolate(APPLE, [images[0]]), "1 image to interpolate between"),
        (lambda: edit.interpolate(APPLE, generator=seeds(1, 2, 3)), "3 generators"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
