"""The pipeline's answers against closed forms: each plausible mistake in its wiring changes a number here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import SOLVERS, time_grid
from latentflow.models import DiT
from latentflow.models.text import UnknownWords
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

from .conftest import GaussianFlow, close, quiet, seeds, tiny_vae

Noise = Callable[[int], Tensor]
EXACT: dict[str, Any] = {"solver": "dopri5", "num_inference_steps": 2, "output_type": "latent"}
EULER: dict[str, Any] = {"solver": "euler", "num_inference_steps": 4, "output_type": "latent"}


def by_hand(pipe: LatentFlowPipeline, x: Tensor, times: Tensor, scale: Callable[[float], float]) -> Tensor:
    """Euler under class 1, written out; ``scale(t)`` is the guidance."""
    network = pipe.transformer
    for t, t_next in pairwise(times):
        mean = network.null + scale(float(t)) * (network.means[1] - network.null)
        spread = network.SPREAD
        slope = (t * spread**2 - (1 - t)) / ((t * spread) ** 2 + (1 - t) ** 2)
        m = mean.view(1, 2, 1, 1)
        x = x + (t_next - t) * (m + slope * (x - t * m))
    return x.float()


# ------------------------------------------------------------------ conditions reach their own images


def test_each_class_by_name_or_id_makes_its_own_images(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    out = class_pipe(
        class_labels=["hat", 2, "apple"], num_images_per_prompt=2, guidance_scale=1.0, latents=x0(6), **EXACT
    )
    means = class_pipe.transformer.means[[1, 1, 2, 2, 0, 0]]
    close(out.images, class_pipe.transformer.end(means, x0(6)))


def test_each_prompt_makes_its_own_images(
    text_pipe: LatentFlowPipeline, x0: Noise, text_mean: Callable[..., Tensor]
) -> None:
    prompts = ["green tree", "big yellow sun over a house", "a red apple"]
    out = text_pipe(prompts, num_images_per_prompt=2, guidance_scale=1.0, latents=x0(6), **EXACT)
    means = torch.stack([text_mean(text_pipe, prompt) for prompt in prompts]).repeat_interleave(2, 0)
    assert (means[0] - means[2]).abs().max() > 0.1  # else the test could not tell them apart
    # The embeddings are not small, and the solver's error grows with them; prompts differ by far more than this.
    close(out.images, text_pipe.transformer.end(means, x0(6)), tolerance=1e-3)


def test_an_empty_prompt_is_the_null(text_pipe: LatentFlowPipeline, x0: Noise) -> None:
    out = text_pipe(["a red apple", ""], guidance_scale=1.0, latents=x0(2), **EXACT)
    close(out.images[1:], text_pipe.transformer.end(text_pipe.transformer.null, x0(2)[1:]))


def test_guidance_leads_from_the_null_through_the_class(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    network = class_pipe.transformer
    out = class_pipe(class_labels=[0, 2], guidance_scale=3.0, latents=x0(2), **EXACT)
    close(out.images, network.end(network.null + 3.0 * (network.means[[0, 2]] - network.null), x0(2)))


def test_guidance_leads_away_from_the_negative_prompt(
    text_pipe: LatentFlowPipeline, x0: Noise, text_mean: Callable[..., Tensor]
) -> None:
    prompts, negative = ["a red apple", "green tree"], "big yellow sun over a house"
    out = text_pipe(prompts, negative_prompt=negative, guidance_scale=3.0, latents=x0(2), **EXACT)
    away = text_mean(text_pipe, negative)
    means = torch.stack([away + 3.0 * (text_mean(text_pipe, prompt) - away) for prompt in prompts])
    close(out.images, text_pipe.transformer.end(means, x0(2)), 1e-3)
    alone = text_pipe(prompts, negative_prompt=[negative], guidance_scale=3.0, latents=x0(2), **EXACT)
    assert torch.equal(alone.images, out.images)
    swapped = text_pipe(
        prompts, negative_prompt=[negative, "green tree"], guidance_scale=3.0, latents=x0(2), **EXACT
    )
    close(swapped.images[:1], out.images[:1], 1e-3)
    close(swapped.images[1:], text_pipe.transformer.end(text_mean(text_pipe, "green tree"), x0(2)[1:]), 1e-3)


def test_embeddings_stand_for_the_text_that_they_encode(text_pipe: LatentFlowPipeline, x0: Noise) -> None:
    texts = {"prompt": ["green tree", "a red apple"], "negative_prompt": "a small blue hat"}
    by_text = text_pipe(**texts, latents=x0(2), **EULER).images
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("prompt_attention_mask", "negative_prompt_attention_mask")
    with torch.no_grad():
        encoded = dict(zip(names, text_pipe.encode_prompt(**texts), strict=True))
    text_pipe.text_encoder = text_pipe.tokenizer = None
    assert torch.equal(text_pipe(**encoded, latents=x0(2), **EULER).images, by_text)


@pytest.mark.filterwarnings("ignore:1 of 1 prompts")
def test_max_sequence_length_cuts_the_prompt(text_pipe: LatentFlowPipeline, x0: Noise) -> None:
    # The start token and two words.
    cut = text_pipe("a red apple", max_sequence_length=3, guidance_scale=1.0, latents=x0(1), **EULER).images
    short = text_pipe("a red", guidance_scale=1.0, latents=x0(1), **EULER).images
    assert torch.equal(cut, short)


def test_an_unconditional_checkpoint_needs_no_condition(plain_pipe: LatentFlowPipeline, x0: Noise) -> None:
    out = plain_pipe(num_images_per_prompt=3, latents=x0(3), **EXACT)
    close(out.images, plain_pipe.transformer.end(plain_pipe.transformer.null, x0(3)))
    assert {rows for rows, _, _ in plain_pipe.transformer.calls} == {3}  # no guidance without a condition


# ------------------------------------------------------------------ grid, guidance interval, cost


def test_sigmas_are_the_grid(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    out = class_pipe(
        class_labels=1, sigmas=[1.0, 0.9, 0.3], guidance_scale=2.0, latents=x0(1), **EULER
    ).images
    times = torch.tensor([0.0, 0.1, 0.7, 1.0], dtype=torch.float64)
    close(out, by_hand(class_pipe, x0(1), times, lambda t: 2.0), 1e-5)
    with_zero = class_pipe(
        class_labels=1, sigmas=[1.0, 0.9, 0.3, 0.0], guidance_scale=2.0, latents=x0(1), **EULER
    )
    assert torch.equal(with_zero.images, out)
    assert class_pipe.num_timesteps == 3


def test_guidance_acts_within_its_interval_only(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    out = class_pipe(class_labels=1, guidance_interval=(0.2, 0.6), guidance_scale=3.0, latents=x0(1), **EULER)
    close(
        out.images, by_hand(class_pipe, x0(1), time_grid(4), lambda t: 3.0 if 0.2 <= t <= 0.6 else 1.0), 1e-5
    )
    assert [rows for rows, _, _ in class_pipe.transformer.calls] == [1, 2, 2, 1]


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (4.0, 4)])
def test_one_network_evaluation_per_step(class_pipe: LatentFlowPipeline, scale: float, rows: int) -> None:
    class_pipe(class_labels=[0, 1], guidance_scale=scale, **EULER)
    assert [(n, t) for n, t, _ in class_pipe.transformer.calls] == [(rows, t) for t in (0.0, 0.25, 0.5, 0.75)]


def test_without_a_solver_steps_are_shorter_at_both_ends(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    call = {"class_labels": 1, "latents": x0(1), "output_type": "latent"}
    default = class_pipe(**call, num_inference_steps=6).images
    times = [t for _, t, _ in class_pipe.transformer.calls]
    assert len(times) == 6  # one evaluation each
    sigmas = [1.0 - t for t in time_grid(6, kind="sine").tolist()[:-1]]
    close(default, class_pipe(**call, sigmas=sigmas, solver="exponential-adams").images, 1e-6)
    assert not torch.equal(
        default, class_pipe(**call, num_inference_steps=6, solver="exponential-adams").images
    )
    class_pipe.transformer.calls.clear()
    class_pipe(**call)
    assert len(class_pipe.transformer.calls) == class_pipe.usual_steps == 16
    class_pipe(**call, solver="euler")
    assert len(class_pipe.transformer.calls) == 16 + 20


# ------------------------------------------------------------------ noise


def test_one_generator_draws_the_whole_batch(class_pipe: LatentFlowPipeline) -> None:
    noise = randn_tensor((2, 2, 4, 4), generator=torch.Generator().manual_seed(9))
    drawn = class_pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(9), **EULER).images
    assert torch.equal(drawn, class_pipe(class_labels=[0, 1], latents=noise, **EULER).images)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 8), (6, 10)])
def test_height_and_width(class_pipe: LatentFlowPipeline, height: int, width: int) -> None:
    image = class_pipe(class_labels=0, height=height, width=width, num_inference_steps=1).images[0]
    assert image.size == (width, height)
    assert class_pipe(class_labels=0, num_inference_steps=1).images[0].size == (8, 8)  # 4 latents x factor 2


def test_the_state_stays_in_float32_beside_a_half_precision_network(
    class_pipe: LatentFlowPipeline, x0: Noise
) -> None:
    class_pipe.to(dtype=torch.bfloat16)
    with torch.no_grad():
        class_pipe.transformer.means.zero_()
        class_pipe.transformer.null.zero_()
    seen: list[Tensor] = []

    def still(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {}

    out = class_pipe(
        class_labels=0, guidance_scale=1.0, latents=x0(1), callback_on_step_end=still, **EULER
    ).images
    assert {dtype for _, _, dtype in class_pipe.transformer.calls} == {torch.bfloat16}
    assert out.dtype == torch.float32
    # One step at t = 0, where the velocity is -x rounded to bfloat16: the rest must not be rounded.
    close(seen[0], x0(1) - 0.25 * x0(1).bfloat16().float(), 1e-6)


# ------------------------------------------------------------------ images


def test_the_autoencoder_sees_latents_with_its_own_statistics_put_back(
    class_pipe: LatentFlowPipeline, x0: Noise
) -> None:
    call = {"class_labels": [0, 1], "latents": x0(2), "num_inference_steps": 2}
    latents = class_pipe(**call, output_type="latent").images
    mean, std = torch.tensor([0.3, -0.7]).view(1, 2, 1, 1), torch.tensor([1.5, 0.4]).view(1, 2, 1, 1)
    with torch.no_grad():
        expected = class_pipe.vae.decode(latents * std + mean).sample
    close(class_pipe(**call, output_type="pt").images, (expected / 2 + 0.5).clamp(0, 1), 1e-6)


def test_output_types_agree(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    call = {"class_labels": [0, 1], "latents": x0(2), "num_inference_steps": 2}
    tensor = class_pipe(**call, output_type="pt").images
    array = class_pipe(**call, output_type="np").images
    images = class_pipe(**call).images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    for image, values in zip(images, array, strict=True):
        assert np.array_equal(np.asarray(image), (values * 255).round().astype("uint8"))
    assert torch.equal(class_pipe(**call, output_type="pt", return_dict=False)[0], tensor)


def test_slicing_and_tiling_of_the_autoencoder(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    call = {"class_labels": [0, 1], "latents": x0(2), "output_type": "pt"}
    whole = class_pipe(**call).images
    class_pipe.vae.enable_slicing()
    close(class_pipe(**call).images, whole, 1e-5)
    class_pipe.vae.enable_tiling()
    assert class_pipe(**call).images.shape == whole.shape


def test_a_float16_autoencoder_that_overflows_is_widened(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    call = {"class_labels": 0, "latents": x0(1), "num_inference_steps": 1, "output_type": "pt"}
    class_pipe.vae.to(torch.float16)
    narrow = {name: value.clone() for name, value in class_pipe.vae.state_dict().items()}
    images = class_pipe(**call).images
    assert all(torch.equal(value, narrow[name]) for name, value in class_pipe.vae.state_dict().items())
    class_pipe.vae.to(torch.float32)
    assert torch.equal(images, class_pipe(**call).images)


# ------------------------------------------------------------------ callbacks


def test_callback_sees_every_step_at_diffusers_timestep(class_pipe: LatentFlowPipeline) -> None:
    seen: list[tuple[int, float]] = []
    class_pipe(class_labels=0, callback_on_step_end=lambda p, i, t, k: seen.append((i, float(t))), **EULER)
    assert seen == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]


def test_callback_replaces_latents(class_pipe: LatentFlowPipeline) -> None:
    def zero_at_the_end(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(tensors) == {"latents"}
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else tensors

    out = class_pipe(class_labels=0, callback_on_step_end=zero_at_the_end, **EULER).images
    assert out.abs().sum() == 0


def test_callback_changes_guidance_from_the_next_step(class_pipe: LatentFlowPipeline, x0: Noise) -> None:
    def off_after_the_second(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        if i == 1:
            pipe._guidance_scale = 1.0

    out = class_pipe(
        class_labels=1, guidance_scale=3.0, latents=x0(1), callback_on_step_end=off_after_the_second, **EULER
    )
    close(out.images, by_hand(class_pipe, x0(1), time_grid(4), lambda t: 3.0 if t < 0.5 else 1.0), 1e-5)


def test_callback_replaces_embeddings(text_pipe: LatentFlowPipeline, x0: Noise) -> None:
    with torch.no_grad():
        other = text_pipe.encode_prompt("green tree")[0]

    def swap_at_once(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": other, "latents": x0(1)} if i == 0 else {}

    wanted = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end_tensor_inputs": wanted, "guidance_scale": 1.0, "solver": "euler"}
    call |= {"num_inference_steps": 2, "output_type": "latent"}
    swapped = text_pipe("big tree", latents=x0(1), callback_on_step_end=swap_at_once, **call).images
    again = text_pipe(
        "green tree",
        latents=x0(1),
        callback_on_step_end=lambda p, i, t, k: {"latents": x0(1)} if i == 0 else {},
        **call,
    ).images
    assert torch.equal(swapped, again)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_interrupt_ends_the_loop_and_keeps_what_is_there(class_pipe: LatentFlowPipeline, solver: str) -> None:
    seen: list[Tensor] = []

    def stop_at_the_second(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"])
        pipe._interrupt = i == 1

    call = {**EULER, "solver": solver}
    out = class_pipe(class_labels=0, callback_on_step_end=stop_at_the_second, **call).images
    assert len(seen) == 2 and class_pipe.interrupt
    assert torch.equal(out, seen[1])
    class_pipe(class_labels=0, callback_on_step_end=lambda *_: seen.append(out), **call)
    assert len(seen) == 6  # the next call runs through


def test_progress_bar_counts_the_steps(
    class_pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[int] = []

    def bar(iterable: Any) -> Any:
        totals.append(len(iterable))
        return iterable

    monkeypatch.setattr(class_pipe, "progress_bar", bar)
    class_pipe(class_labels=0, **EULER)
    assert totals == [4]


# ------------------------------------------------------------------ words that nobody taught


def test_words_that_are_not_known_are_warned_of_once_a_call_where_it_was_made(
    text_pipe: LatentFlowPipeline,
) -> None:
    edit = quiet(LatentFlowEditPipeline(**text_pipe.components))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    quick = {"num_inference_steps": 1}
    calls: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: text_pipe(["zorgon, red", "a Blorp"], negative_prompt="blorp", **quick),
            "'zorgon', 'blorp'",
        ),
        (lambda: edit("a zorgon", images, source_prompt=["a hat", "blorp"], **quick), "'zorgon', 'blorp'"),
        (lambda: edit.invert(images, "zorgon", **quick), "'zorgon'"),
        (lambda: edit.interpolate(["zorgon", "blorp"], images, 2, **quick), "'zorgon', 'blorp'"),
    ]
    for call, words in calls:
        for _ in range(2):
            with pytest.warns(UnknownWords, match=f"not know, and that it cannot draw: {words}$") as caught:
                call()
            assert [warning.lineno for warning in caught] == [call.__code__.co_firstlineno]
    assert text_pipe.unknown_words(["zorgon, red", "a Blorp"]) == ["zorgon", "blorp"]
    assert text_pipe.unknown_words("small green tree") == []


def test_nothing_is_said_of_words_that_are_known_or_not_read(
    text_pipe: LatentFlowPipeline, class_pipe: LatentFlowPipeline
) -> None:
    embeds, _, mask, _ = text_pipe.encode_prompt("zorgon")
    assert embeds is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownWords)
        text_pipe(["A RED apple", ""], num_inference_steps=1)
        text_pipe(prompt_embeds=embeds.detach(), prompt_attention_mask=mask, num_inference_steps=1)
        class_pipe(class_labels="hat", num_inference_steps=1)
        assert class_pipe.unknown_words("zorgon") == []


# ------------------------------------------------------------------ an image and the batch around it


@pytest.mark.parametrize(
    "solver", [name for name, solver in SOLVERS.items() if solver.evaluations is not None]
)
def test_the_same_seed_is_the_same_image_in_any_batch_to_one_level_of_255(
    solver: str, assemble: Callable[[Any], LatentFlowPipeline]
) -> None:
    """A network's matrix products round otherwise in a batch of another size; more than that must not show."""
    pipe = assemble(DiT(in_channels=2, width=64, depth=2, heads=2, sample_size=4, num_classes=3))

    def drawn(*numbers: int) -> Any:
        labels: list[int | str] = [number % 3 for number in numbers]
        out = pipe(
            class_labels=labels,
            generator=seeds(*numbers),
            num_inference_steps=3,
            solver=solver,
            output_type="pil",
        )
        return np.stack([np.asarray(image, np.int16) for image in out.images])

    together = drawn(0, 1, 2, 3, 4)
    assert np.abs(together[0] - together[3]).max() > 1
    for rows in ([3], [4, 3], [2, 0, 4]):
        assert np.abs(drawn(*rows) - together[rows]).max() <= 1


@pytest.mark.parametrize("way", ["generate", "replacement", "flowedit", "inversion"])
def test_dopri5_chooses_the_steps_of_each_image_on_its_own(
    way: str, class_pipe: LatentFlowPipeline, x0: Noise
) -> None:
    """Beside an image whose values are a thousand times as large, one takes the very steps that it takes alone."""
    with torch.no_grad():
        class_pipe.transformer.means[2] = 3000.0
    parts = {**class_pipe.components, "id2label": class_pipe.config.id2label}
    originals = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    hole = torch.ones(1, 1, 8, 8)
    hole[..., :4] = 0.0

    def drawn(rows: int, solver: Any) -> tuple[Tensor, list[float]]:
        """The first image, and the times at which it was evaluated."""
        labels: list[int | str] = [1, 2][:rows]
        asked = {**call, "class_labels": labels, "generator": seeds(*range(rows)), "solver": solver}
        pipe: Any = class_pipe
        if way == "replacement":
            pipe = LatentFlowInpaintPipeline(**parts)
            asked |= {"image": originals[:rows], "mask_image": hole, "method": way}
        elif way != "generate":
            pipe = LatentFlowEditPipeline(**parts)
            asked |= {"image": originals[:rows], "source_class_labels": 0, "method": way}
        quiet(pipe)
        class_pipe.transformer.calls.clear()
        images: Tensor = pipe(**asked).images
        # At the end of a step it waits for the others.
        return images[:1], [t for t, _ in groupby(round(t, 3) for _, t, _ in class_pipe.transformer.calls)]

    (together, times), (alone, own) = drawn(2, "dopri5"), drawn(1, "dopri5")
    close(together, alone, 1e-5)
    assert len(own) > 10
    assert alike(times, own)
    assert not alike(drawn(2, SOLVERS["dopri5"])[1], own)  # steps that are shared


def alike(times: list[float], others: list[float]) -> bool:
    """Say whether each time has one of the other list within 0.02. Rounding, which processors do differently, may
    split a step just short of an end."""
    return all(min(abs(t - o) for o in b) < 0.02 for a, b in ((times, others), (others, times)) for t in a)


# ------------------------------------------------------------------ what is refused, and what it says


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "aple"}, "did you mean 'apple'"),
        ({"class_labels": 3}, "class id 3 does not exist"),
        ({"prompt": "a hat"}, "does not take prompt\nIt takes class_labels: apple, hat, tree"),
        ({"class_labels": 0, "negative_prompt": "a hat"}, "does not take negative_prompt"),
        ({}, "class_labels is missing\nIt takes class_labels: apple"),
        (
            {"class_labels": 0, "height": 9},
            "height 9 is not a multiple of 2",
        ),
        ({"class_labels": 0, "solver": "huen"}, "did you mean 'heun'"),
        ({"class_labels": 0, "output_type": "pli"}, "did you mean 'pil'"),
        ({"class_labels": 0, "sigmas": [0.5, 1.0]}, "no grid from noise"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 images"),
        ({"class_labels": 0, "latents": torch.zeros(1, 3, 4, 4)}, r"latents have shape \(1, 3, 4, 4\)"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["latent"]}, "did you mean 'latents'"),
    ],
)
def test_a_class_checkpoint_refuses(
    class_pipe: LatentFlowPipeline, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        class_pipe(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": 0}, "does not take class_labels\nIt takes a prompt"),
        ({}, "prompt is missing\nIt takes a prompt"),
        ({"negative_prompt": "a hat"}, "prompt is missing"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "2 negative prompts for 3 prompts"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 16)}, "both prompt and prompt_embeds"),
    ],
)
def test_a_caption_checkpoint_refuses(
    text_pipe: LatentFlowPipeline, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        text_pipe(**call)


def test_negative_prompts_that_encode_prompt_cannot_place(text_pipe: LatentFlowPipeline) -> None:
    with pytest.raises(UserError, match="2 negative prompts for 3 prompts"):
        text_pipe.encode_prompt(["a", "hat", "tree"], ["red", "blue"])
    with pytest.raises(UserError, match="1 negative prompt for 0 prompts"):
        text_pipe.encode_prompt(negative_prompt="red")


def test_a_checkpoint_that_does_not_say_its_size_is_told_one() -> None:
    pipe = quiet(LatentFlowPipeline(tiny_vae(), GaussianFlow(sample_size=None)))
    with pytest.raises(UserError, match="does not say its size\nPass height and width"):
        pipe(height=8)
    assert pipe(height=8, width=12, num_inference_steps=1).images[0].size == (12, 8)


def test_an_unconditional_checkpoint_refuses_conditions(plain_pipe: LatentFlowPipeline) -> None:
    for call in ({"prompt": "a hat"}, {"class_labels": 0}):
        with pytest.raises(UserError, match="It takes no condition"):
            plain_pipe(**call)


def test_a_text_encoder_that_is_not_loaded_is_named(text_pipe: LatentFlowPipeline) -> None:
    text_pipe.text_encoder = None
    with pytest.raises(UserError, match="without its text encoder"):
        text_pipe("a hat")


def test_label_ids(class_pipe: LatentFlowPipeline, plain_pipe: LatentFlowPipeline) -> None:
    assert class_pipe.get_label_ids("hat") == [1]
    assert class_pipe.get_label_ids(["tree", "apple"]) == [2, 0]
    with pytest.raises(UserError, match="no class names"):
        plain_pipe.get_label_ids("hat")
