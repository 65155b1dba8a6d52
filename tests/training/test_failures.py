"""What gives out while a run trains: memory, data, previews, disks, clocks, processes."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from latentflow.autoencoder import latents
from latentflow.errors import RunError, UserError
from latentflow.training import Callbacks, fit, log_to
from latentflow.training.loop import fit as loop
from latentflow.training.loop import loader as batches
from latentflow.training.loop import saving
from latentflow.training.loop.checkpoint import load_latest
from latentflow.training.loop.data_order import DataOrder
from latentflow.utils.memory import OutOfMemory, is_out_of_memory, memory_phase

from .forking import run_ranks
from .test_loop import CONFIG, Line, Regression, assert_equal_weights, run, steps

LINE = "latentflow train cats -o runs/cats"


class NoDropout(Regression):
    """Its loss is a function of the samples alone, whatever the parts."""

    def __init__(self, memory_rows: int = 10**9, **options: Any) -> None:
        super().__init__(dropout=0.0, **options)
        self.memory_rows = memory_rows
        self.sizes: list[int] = []

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.sizes.append(len(batch["x"]))
        if len(batch["x"]) > self.memory_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(batch)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "log"
    folder.mkdir()
    log_to(folder)
    yield folder / "train.log"
    log_to(None)


def assert_close_weights(a: Path, b: Path, rtol: float = 0.0) -> None:
    first, second = (load_latest(folder / "checkpoints") for folder in (a, b))
    assert first is not None and second is not None
    for name, one in first["flow-weights"].items():
        torch.testing.assert_close(one, second["flow-weights"][name], rtol=rtol, atol=1e-6)


# ---- memory ----


@pytest.mark.parametrize("rows", [3, 1])
def test_automatic_micro_batches_learn_what_a_run_with_these_from_the_start_learns(
    tmp_path: Path, log: Path, rows: int
) -> None:
    auto = dataclasses.replace(CONFIG, auto_micro_batch=True)
    module = NoDropout(memory_rows=rows)
    assert run(tmp_path / "auto", auto, module=module)
    small = dataclasses.replace(CONFIG, train_batch_size=rows, gradient_accumulation_steps=6 // rows)
    assert run(tmp_path / "small", small, module=NoDropout())
    assert_close_weights(tmp_path / "auto", tmp_path / "small")
    said = log.read_text()
    assert "phase: train" in said and f"parts of {rows}" in said and "samples and noise stay" in said
    # Known from the first step on, and kept by the run that goes on.
    state = load_latest(tmp_path / "auto" / "checkpoints")
    assert state is not None and state["micro_batch"] == rows
    again = NoDropout(memory_rows=rows)
    assert run(tmp_path / "auto", dataclasses.replace(auto, max_train_steps=13), module=again)
    assert set(again.sizes) == {rows}


def test_automatic_micro_batches_in_the_middle_of_a_run_repeat_the_step_from_its_start(
    tmp_path: Path,
) -> None:
    """Also with accumulation: the parts of a step that went through are not counted twice."""
    config = dataclasses.replace(
        CONFIG, train_batch_size=3, gradient_accumulation_steps=2, auto_micro_batch=True
    )

    class Once(NoDropout):
        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            if 5 * 6 + 3 in batch["sample_ids"] and len(batch["x"]) == 3:  # the second half of step 6
                raise MemoryError
            return super().forward(batch)

    assert run(tmp_path / "once", config, module=Once())
    assert run(tmp_path / "plain", config, module=NoDropout())
    assert_close_weights(tmp_path / "once", tmp_path / "plain")


def test_memory_that_runs_out_is_known_wherever_it_does() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    for said in (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(said)), said
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_out_of_memory_names_the_phase_the_peak_and_the_flags_and_saves(tmp_path: Path) -> None:
    error = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    )
    with pytest.raises(
        RunError, match=r"step 7: out of memory \(phase: train\) after a peak of \d"
    ) as caught:
        run(tmp_path, module=NoDropout(at={6 * 6: error}), resume_line=LINE)
    for word in ("--auto-micro-batch", "--gradient-checkpointing", "Saved at step 6", LINE):
        assert word in caught.value.fix
    assert steps(tmp_path)[-1] == 6 and caught.value.status == 1
    assert run(tmp_path, module=NoDropout())  # and from there it goes on, losing nothing
    assert run(tmp_path / "whole", module=NoDropout())
    assert_equal_weights(tmp_path, tmp_path / "whole")


def test_an_optimiser_that_runs_out_of_memory_leaves_the_last_checkpoint_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights have changed by then: the step before is no longer there to be saved."""
    step, calls = torch.optim.AdamW.step, iter(range(100))

    def fails(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fails)
        with pytest.raises(OutOfMemory, match="phase: train") as caught:
            run(tmp_path / "run", module=NoDropout(), resume_line=LINE)
    assert steps(tmp_path / "run") == [4] and "Saved" not in str(caught.value)
    assert run(tmp_path / "run", module=NoDropout()) and run(tmp_path / "whole", module=NoDropout())
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_two_processes_split_alike_when_one_runs_out_and_another_number_may_go_on(
    tmp_path: Path, log: Path
) -> None:
    constant = dataclasses.replace(CONFIG, lr_scheduler="constant")
    config = dataclasses.replace(constant, max_train_steps=8, train_batch_size=3, auto_micro_batch=True)

    def train(rank: int) -> None:
        run(tmp_path / "two", config, module=NoDropout(memory_rows=1 if rank else 10**9))

    run_ranks(2, train)
    state = load_latest(tmp_path / "two" / "checkpoints")
    assert state is not None and (state["step"], state["micro_batch"], state["processes"]) == (8, 1, 2)
    alone = dataclasses.replace(constant, train_batch_size=3, gradient_accumulation_steps=2)
    assert run(tmp_path / "two", alone, module=NoDropout())
    assert "resumed on 1 processes (before: 2)" in log.read_text()
    assert run(tmp_path / "one", constant, module=NoDropout())
    assert_close_weights(tmp_path / "two", tmp_path / "one", rtol=1e-5)


def test_too_little_memory_for_a_single_sample_ends_the_run(tmp_path: Path) -> None:
    auto = dataclasses.replace(CONFIG, auto_micro_batch=True)
    with pytest.raises(RunError, match="step 1: out of memory"):
        run(tmp_path, auto, module=NoDropout(memory_rows=0))


def test_another_error_of_the_network_is_no_lack_of_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, module=Regression(at={0: RuntimeError("shapes do not match")}))


def test_memory_that_runs_out_while_decoding_is_told_apart(tmp_path: Path) -> None:
    class Decoder:
        """Stands for an autoencoder; what matters is who called it."""

        config: ClassVar[dict[str, int]] = {}

        def decode(self, *args: object, **kwargs: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "denormalise", lambda vae, values: values)
        patch.setattr(latents, "placed", lambda vae, values: values)
        with pytest.raises(torch.OutOfMemoryError) as caught:  # from Python its type is what it was
            latents.decode(Decoder(), torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory, match="phase: decode") as told, memory_phase("preview"):
        raise caught.value
    assert "enable_tiling" in told.value.fix


# ---- previews and validation ----


def test_previews_and_validations_that_fail_never_stop_a_run_and_are_tried_again(
    tmp_path: Path, log: Path
) -> None:
    calls = {"preview": 0, "validate": 0}

    def preview() -> Image.Image:
        calls["preview"] += 1
        torch.rand(10)
        if calls["preview"] == 1:
            raise TypeError("no such thing")
        if calls["preview"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Image.new("RGB", (4, 4))

    def validate() -> dict[str, float]:
        calls["validate"] += 1
        if calls["validate"] == 1:
            raise UserError("cannot read broken.png")
        return {"loss": 1.0}

    often = dataclasses.replace(CONFIG, preview_steps=4, validation_steps=6)
    module = Regression()
    assert run(
        tmp_path / "run", often, module=module, callbacks=Callbacks(validate=validate, preview=preview)
    )
    assert calls == {"preview": 3, "validate": 2}
    said = log.read_text()
    assert "step 4: could not preview: TypeError: no such thing (test_failures.py, line" in said
    assert "out of memory (phase: preview)" in said and "--preview-steps 0" in said
    assert "step 6: could not validate: UserError: cannot read broken.png" in said
    # A defect keeps its traceback; what the user or the machine causes needs none.
    assert said.count("Traceback") == 1 and 'raise TypeError("no such thing")' in said
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step-000012.png"]
    assert run(tmp_path / "plain")
    assert_equal_weights(tmp_path / "run", tmp_path / "plain")  # and leave no trace in what is learnt


# ---- data ----


def unreadable() -> Line:
    """Data of which a file's disk fails in step 7."""
    return Line({6 * 6 + 3: OSError(errno.EIO, os.strerror(errno.EIO), "shard-3.safetensors")})


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_named_and_the_run_saved(tmp_path: Path, workers: int) -> None:
    config = dataclasses.replace(
        CONFIG, num_workers=workers, train_batch_size=3, gradient_accumulation_steps=2
    )
    with pytest.raises(
        RunError, match=r"step 7: .*point \d+, point \d+.*Input/output error.*shard-3"
    ) as caught:
        fit({"flow": Regression()}, unreadable(), config, tmp_path / "run", resume_line=LINE)
    assert "Saved at step 6" in caught.value.fix and LINE in caught.value.fix
    assert steps(tmp_path / "run")[-1] == 6
    assert run(tmp_path / "run", config)  # the disk is back: nothing is lost, not even dropout's random state
    assert run(tmp_path / "plain", dataclasses.replace(config, num_workers=0))
    assert_equal_weights(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize(
    ("workers", "error", "kind", "words"),
    [
        (1, UserError("row 3 is gone", "Put it back."), RunError, "row 3 is gone\nPut it back"),
        (0, MemoryError(), RunError, "point .*MemoryError\nLower --num-workers"),
        (0, RuntimeError("shapes do not match"), RuntimeError, "shapes do not match"),  # a defect
        (1, RuntimeError("shapes do not match"), RuntimeError, "Caught (.|\n)*shapes do not match"),
    ],
)
def test_what_a_data_set_raises_is_told_in_its_words(
    tmp_path: Path, workers: int, error: Exception, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        fit(
            {"flow": Regression()},
            Line({0: error}),
            dataclasses.replace(CONFIG, num_workers=workers),
            tmp_path,
        )
    assert ("Nothing was trained yet" in str(caught.value)) == (kind is RunError)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("a defect")])
def test_data_and_disk_that_fail_at_once_are_both_told(
    tmp_path: Path, error: Exception, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(saving.checkpoint, "write_checkpoint", write)
    with pytest.raises(RunError, match="Input/output error") as caught:
        fit(
            {"flow": Regression()},
            unreadable(),
            dataclasses.replace(CONFIG, checkpointing_steps=99),
            tmp_path,
        )
    assert "Step 6 could not be saved" in caught.value.fix
    assert ("Traceback" in log.read_text()) == isinstance(error, KeyError)  # of a defect only


def test_a_worker_that_is_killed_is_told_of_and_the_run_saved(tmp_path: Path) -> None:
    """As the kernel does when memory is short."""
    config = dataclasses.replace(CONFIG, num_workers=2)
    with pytest.raises(
        RunError, match=r"a process that loads data has died \(process \d+, exit status -9"
    ) as caught:
        fit(
            {"flow": Regression()},
            Line({9 * 6 + 3: signal.SIGKILL}),
            config,
            tmp_path / "run",
            resume_line=LINE,
        )
    # It loads up to four batches ahead, and what it had not yet handed over is lost with it.
    saved = steps(tmp_path / "run")[-1]
    assert 5 <= saved <= 9
    assert "--num-workers" in caught.value.fix and f"Saved at step {saved}" in caught.value.fix
    assert run(tmp_path / "run", dataclasses.replace(config, num_workers=1))  # another number of workers
    assert run(tmp_path / "plain")
    assert_equal_weights(tmp_path / "run", tmp_path / "plain")


class Leaving:
    """A process that has closed its files and is not yet reaped: it counts as alive until it is joined."""

    def __init__(self, sentinel: int) -> None:
        self.sentinel, self.alive, self.pid, self.exitcode = sentinel, True, 7, -9

    def is_alive(self) -> bool:
        return self.alive

    def join(self, timeout: float) -> None:
        self.alive = False


def test_a_worker_is_dead_although_its_end_is_not_yet_told() -> None:
    ended, write = os.pipe()
    os.close(write)
    running, open_end = os.pipe()
    leaving, working = Leaving(ended), Leaving(running)

    class Broken:
        _workers = (leaving, working)

        def __next__(self) -> Any:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    broken: Any = Broken()
    with pytest.raises(batches.DataFailed, match=r"has died \(process 7, exit status -9\)"):
        next(batches._checked(broken))
    assert working.alive
    for end in (ended, running, open_end):
        os.close(end)


# ---- disks ----


def test_a_full_disk_does_not_stop_training_and_fails_the_end_only(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = saving.checkpoint.write_checkpoint
    full = {8, 12}

    def write(folder: Path, *args: Any, **kwargs: Any) -> None:
        if saving.checkpoint.step_of(folder) in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(folder, *args, **kwargs)

    monkeypatch.setattr(saving.checkpoint, "write_checkpoint", write)
    with pytest.raises(
        RunError, match=r"step 12 is trained, but its checkpoint .*the last good one is step-000004"
    ) as caught:
        run(tmp_path / "run")
    assert caught.value.status == 1 and "same line" in caught.value.fix
    said = log.read_text()
    assert said.count("Trying again") == 2 and "step-000008 could not be written" in said
    assert steps(tmp_path / "run") == [4]
    full.clear()
    assert run(tmp_path / "run") and run(tmp_path / "plain")
    assert_equal_weights(tmp_path / "run", tmp_path / "plain")


def test_metrics_that_cannot_be_written_do_not_stop_training(tmp_path: Path, log: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert run(tmp_path / "run")
    assert log.read_text().count("metrics.jsonl cannot be written (No space left on device)") == 1


def test_an_export_of_an_earlier_target_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(folder: Path) -> None:
        (folder / "made").touch()

    callbacks = Callbacks(export=export, export_to=tmp_path / "result")
    assert run(tmp_path / "run", callbacks=callbacks)
    (tmp_path / "result" / "made").unlink()
    longer = dataclasses.replace(CONFIG, max_train_steps=14)
    with monkeypatch.context() as patch:  # killed after the last checkpoint
        patch.setattr(loop.Loop, "_export", lambda self: None)
        assert run(tmp_path / "run", longer, callbacks=callbacks)
    assert not (tmp_path / "result" / "made").exists()
    assert run(tmp_path / "run", longer, callbacks=callbacks)
    assert (tmp_path / "result" / "made").exists()


# ---- clocks and processes ----


def test_a_clock_that_jumps_back_changes_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    assert run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["images_per_second"] > 0 for row in rows)
    assert rows[-1]["time"] < rows[0]["time"]  # it did jump


def test_another_global_batch_is_refused_with_what_it_must_be(tmp_path: Path) -> None:
    assert run(tmp_path)
    other = dataclasses.replace(CONFIG, max_train_steps=14, train_batch_size=4)
    with pytest.raises(UserError, match="batch: 6 -> 4") as caught:
        run(tmp_path, other)
    assert "must be 6, over 1 processes" in caught.value.fix
    split = dataclasses.replace(other, train_batch_size=2, gradient_accumulation_steps=3)
    assert run(tmp_path, split)
    assert run(tmp_path, other)  # nothing is left to train with it: it may be the first stage of a longer run


def test_what_the_main_process_alone_finds_wrong_ends_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*arguments: Any, active: bool, **more: Any) -> None:
        if active:
            raise UserError("--report-to wandb could not start", "Run `wandb login`.")

    monkeypatch.setattr(loop, "Reporter", begin)

    def rank(number: int) -> None:
        with pytest.raises(UserError, match="wandb login"):
            run(tmp_path, dataclasses.replace(CONFIG, train_batch_size=3))

    run_ranks(2, rank)


def test_a_sample_that_another_process_has_is_blamed_as_well(tmp_path: Path) -> None:
    def rank(number: int) -> None:
        module = Regression(poison={2 * 6 + 4})  # in the second process's half of step 3
        config = dataclasses.replace(CONFIG, train_batch_size=3, max_train_steps=4)
        (tmp_path / "run").mkdir(exist_ok=True)
        log_to(tmp_path / "run")
        assert run(tmp_path / "run", config, module=module)

    run_ranks(2, rank)
    index = [one for batch in DataOrder(size=20, batch_size=6).batches(2, 3, 0) for one in batch][4].index
    said = (tmp_path / "run" / "train.log").read_text()
    assert "step 3: the loss or its gradient is not finite" in said and f"samples: point {index} (t" in said


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_that_fails_in_one_process_saves_the_run_of_all(tmp_path: Path, shard: bool) -> None:
    broken = Line({5 * 6 + 4: OSError("the disk is gone")})  # in the second process's half of step 6

    def train(rank: int) -> None:
        with pytest.raises(RunError, match=r"step 6: (a batch could not be read|another process)"):
            fit({"flow": NoDropout()}, broken, config, tmp_path)

    config = dataclasses.replace(CONFIG, train_batch_size=3, shard=shard)
    run_ranks(2, train)
    assert steps(tmp_path)[-1] == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone can be asked for it")
def test_tensors_of_a_step_on_a_cpu_come_from_memory_that_is_used_again() -> None:
    """A tensor of 30 MiB is no mapping of its own, which the system would clear each time."""
    program = """
import ctypes, torch
from latentflow.utils.memory import keep_freed_memory
KEEP
class Info(ctypes.Structure):
    _fields_ = [(f"f{number}", ctypes.c_size_t) for number in range(10)]
count = ctypes.CDLL(None).mallinfo2
count.restype = Info
before = count().f3  # mapped regions
kept = torch.ones(30 * 2**18)
print(count().f3 - before)
"""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc 2.33 is needed to see it")
    for call, mapped in (("keep_freed_memory()", "0"), ("", "1")):
        lines = [sys.executable, "-c", program.replace("KEEP", call)]
        assert subprocess.run(lines, capture_output=True, text=True, check=True).stdout.strip() == mapped
