"""Ending a run on its validation loss, with the weights of the best validation."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentflow.errors import UserError
from latentflow.training import Callbacks
from latentflow.training.loop.stopping import EarlyStop
from latentflow.training.report.card import CardFacts, write_card
from latentflow.training.report.folder import read_run

from .forking import run_ranks
from .test_loop import CONFIG, Regression, assert_equal_weights, run, steps

STOPPING = dataclasses.replace(CONFIG, validation_steps=2, early_stop=2)
# By step: 4 is the best, 8 the second that is not better.
LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 1.0, 12: 1.0}


def callbacks(module: Regression, folder: Path, seen: dict[int, torch.Tensor] | None = None) -> Callbacks:
    """Validations that say ``LOSSES``, and an export of the weights as the callbacks see them."""

    def validate() -> dict[str, float]:
        file = folder.parent / f"{folder.name}-validations"
        step = 2 * (int(file.read_text()) + 1) if file.exists() else 2
        file.write_text(str(step // 2))
        if seen is not None:
            seen[step] = module.layers[0].weight.detach().clone()
        return {"loss": LOSSES[step]}

    def export(to: Path) -> None:
        save_file({"weight": module.layers[0].weight.detach().clone()}, to / "result.safetensors")

    return Callbacks(validate=validate, export=export, export_to=folder / "result")


def result(folder: Path) -> torch.Tensor:
    return load_file(folder / "result" / "result.safetensors")["weight"]


def test_it_ends_after_its_patience_and_the_result_is_of_the_best_validation(tmp_path: Path) -> None:
    module, seen = Regression(), dict[int, torch.Tensor]()
    assert run(tmp_path / "run", STOPPING, module, callbacks=callbacks(module, tmp_path / "run", seen))
    assert list(seen) == [2, 4, 6, 8]
    assert steps(tmp_path / "run")[-1] == 8
    assert torch.equal(result(tmp_path / "run"), seen[4]) and not torch.equal(seen[8], seen[4])
    # The same line again finds it done; the result, were it lost, is made again of the same weights.
    (tmp_path / "run" / "result" / "result.safetensors").unlink()
    (tmp_path / "run" / "result").rmdir()
    again = Regression()
    assert run(tmp_path / "run", STOPPING, again, callbacks=callbacks(again, tmp_path / "run", seen))
    assert list(seen) == [2, 4, 6, 8] and torch.equal(result(tmp_path / "run"), seen[4])


def test_a_run_that_reaches_its_end_exports_its_best_as_well(tmp_path: Path) -> None:
    module, seen = Regression(), dict[int, torch.Tensor]()
    config = dataclasses.replace(STOPPING, early_stop=9)
    assert run(tmp_path / "run", config, module, callbacks=callbacks(module, tmp_path / "run", seen))
    assert list(seen) == [2, 4, 6, 8, 10, 12]
    assert torch.equal(result(tmp_path / "run"), seen[10])  # as low as 12, and earlier


def test_without_a_loss_that_is_a_number_it_ends_and_says_whose_weights_these_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert run(tmp_path / "run", STOPPING, callbacks=Callbacks(validate=lambda: {"loss": float("nan")}))
    assert steps(tmp_path / "run")[-1] == 4
    assert (
        "stopped early at step 4; no val_loss was a number, so that the result is of this step" in caplog.text
    )


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    whole = Regression()
    assert run(tmp_path / "whole", STOPPING, whole, callbacks=callbacks(whole, tmp_path / "whole"))
    stopped = Regression(at={6 * 6 + 1: signal.SIGTERM})  # in step 7
    assert not run(tmp_path / "run", STOPPING, stopped, callbacks=callbacks(stopped, tmp_path / "run"))
    resumed = Regression()
    assert run(tmp_path / "run", STOPPING, resumed, callbacks=callbacks(resumed, tmp_path / "run"))
    assert steps(tmp_path / "run")[-1] == 8
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    assert torch.equal(result(tmp_path / "whole"), result(tmp_path / "run"))


def test_two_processes_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = dataclasses.replace(STOPPING, train_batch_size=3)

    def rank(number: int) -> None:
        module = Regression()
        assert run(tmp_path / "run", config, module, callbacks=callbacks(module, tmp_path / "run"))

    run_ranks(2, rank)
    assert steps(tmp_path / "run")[-1] == 8


def test_card_and_report_tell_whose_weights_the_result_has(tmp_path: Path) -> None:
    early = EarlyStop(2, (), None)
    early.step, early.loss, early._since = 4, 3.0, 2
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("network: dit\nmax_train_steps: 12\nearly_stop: 2\n")
    rows = [{"step": step, "val_loss": LOSSES[step]} for step in (2, 4, 6, 8)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    log = tmp_path / "run" / "train.log"
    log.write_text(f"2025-01-01 00:00:00 {early.line(8)}\n")
    found = read_run(tmp_path / "run")
    assert found.finished and found.result_step == 4
    assert found.resume().endswith("--early-stop 4")
    facts = CardFacts(where="x", kind="unconditional", parts={})
    write_card(tmp_path, tmp_path / "run", facts)
    card = (tmp_path / "README.md").read_text()
    assert "the weights are those of step 4" in card and "at step 4: `val_loss` 3.0000" in card
    # It went on: what was said at step 8 is of before.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 10, "val_loss": 1.0}\n')
    found = read_run(tmp_path / "run")
    assert not found.finished and found.result_step == 10
    early._since = 0
    log.write_text(early.line(10))
    assert read_run(tmp_path / "run").result_step == 4


def test_without_validations_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--early-stop without validations"):
        run(tmp_path, STOPPING)
