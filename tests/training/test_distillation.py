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
    assert pipe.step_counts == counts and pipe.usual_steps == counts[-1]
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
