"""Power-function averages: what they are, their snapshots, and any other length from them after training."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from latentflow import LatentFlowPipeline
from latentflow.config import LoopConfig
from latentflow.errors import UserError
from latentflow.training import average, fit
from latentflow.training.average import averaged_pipeline, coefficients, reconstruct
from latentflow.training.loop.checkpoint import list_checkpoints, load_checkpoint
from latentflow.training.loop.trained_module import LONGEST, WeightAverage, exponent, power_function

from .command import TINY, call
from .forking import run_ranks
from .test_loop import CONFIG, Line, Regression

STEPS = 160
TRACKED = dataclasses.replace(
    CONFIG, max_train_steps=STEPS, ema_lengths=(0.05, 0.1), lr_scheduler="constant", learning_rate=0.01,
    checkpointing_steps=48, log_steps=1000,
)  # fmt: skip


def averages(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of every snapshot: step and length -> weights."""
    return {
        f"{one.name}/{name}": value
        for one in list_checkpoints(folder / "averages")
        for name, value in load_checkpoint(one).items()
        if name != "step"
    }


def off(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert found.keys() == truth.keys()
    a, b = (torch.cat([one[key].flatten().double() for key in truth]) for one in (found, truth))
    return float((a - b).norm() / b.norm())


def test_the_length_is_the_standard_deviation_of_the_profile() -> None:
    tau = np.linspace(0.0, 1.0, 200_001)
    for length in (0.01, 0.05, 0.1, 0.2):
        profile = tau ** exponent(length)
        profile /= profile.sum()
        mean = (profile * tau).sum()
        assert math.sqrt((profile * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)
    assert exponent(LONGEST) == pytest.approx(0.0, abs=1e-9)
    for length in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(UserError, match="relative length"):
            exponent(length)


def test_the_average_weighs_steps_as_its_profile_does() -> None:
    """Step s by the integral of the profile over [s - 1, s]; the initial weights by nothing."""
    module = nn.Linear(1, 1, bias=False)
    steps = 50
    for length in (0.05, 0.2):
        power, found = exponent(length) + 1, []
        for marked in range(steps + 1):
            with torch.no_grad():
                module.weight.fill_(float(marked == 0))
            average = WeightAverage(module, power_function(length))
            for step in range(1, steps + 1):
                with torch.no_grad():
                    module.weight.fill_(float(step == marked))
                average.update(step)
            found.append(float(average.averages["weight"]))
        edges = (np.arange(steps + 1) / steps) ** power
        np.testing.assert_allclose(found, [0.0, *np.diff(edges)], rtol=2e-3, atol=1e-6)


def test_a_tracked_length_is_its_own_snapshot_and_factors_sum_to_one() -> None:
    snapshots = [(length, step) for step in range(10, 101, 10) for length in (0.05, 0.1)]
    factors, residual = coefficients(snapshots, 0.1, 100)
    np.testing.assert_allclose(factors, [0.0] * 19 + [1.0], atol=1e-6)
    assert residual < 1e-6
    for length in (0.03, 0.08, 0.2):
        assert coefficients(snapshots, length, 100)[0].sum() == pytest.approx(1.0, abs=1e-9)
    # More snapshots, a better fit; and what is reported is the distance of the profiles, here summed over steps.
    fine = [(length, step) for step in range(250, 8001, 250) for length in (0.05, 0.1)]
    factors, residual = coefficients(fine, 0.08, 8000)
    assert residual < coefficients(snapshots, 0.08, 100)[1] / 5

    def profile(length: float, step: int) -> Any:
        edges = np.minimum(np.arange(8001) / step, 1.0) ** (exponent(length) + 1)
        return np.diff(edges)

    mixed = sum(factor * profile(*one) for factor, one in zip(factors, fine, strict=True))
    wanted = profile(0.08, 8000)
    assert np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted) == pytest.approx(residual, rel=0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two tracked lengths and the default spacing of snapshots."""
    folder = tmp_path_factory.mktemp("whole")
    fit({"flow": Regression()}, Line(), TRACKED, folder)
    return folder


def test_a_length_made_after_training_equals_the_one_that_was_tracked(whole: Path, tmp_path: Path) -> None:
    """Below, between and above those that the snapshots hold."""
    lengths = (0.03, 0.07, 0.08, 0.15, 0.2)
    config = dataclasses.replace(TRACKED, ema_lengths=lengths, ema_snapshot_steps=STEPS)
    fit({"flow": Regression()}, Line(), config, tmp_path)
    truth = averages(tmp_path)
    newest = f"step-{STEPS:06d}/flow-average-"
    for length in lengths:
        found, step = reconstruct(whole / "averages", length)
        assert step == STEPS
        assert off(found, truth[f"{newest}{length:g}"]) < 1e-3, length
    # The lengths differ by more than that, and so does each from the weights at the end.
    assert off(truth[f"{newest}0.07"], truth[f"{newest}0.08"]) > 1e-3
    assert off(truth[f"{newest}0.03"], truth[f"{newest}0.2"]) > 1e-2


def test_a_length_far_from_those_tracked_is_a_warning_and_a_damaged_snapshot_is_named(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("latentflow").propagate = True
    folder = Path(shutil.copytree(whole / "averages", tmp_path / "averages"))
    reconstruct(folder, 0.002)
    assert "that is much. Lengths near or between 0.05, 0.1 are met better" in caplog.text
    (folder / "step-000010" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-000010 is damaged(.|\n)*Move it away"):
        reconstruct(folder, 0.1)


def test_a_run_that_died_has_the_same_averages_and_snapshots(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fit({"flow": Regression(at={70 * 6: InterruptedError()})}, Line(), TRACKED, tmp_path)
    assert list_checkpoints(tmp_path / "averages")[-1].name == "step-000070"  # later than the checkpoint
    fit({"flow": Regression()}, Line(), TRACKED, tmp_path)
    first, second = averages(whole), averages(tmp_path)
    assert first.keys() == second.keys() and len(first) == 2 * 32
    assert all(torch.equal(first[key][name], one) for key in second for name, one in second[key].items())


def test_a_length_that_was_not_tracked_from_the_start_is_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(TRACKED, max_train_steps=4, ema_lengths=(0.05,))
    fit({"flow": Regression()}, Line(), short, tmp_path)
    with pytest.raises(UserError, match=r"--ema-lengths 0\.1: the run has not tracked"):
        longer = dataclasses.replace(TRACKED, max_train_steps=6)
        fit({"flow": Regression()}, Line(), longer, tmp_path)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_keep_the_averages_of_one(tmp_path: Path, shard: bool) -> None:
    alone = dataclasses.replace(TRACKED, max_train_steps=6, ema_snapshot_steps=2)
    pair = dataclasses.replace(alone, train_batch_size=3, shard=shard)

    def train(config: LoopConfig, folder: Path) -> None:
        fit({"flow": Regression(dropout=0.0)}, Line(), config, folder)  # dropout is each process's own

    train(alone, tmp_path / "alone")
    run_ranks(2, lambda rank: train(pair, tmp_path / "pair"))
    first, second = averages(tmp_path / "alone"), averages(tmp_path / "pair")
    assert first.keys() == second.keys() and len(first) == 2 * 3
    for key, one in first.items():
        assert off(second[key], one) < 1e-5
    assert (
        off(reconstruct(tmp_path / "pair" / "averages", 0.1)[0], first["step-000006/flow-average-0.1"]) < 1e-4
    )


def test_the_command_makes_a_pipeline(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [images, *TINY, "--max-train-steps", 6, "--ema-lengths", 0.05, 0.1, "--ema-snapshot-steps", 2]
    line += ["--alignment", "self"]  # whose head is averaged as well, and is no part of the result
    said = call(tmp_path / "cache", *line, "-o", tmp_path / "run")
    assert "a snapshot of" in said and "in all" in said
    averaged_pipeline(tmp_path / "run", 0.1, tmp_path / "out")
    pipe = LatentFlowPipeline.from_pretrained(tmp_path / "out")
    truth = averages(tmp_path / "run")["step-000006/flow-average-0.1"]
    parts = {"network": pipe.transformer, "text_encoder": pipe.text_encoder}
    for part, module in parts.items():
        for name, one in module.named_parameters():
            torch.testing.assert_close(one, truth[f"{part}.{name}"], rtol=1e-4, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "relative length 0.1" in card and f'from_pretrained("{tmp_path / "out"}")' in card
    with pytest.raises(UserError, match="exists"):
        averaged_pipeline(tmp_path / "run", 0.1, tmp_path / "out")
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct(tmp_path / "run" / "checkpoints" / "none", 0.1)
    with pytest.raises(UserError, match="has no pipeline"):
        averaged_pipeline(tmp_path / "cache", 0.1, tmp_path / "other")
    layer = "network.blocks.0.attn.qkv"
    for name, words in (
        (f"{layer}.lora_A.default.weight", r"(?s)of an adapter.*without --lora-rank"),
        (f"{layer}.weight", "do not fit .*pipeline: shapes"),
        (f"{layer}.other", f"do not fit .*pipeline: {layer}.other"),
    ):
        found = {name: torch.zeros(1, 16)}
        monkeypatch.setattr(average, "reconstruct", lambda folder, length, found=found: (found, 6))
        with pytest.raises(UserError, match=words):
            averaged_pipeline(tmp_path / "run", 0.1, tmp_path / "other")
