"""How a run ends: the status of a program that a signal stopped, the export, and what the console goes on with."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import select
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from latentflow import LatentFlowPipeline
from latentflow.errors import RunError
from latentflow.training import Callbacks, Stop, fit
from latentflow.training.loop import logging as report
from latentflow.training.loop import run_folder as folders
from latentflow.training.loop import saving
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.losses.autoencoder import AutoencoderLoss
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.report.folder import read_metrics

from .command import ROOT, TINY, call, environment
from .forking import run_ranks
from .test_loop import CONFIG, Line, Regression, assert_equal_weights, run, steps

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize(("number", "status"), SIGNALS.items())
def test_each_signal_saves_and_its_status_is_told(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    stop, before = Stop(), signal.getsignal(number)
    assert not run(tmp_path / "run", module=Regression(at={4 * 6: number}), stop=stop)  # in step 5
    assert (stop.signal, stop.status) == (number, status)
    assert steps(tmp_path / "run")[-1] == 5 and signal.getsignal(number) == before
    stop = Stop()
    assert run(tmp_path / "run", stop=stop) and run(tmp_path / "whole") and stop.status == 0
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nohup ignores SIGHUP, and a shell SIGINT for what it runs in the background."""
    before, stop = signal.signal(number, signal.SIG_IGN), Stop()
    try:
        assert run(tmp_path, module=Regression(at={4 * 6: number}), stop=stop)
    finally:
        assert signal.signal(number, before) == signal.SIG_IGN
    assert stop.status == 0 and steps(tmp_path)[-1] == 12


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    twice = {4 * 6: signal.SIGINT, 4 * 6 + 1: signal.SIGINT}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, module=Regression(at=twice))


def test_a_run_in_a_thread_leaves_signals_to_the_program(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run, tmp_path).result()


def test_in_the_last_step_the_run_is_finished_and_the_signal_told(tmp_path: Path) -> None:
    """Its caller may have more to do; also one that comes while the last step is saved."""
    stop, made = Stop(), tmp_path / "result"
    exports = {"export": lambda folder: (folder / "a").touch(), "export_to": made}
    assert run(
        tmp_path / "run",
        module=Regression(at={11 * 6: signal.SIGTERM}),
        stop=stop,
        callbacks=Callbacks(**exports),
    )
    assert stop.signal == signal.SIGTERM and (made / "a").exists()

    def validate() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    late, config = Stop(), dataclasses.replace(CONFIG, validation_steps=12)
    assert run(tmp_path / "late", config, stop=late, callbacks=Callbacks(validate=validate))
    assert late.signal == signal.SIGTERM


def test_what_stops_early_in_the_step_of_a_signal_is_finished(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, validation_steps=2, early_stop=2)
    callbacks = Callbacks(
        validate=lambda: {"loss": float("inf")},
        export=lambda folder: (folder / "a").touch(),
        export_to=tmp_path / "result",
    )
    module = Regression(at={3 * 6: signal.SIGTERM})
    assert run(tmp_path / "run", config, module=module, callbacks=callbacks)
    assert steps(tmp_path / "run")[-1] == 4 and (tmp_path / "result" / "a").exists()


def test_all_processes_stop_for_the_signal_of_one(tmp_path: Path) -> None:
    def rank(number: int) -> None:
        stop = Stop()
        module = Regression(at={4 * 6 + 3: signal.SIGHUP})  # in the second process
        config = dataclasses.replace(CONFIG, train_batch_size=3)
        assert not fit({"flow": module}, Line(), config, tmp_path, stop=stop)
        assert stop.status == 129

    run_ranks(2, rank)
    assert steps(tmp_path)[-1] == 5


def test_ctrl_c_and_sigterm_to_the_processes_that_load_stop_the_run_as_well(tmp_path: Path) -> None:
    """A terminal signals all processes of a run, SLURM too."""

    class Terminated(Line):
        def __getitems__(self, draws: list[SampleUse]) -> dict[str, Any]:
            if any(draw.sample_id == 6 * 6 + 3 for draw in draws):
                time.sleep(0.5)  # the loop has taken all that was loaded before, and waits
                os.kill(os.getppid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitems__(draws)

    config = dataclasses.replace(CONFIG, num_workers=1)
    for number in (signal.SIGINT, signal.SIGHUP):
        data = Line({6 * 6 + 3: number})
        assert fit({"flow": Regression()}, data, config, tmp_path / str(int(number)))
    stop = Stop()
    assert not fit({"flow": Regression()}, Terminated(), config, tmp_path / "run", stop=stop)
    assert stop.status == 143 and steps(tmp_path / "run")[-1] == 6
    assert fit({"flow": Regression()}, Line(), config, tmp_path / "run")
    assert_equal_weights(tmp_path / "run", tmp_path / "2")


# ---- the programs ----


def interrupting(stage: type, number: signal.Signals, at: int, patch: pytest.MonkeyPatch) -> None:
    """Let ``stage`` get a signal where it sees the sample ``at`` in training."""
    forward = stage.forward

    def seen(self: Any, batch: dict[str, Any]) -> Any:
        if self.training and at in batch["sample_ids"]:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    patch.setattr(stage, "forward", seen)


FEW = [*TINY, "--max-train-steps", 3, "--validation-steps", 0, "--preview-steps", 0]


def test_ctrl_c_before_the_first_step_names_the_line_that_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentflow.training.train.train_autoencoder", interrupted)
    said = call(tmp_path / "cache", images, "-o", tmp_path / "run", *FEW, expect=130)
    assert re.search(r"\nInterrupted\. Resume with:\n  latentflow train .*\n$", said)


def test_programs_end_with_the_status_of_the_signal_that_stopped_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latentflow distill`: test_distillation.py."""
    cache, out = tmp_path / "cache", tmp_path / "run"
    line = [images, "-o", out, *FEW]
    with monkeypatch.context() as patch:  # the autoencoder's last step: it is finished, the run is not
        interrupting(AutoencoderLoss, signal.SIGINT, 1 * 4, patch)
        said = call(cache, *line, expect=130)
    assert "resume with:\n  latentflow train" in said and (out / "autoencoder/autoencoder").is_dir()
    assert not (out / "checkpoints").exists()
    with monkeypatch.context() as patch:
        interrupting(FlowLoss, signal.SIGTERM, 1 * 4, patch)
        said = call(cache, *line, expect=143)
    assert "stopped at step 2, saved; resume with:\n  latentflow train" in said and "done:" not in said
    assert re.search(r"resume with:\n  latentflow train .*\n$", said), "the last line is what to do next"
    assert not (out / "pipeline").exists()
    with monkeypatch.context() as patch:  # the last step of all
        interrupting(FlowLoss, signal.SIGTERM, 2 * 4, patch)
        said = call(cache, *line)
    assert "done:" in said and "resume with" not in said

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # what is ours in the export is tried again, and told in words
        patch.setattr(folders, "RETRY_SECONDS", (0.0,))
        patch.setattr(LatentFlowPipeline, "save_pretrained", full)
        said = call(cache, *line, "--max-train-steps", 4, expect=1)
    assert said.count("Trying again") == 1 and "the same line makes the rest" in said
    assert f"the result {out}/pipeline could not be written: No space left on device" in said
    assert "done:" in call(cache, *line, "--max-train-steps", 4)

    own = TINY[: TINY.index("--network-preset")]
    alone = [images, "-o", tmp_path / "autoencoder", *own, "--autoencoder-steps", 3]
    with monkeypatch.context() as patch:
        interrupting(AutoencoderLoss, signal.SIGHUP, 1 * 4, patch)
        assert "resume with" in call(cache, *alone, file="autoencoder", expect=129)
    with monkeypatch.context() as patch:
        interrupting(AutoencoderLoss, signal.SIGHUP, 2 * 4, patch)
        assert "done:" in call(cache, *alone, file="autoencoder")


def test_closing_the_terminal_saves_and_ends_with_129(images: Path, tmp_path: Path) -> None:
    """The real command, whose writing to the terminal fails from then on."""
    line = [images, "-o", tmp_path / "run", *TINY, "--max-train-steps", 10**6, "--validation-steps", 0]
    words = [sys.executable, "-m", "latentflow", "train", *map(str, line)]
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
        os.chdir(ROOT)
        os.execve(sys.executable, words, environment(tmp_path / "cache"))
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not ended[0]:
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 129
    (step,) = steps(tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"stopped at step {step}, saved; resume with" in log and "Traceback" not in log


# ---- the export ----


def test_an_export_gets_an_empty_folder_that_exists(tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("made")

    callbacks = Callbacks(export=export, export_to=tmp_path / "here" / "result")
    assert run(tmp_path / "run", callbacks=callbacks)
    assert (tmp_path / "here" / "result" / "a").read_text() == "made"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory", "font.ttf"), KeyError("a")]
)
def test_an_error_of_the_user_s_export_is_raised_as_it_is_and_at_once(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: pytest.fail("it is tried again"))
    calls = []

    def export(folder: Path) -> None:
        calls.append(folder)
        raise error

    callbacks = Callbacks(export=export, export_to=tmp_path / "result")
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "run", callbacks=callbacks)
    assert caught.value is error and caught.traceback[-1].name == "export"
    assert len(calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert steps(tmp_path / "run")[-1] == 12


def test_a_disk_that_fails_under_an_export_is_tried_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of our own writing, before and after the callback, and of a callback that says so."""
    full, calls = OSError(28, "No space left on device"), []

    def export(folder: Path) -> None:
        calls.append(folder)
        if len(calls) < 3:
            with folders.writing("the result", folder):
                raise full

    callbacks = Callbacks(export=export, export_to=tmp_path / "result")
    assert run(tmp_path / "run", callbacks=callbacks) and len(calls) == 3

    def failing(folder: Path) -> None:
        raise full

    monkeypatch.setattr(saving, "finish_folder", failing)
    callbacks = dataclasses.replace(callbacks, export_to=tmp_path / "other")
    with pytest.raises(RunError, match=r"the result .*other could not be written: No space left") as caught:
        run(tmp_path / "run2", callbacks=callbacks)
    assert "checkpoint is complete" in caught.value.fix and len(calls) == 6


# ---- the console ----


def lines(said: str) -> list[str]:
    """The progress lines without what the clock and the memory decide."""
    found = [line for line in said.splitlines() if re.match(r"step \d+/", line)]
    return [re.sub(r"  (images/s|memory|left) \S+( \S+)*", "", line) for line in found]


def test_the_console_of_a_resumed_run_goes_on_as_that_of_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.sys.stderr, "isatty", lambda: False, raising=False)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(report.time, "perf_counter", lambda: float(next(clock)))  # a line for each step
    config = dataclasses.replace(CONFIG, validation_steps=4)

    def said(folder: str, *modules: Regression) -> list[str]:
        for module in modules:
            run(tmp_path / folder, config, module, callbacks=Callbacks(validate=lambda: {"loss": 0.25}))
        return lines(capsys.readouterr().err)

    whole = said("whole", Regression())
    resumed = said("resumed", Regression(at={5 * 6: signal.SIGTERM}), Regression())
    assert len(whole) == 12 and whole == resumed
    # The running mean, by its formula.
    rows = [float(re.search(r"loss (\S+)", line)[1]) for line in whole]  # type: ignore[index]
    logged = read_metrics(tmp_path / "whole")
    mean = logged[0]["loss"]
    for row, told in zip(logged, rows, strict=True):
        mean = 0.9 * mean + 0.1 * row["loss"]
        assert told == pytest.approx(mean, abs=1e-4)
    assert "val_loss 0.2500" in whole[-1] and "val_loss" not in whole[2]
