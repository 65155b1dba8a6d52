"""diffusers' caches of blocks on our networks: exact where they skip nothing, near where they skip, and forgetful."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers import PyramidAttentionBroadcastConfig as AttentionBroadcast
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig
from torch import Tensor

from latentflow.errors import UserError
from latentflow.flow import integrate, time_grid
from latentflow.models import UNet
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline

from .conftest import close, quiet, seeds, tiny_dit
from .test_offload import DIT, draw, sequential, tiny_pipe

ALWAYS, NEVER = FirstBlockCacheConfig(threshold=1e9), FirstBlockCacheConfig(threshold=0.0)


@pytest.fixture
def pipe() -> LatentFlowPipeline:
    return tiny_pipe(
        tiny_dit(**DIT, depth=3, time_scale=0.3)
    )  # whose velocity changes slowly, as a trained one's


@contextmanager
def evaluations(pipe: Any, block: int = 2) -> Iterator[list[int]]:
    """Yield the numbers of rows for which this block computes."""
    rows: list[int] = []
    handle = pipe.transformer.blocks[block].attn.register_forward_hook(
        lambda module, given, made: rows.append(len(made))
    )
    yield rows
    handle.remove()


def call(pipe: Any, prompt: Any = "a red apple", **options: Any) -> Tensor:
    settings = {"num_inference_steps": 8, "solver": "euler", "output_type": "latent", "generator": seeds(0)}
    images: Tensor = pipe(prompt, **{**settings, **options}).images
    return images


def test_a_cache_that_skips_nothing_changes_no_bit(pipe: LatentFlowPipeline, images: Any) -> None:
    expected = draw(pipe, images())
    pipe.transformer.enable_cache(NEVER)
    for name, made in draw(pipe, images()).items():
        assert torch.equal(made, expected[name]), name
    pipe.transformer.disable_cache()
    for name, made in draw(pipe, images()).items():
        assert torch.equal(made, expected[name]), name


def test_a_cache_that_always_skips_computes_once_for_each_velocity(
    pipe: LatentFlowPipeline, images: Any
) -> None:
    """Guidance evaluates 2 B rows, outside its interval B; editing follows two velocities, with other rows."""
    pipe.transformer.enable_cache(ALWAYS)
    with evaluations(pipe) as rows:
        call(pipe)
        assert rows == [2]
        call(pipe, guidance_interval=(0.3, 0.6))
        assert rows == [2, 1, 2]
        call(pipe, guidance_scale=1.0, num_images_per_prompt=3, generator=seeds(0, 1, 2))
        assert rows == [2, 1, 2, 3]
    edit = quiet(LatentFlowEditPipeline.from_pipe(pipe))
    with evaluations(pipe) as rows:
        options = {"num_inference_steps": 4, "source_guidance_scale": 1.0, "guidance_scale": 3.0}
        edit("green tree", images(), source_prompt="a red apple", generator=seeds(0), **options)
        assert sorted(rows) == [1, 2]


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (FirstBlockCacheConfig(threshold=0.1), 7),
        (MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8), 4),
        (
            TaylorSeerCacheConfig(
                cache_interval=2,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=["final_layer"],
                skip_predict_identifiers=[r"blocks\.\d+"],
            ),
            6,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches_skip_blocks_and_stay_near(config: Any, most: int, pipe: LatentFlowPipeline) -> None:
    expected = {prompt: call(pipe, prompt) for prompt in ("a red apple", "green tree")}
    pipe.transformer.enable_cache(config)
    for prompt in ("a red apple", "green tree", "a red apple"):  # nothing is left of an earlier call
        with evaluations(pipe) as rows:
            made = call(pipe, prompt)
        assert 1 <= len(rows) <= most
        assert not torch.equal(made, expected[prompt])
        assert (made - expected[prompt]).abs().max() < 0.25  # the two prompts are 0.67 apart


def test_what_velocities_of_the_model_remember_is_let_go_of(pipe: LatentFlowPipeline) -> None:
    def remembered() -> int:
        hooks = [
            hook
            for block in pipe.transformer.blocks
            for hook in block._diffusers_hook.hooks.values()
            if hasattr(hook, "state_manager")
        ]
        assert hooks
        return sum(len(hook.state_manager._state_cache) for hook in hooks)

    pipe.transformer.enable_cache(ALWAYS)
    with pipe.running():
        velocity = pipe.model.velocity(pipe.model.encode_prompt(["a red apple"]), 1.0)
        velocity(torch.zeros(1, 2, 4, 4), torch.tensor(0.5))
        assert remembered()
    assert not remembered()


def test_images_of_a_batch_share_a_cache(pipe: LatentFlowPipeline) -> None:
    pipe.transformer.enable_cache(NEVER)
    both = call(pipe, ["a red apple", "green tree"], generator=seeds(0, 1))
    close(both[1:], call(pipe, "green tree", generator=seeds(1)), 1e-5)


def test_what_a_callback_changes_begins_anew(pipe: LatentFlowPipeline) -> None:
    pipe.transformer.enable_cache(ALWAYS)

    def change(pipe: Any, step: int, t: Tensor, tensors: Any) -> None:
        pipe._guidance_scale = 1.0 if step == 3 else pipe._guidance_scale

    with evaluations(pipe) as rows:
        call(pipe, callback_on_step_end=change)
    assert rows == [2, 1]


def test_a_call_that_fails_leaves_nothing_behind(pipe: LatentFlowPipeline) -> None:
    pipe.transformer.enable_cache(ALWAYS)
    expected = call(pipe, "green tree")

    def fail(pipe: Any, step: int, t: Tensor, tensors: Any) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        call(pipe, callback_on_step_end=fail)
    assert torch.equal(call(pipe, "green tree"), expected)


def test_the_flow_model_alone_keeps_velocities_apart(pipe: LatentFlowPipeline) -> None:
    pipe.transformer.enable_cache(ALWAYS)
    model, times = pipe.model, time_grid(4)
    noise = model.noise(1, 8, 8, torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluations(pipe) as rows:
        first, second, again = (
            model.velocity(model.encode_prompt([text]), 1.0)
            for text in ("a red apple", "green tree", "green tree")
        )
        alone = integrate(second, noise, times, "euler")
        integrate(first, noise, times, "euler")
        assert torch.equal(integrate(again, noise, times, "euler"), alone)
    assert rows == [1, 1, 1]


def test_a_cache_over_offloaded_weights(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    expected = call(pipe)
    sequential(pipe, monkeypatch)
    assert torch.equal(call(pipe), expected)


def test_mag_ratios_are_measured(pipe: LatentFlowPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    expected = call(pipe)
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=8))
    assert torch.equal(call(pipe), expected)
    ratios = capsys.readouterr().out.split("[")[-1].split("]")[0].split(",")
    assert len(ratios) == 8 and all(float(ratio) > 0.0 for ratio in ratios)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            AttentionBroadcast(current_timestep_callback=lambda: 0),
            "PyramidAttentionBroadcastConfig does not suit",
        ),
        (FasterCacheConfig(current_timestep_callback=lambda: 0), "FasterCacheConfig does not suit DiT"),
        (SeaCacheConfig(), "SeaCacheConfig does not suit DiT\n.*FirstBlockCacheConfig, MagCacheConfig"),
        (TextKVCacheConfig(), "TextKVCacheConfig does not suit"),
        (TaylorSeerCacheConfig(use_lite_mode=True), r"no layer proj_out.*\n.*final_layer"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches_of_other_architectures_are_refused(config: Any, match: str, pipe: LatentFlowPipeline) -> None:
    with pytest.raises(UserError, match=match):
        pipe.transformer.enable_cache(config)
    assert not pipe.transformer.is_cache_enabled
    assert not hasattr(UNet, "enable_cache")  # it has no row of blocks
