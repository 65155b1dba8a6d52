"""``joint_attention_kwargs={"scale": s}`` is for one call what ``set_adapters`` with the weight s is for all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow import LatentFlowEditPipeline, LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.adapter_scale import SCALE_NAMES

pytest.importorskip("peft", reason='needs peft: pip install "peft>=0.22"')

from .adapters import make_adapter
from .conftest import close, quiet, seeds

pytestmark = pytest.mark.filterwarnings("ignore::latentflow.models.text.UnknownWords")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 6.0, "lora_layers": ("all",)},
    "DoRA": {"lora_dora": True},
    "text encoder and a word": {"lora_text_encoder": True, "words": ["zebra"]},
}
HALF: dict[str, Any] = {"scale": 0.5}


def opened(folder: Path, *adapters: Path, kind: Any = LatentFlowPipeline) -> Any:
    pipe = quiet(kind.from_pretrained(folder))
    for number, adapter in enumerate(adapters):
        pipe.load_lora_weights(adapter, adapter_name=f"one{number}")
    return pipe


def drawn(pipe: Any, **call: Any) -> Tensor:
    condition = call if "class_labels" in call else {"prompt": ["a red zebra"], **call}
    usual = {"output_type": "latent", "num_inference_steps": 2, "generator": seeds(0)}
    latents: Tensor = pipe(**usual, **condition).images
    return latents


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_scale_of_a_call_is_the_weight_of_the_adapter(
    config: dict[str, Any], dit_folder: Path, tmp_path: Path
) -> None:
    make_adapter(dit_folder, tmp_path, **config)
    pipe, weighed = opened(dit_folder, tmp_path), opened(dit_folder, tmp_path)
    full = drawn(pipe)
    for scale in (0.0, 0.3, 0.5, 2.0, -1.0):
        weighed.set_adapters(["one0"], [scale])
        close(drawn(pipe, joint_attention_kwargs={"scale": scale}), drawn(weighed), 1e-6)
        assert torch.equal(drawn(pipe), full)  # as it was before the call
    if "lora_dora" not in config:  # DoRA's magnitudes do not go with the weight
        known = {"prompt": "a red apple"}  # by the base as well
        close(drawn(pipe, attention_kwargs={"scale": 0.0}, **known), drawn(opened(dit_folder), **known), 1e-6)
    assert torch.equal(drawn(pipe, attention_kwargs={"scale": 1}), full)
    assert torch.equal(drawn(pipe, attention_kwargs={}), full)
    assert (drawn(pipe, attention_kwargs=HALF) - full).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCALE_NAMES)
@pytest.mark.parametrize("kind", ["generate", "image-to-image", "inpaint", "edit", "invert", "interpolate"])
def test_every_call_takes_it_under_every_name(
    kind: str, name: str, dit_folder: Path, tmp_path: Path, images: Any
) -> None:
    make_adapter(dit_folder, tmp_path)
    classes = {
        "generate": LatentFlowPipeline,
        "image-to-image": LatentFlowImg2ImgPipeline,
        "inpaint": LatentFlowInpaintPipeline,
    }
    pipe = opened(dit_folder, tmp_path, kind=classes.get(kind, LatentFlowEditPipeline))
    method = {"invert": "invert", "interpolate": "interpolate"}.get(kind, "__call__")
    call: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2}
    call |= {} if kind in ("generate", "interpolate") else {"image": images()}
    call |= {"mask_image": torch.ones(8, 8)} if kind == "inpaint" else {}
    call |= {} if kind == "invert" else {"output_type": "latent"}

    def result(**changes: Any) -> Tensor:
        changes |= {} if kind == "invert" else {"generator": torch.Generator().manual_seed(0)}
        out = getattr(pipe, method)(**call, **changes)
        latents: Tensor = out.latents if kind == "invert" else out.images
        return latents

    scaled, full = result(**{name: HALF}), result()
    pipe.set_adapters(["one0"], [0.5])
    close(scaled, result(), 1e-6)
    assert (scaled - full).abs().max() > 1e-4


def test_two_adapters_keep_their_proportion(dit_folder: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        make_adapter(dit_folder, tmp_path / str(number), seed=number)
    pipe = opened(dit_folder, tmp_path / "0", tmp_path / "1")
    pipe.set_adapters(["one0", "one1"], [0.5, 2.0])
    scaled = drawn(pipe, joint_attention_kwargs=HALF)
    nothing = drawn(pipe, joint_attention_kwargs={"scale": 0})
    weighed = drawn(pipe)
    pipe.set_adapters(["one0", "one1"], [0.25, 1.0])
    close(scaled, drawn(pipe), 1e-6)
    close(nothing, drawn(opened(dit_folder)), 1e-6)
    pipe.set_adapters(["one0", "one1"], [0.5, 2.0])
    assert torch.equal(drawn(pipe), weighed)


def test_new_classes_are_scaled_too(class_folder: Path, tmp_path: Path) -> None:
    make_adapter(class_folder, tmp_path, classes=["boat"])
    pipe, weighed = opened(class_folder, tmp_path), opened(class_folder, tmp_path)
    weighed.set_adapters("one0", 0.5)
    full = drawn(pipe, class_labels=["boat"])
    scaled = drawn(pipe, class_labels=["boat"], cross_attention_kwargs=HALF)
    close(scaled, drawn(weighed, class_labels=["boat"]), 1e-6)
    assert torch.equal(drawn(pipe, class_labels=["boat"]), full)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_weights_come_back_after_an_error(scale: float, dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True)
    pipe = opened(dit_folder, tmp_path)
    pipe.set_adapters("one0", 0.7)
    before = drawn(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        drawn(pipe, joint_attention_kwargs={"scale": scale}, callback_on_step_end=fail)
    assert torch.equal(drawn(pipe), before)


def test_prompts_are_encoded_at_a_scale(dit_folder: Path, tmp_path: Path) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True)
    pipe, weighed = opened(dit_folder, tmp_path), opened(dit_folder, tmp_path)
    weighed.set_adapters("one0", 0.5)
    full = pipe.encode_prompt("a red zebra")[0]
    close(pipe.encode_prompt("a red zebra", lora_scale=0.5)[0], weighed.encode_prompt("a red zebra")[0], 1e-6)
    assert torch.equal(pipe.encode_prompt("a red zebra")[0], full)


def test_without_adapters_or_with_fused_ones_it_is_said_that_it_does_nothing(
    dit_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_adapter(dit_folder, tmp_path, words=["zebra"])
    fused = opened(dit_folder, tmp_path)
    fused.fuse_lora()
    for pipe in (opened(dit_folder), fused):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            usual = drawn(pipe)
            assert not caplog.records
            assert torch.equal(drawn(pipe, joint_attention_kwargs=HALF), usual)
        assert "the scale 0.5 of adapters has no effect" in caplog.text
