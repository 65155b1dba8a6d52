"""`latentflow distill`: students of tiny checkpoints, by every method, through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow import LatentFlowPipeline, pipeline_base
from latentflow.errors import UserError
from latentflow.models import Condition
from latentflow.training.distillation import METHODS, Distillation, DistillationConfig
from latentflow.training.teacher import VelocityTeacher

from ..conftest import load_program
from .command import TINY, call

FEW = ["--max-train-steps", 2, "--train-batch-size", 4, "--lr-warmup-steps", 2, "--validation", 0.2]
PAIRS = ["--pairs", 6, "--pairs-steps", 2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Captions, and masks."""
    folder = tmp_path_factory.mktemp("teacher")
    call(folder, pictures, "-o", folder / "run", *TINY, "--max-train-steps", 2, "--inpainting")
    return folder / "run" / "pipeline"


def distill(folder: Path, *arguments: Any, expect: int = 0) -> str:
    return call(folder, *arguments, file="distill", expect=expect)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_student_that_draws_as_it_was_made_for(
    method: str, teacher: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    said = distill(tmp_path, teacher, pictures, "-o", run, "--method", method, *FEW, *PAIRS, "--guidance", 3)
    assert "guidance 3 learned along" in said
    pipe = LatentFlowPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    counts = (1,) if method == "one-step" else (1, 2, 4)
    assert pipe.few_steps.step_counts == counts and pipe.usual_steps == counts[-1]
    assert pipe.usual_guidance == 1.0 and pipe.config.folded_guidance == 3.0
    evaluations: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda module, given: evaluations.append(float(given[1][0])))
    pipe("a picture", output_type="latent")
    assert len(evaluations) == counts[-1]
    evaluations.clear()
    warned: list[str] = []
    monkeypatch.setattr(pipeline_base.log, "warning", lambda text, *values: warned.append(text % values))
    pipe("a picture", output_type="latent", num_inference_steps=3)
    assert len(evaluations) == 3
    assert warned == [f"3 steps of a checkpoint that was made for {' or '.join(map(str, counts))}"]
    assert ("straightness" in said) == METHODS[method].pairs


def test_a_student_may_be_an_adapter(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    """It brings the input that the teacher lacks; the pipeline follows it while it is in effect, and not after."""
    run = tmp_path / "run"
    distill(tmp_path, teacher, pictures, "-o", run, *FEW, "--lora-rank", 2, "--guidance", 2)
    whole = LatentFlowPipeline.from_pretrained(run / "pipeline")
    pipe = LatentFlowPipeline.from_pretrained(teacher)
    for one in (whole, pipe):
        one.set_progress_bar_config(disable=True)
    ask: dict[str, Any] = {"prompt": "a picture", "output_type": "latent"}

    def drawn(one: Any, **more: Any) -> Tensor:
        latents: Tensor = one(**ask, generator=torch.Generator().manual_seed(1), **more).images
        return latents

    before, config = drawn(pipe), dict(pipe.config)
    pipe.load_lora_weights(run / "adapter")
    assert pipe.few_steps == whole.few_steps and pipe.usual_steps == 4 and pipe.usual_guidance == 1.0
    for steps in (1, 4):
        expected = drawn(whole, num_inference_steps=steps)
        torch.testing.assert_close(drawn(pipe, num_inference_steps=steps), expected, rtol=1e-4, atol=1e-5)
    pipe.disable_lora()
    assert not pipe.few_steps and torch.equal(drawn(pipe), before)
    pipe.enable_lora()
    assert pipe.few_steps == whole.few_steps
    pipe.unload_lora_weights()
    assert not pipe.few_steps and torch.equal(drawn(pipe), before)
    assert {name: one for name, one in pipe.config.items() if name in config} == config
    # Fused and saved it is the student.
    pipe.load_lora_weights(run / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    fused = LatentFlowPipeline.from_pretrained(tmp_path / "fused")
    fused.set_progress_bar_config(disable=True)
    assert fused.few_steps == whole.few_steps
    torch.testing.assert_close(drawn(fused), drawn(whole), rtol=1e-4, atol=1e-5)
