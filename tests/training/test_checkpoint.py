"""Checkpoints: whole or not at all, verified, with a fallback; nothing is lost to full or read-only disks."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

from latentflow.config import LoopConfig
from latentflow.errors import RunError, UserError
from latentflow.training.loop import run_folder as folders
from latentflow.training.loop import saving
from latentflow.training.loop.checkpoint import (
    difference,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    refuse_changes,
    snapshot,
    write_checkpoint,
)
from latentflow.training.loop.run_folder import clean_up, write_folder
from latentflow.training.loop.saving import Saver


@pytest.fixture(autouse=True)
def _propagates() -> None:
    logging.getLogger("latentflow").propagate = True


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small tmpfs; skips where it cannot be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def state(step: int, numbers: int = 100) -> dict[str, Any]:
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": torch.randn(4)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    weights = {"a": torch.full((numbers,), float(step)), "b.c": torch.randn(3, 2), "n": torch.tensor(5)}
    return {"step": step, "weights": weights, "optimizer": [optimizer], "none": None}


def save_checkpoint(folder: Path, state: dict[str, Any], total_limit: int) -> None:
    write_checkpoint(folder, snapshot(state), total_limit=total_limit)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_round_trip_keeps_values_types_and_integer_keys(tmp_path: Path) -> None:
    written = state(7)
    save_checkpoint(tmp_path / "step-000007", written, total_limit=2)
    assert same(written, load_checkpoint(tmp_path / "step-000007"))
    assert not any(path.suffix in (".pt", ".bin", ".pkl") for path in tmp_path.rglob("*"))


def test_tied_tensors_survive(tmp_path: Path) -> None:
    shared = torch.randn(4)
    save_checkpoint(tmp_path / "step-1", {"w": {"a": shared, "b": shared}}, total_limit=1)
    assert torch.equal(load_checkpoint(tmp_path / "step-1")["w"]["b"], shared)


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path / f"step-{step:06d}", state(step), total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_a_save_that_was_killed_is_never_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-000001", state(1), total_limit=2)
    torn = tmp_path / ".step-000002.tmp"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    save_checkpoint(tmp_path / "step-000002", state(2), total_limit=2)  # and does not stand in the way
    assert load_checkpoint(tmp_path / "step-000002")["step"] == 2


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / "state.json").read_text())
        change(document)
        (folder / "state.json").write_text(json.dumps(document))

    return damage


def flipped(folder: Path) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flipped,
    "truncate": lambda folder: os.truncate(folder / "weights.safetensors", 50),
    "remove": lambda folder: (folder / "weights.safetensors").unlink(),
    "no JSON": lambda folder: (folder / "state.json").write_text("{"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "not UTF-8": lambda folder: (folder / "state.json").write_bytes(b"\xff"),
    "nested": lambda folder: (folder / "state.json").write_text("[" * 5000),
    "no hashes": rewritten(lambda document: document.pop("sha256")),
    "hashes of another kind": rewritten(lambda document: document.update(sha256=[1])),
    "no state": rewritten(lambda document: document.update(state=None)),
    "another step": rewritten(lambda document: document["state"].update(step=3)),
    "another tensor": rewritten(lambda document: document["state"].update(more={"__tensor__": "more"})),
    "of an older version, a tensor missing": rewritten(
        lambda document: (document.pop("state_sha256"), document["state"].update(more={"__tensor__": "more"}))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_loudly(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:06d}", state(step), total_limit=5)
    DAMAGES[damage](tmp_path / "step-000002")
    with caplog.at_level(logging.WARNING):
        loaded = load_latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    assert "step-000002 is damaged" in caplog.text and "falling back" in caplog.text
    assert (tmp_path / "step-000002").is_dir()  # nothing of it is removed


def test_a_checkpoint_of_an_older_version_is_read(tmp_path: Path) -> None:
    written = state(1)
    save_checkpoint(tmp_path / "step-000001", written, total_limit=1)
    rewritten(lambda document: document.pop("state_sha256"))(tmp_path / "step-000001")
    assert same(written, load_checkpoint(tmp_path / "step-000001"))


def test_only_damaged_checkpoints_are_an_error_none_is_not(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    save_checkpoint(tmp_path / "step-000001", state(1), total_limit=1)
    (tmp_path / "step-000001" / "state.json").unlink()
    with pytest.raises(UserError, match="all 1 checkpoints"):
        load_latest(tmp_path)


def test_another_rank_is_named_once_and_nothing_that_cannot_work_is_offered(tmp_path: Path) -> None:
    def described(rank: int) -> dict[str, Any]:
        shapes = {f"blocks.{i}.attn.qkv.lora_A.default.weight": [rank, 256] for i in range(30)}
        return {"adapter": {"lora_rank": rank}, "network": shapes, "batch": 64}

    with pytest.raises(UserError) as caught:
        refuse_changes(tmp_path, {"step": 22, "description": described(16)}, described(8), LoopConfig(), 1)
    first, shapes = caught.value.what.splitlines()[1:]
    assert (
        first.strip() == "adapter.lora_rank: 16 -> 8"
        and "another shape: 30, such as network.blocks.0" in shapes
    )
    assert "--allow-changes" not in caught.value.fix  # it would fail
    with pytest.raises(UserError, match="--allow-changes"):
        refuse_changes(
            tmp_path,
            {"step": 22, "description": {"batch": 64, "flow": 1}},
            {"batch": 64, "flow": 2},
            LoopConfig(),
            1,
        )


def test_difference_names_the_path_and_both_values() -> None:
    lines = list(difference({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5, "c": 2}, "e": 4}))
    assert lines == ["a.b: 1 -> 5", "d: 3 -> None", "e: None -> 4"]


# ---- saving beside training ----


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_the_state_at_the_save_whatever_training_does_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = saving.checkpoint.write_checkpoint

    def slow(*args: object, **kwargs: object) -> None:
        assert go_on.wait(30)
        write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(saving.checkpoint, "write_checkpoint", slow)
    saver, live = Saver(tmp_path, 5), state(1)
    for step in (1, 2):  # the second uses the memory of the first again
        live["step"] = step
        live["weights"]["a"].fill_(step)
        if step == 2:
            go_on.set()  # a save waits for the one before it
        saver.save(step, live)
        live["weights"]["a"].fill_(-1.0)
    saver.close()
    for step in (1, 2):
        assert load_checkpoint(tmp_path / f"step-{step:06d}")["weights"]["a"].unique().item() == step


def test_a_snapshot_reuses_memory_only_where_it_fits() -> None:
    first = snapshot({"w": {"a": torch.zeros(3), "b": torch.zeros(2)}})
    memory = first.files["w"]["w/a"].data_ptr()
    second = snapshot({"w": {"a": torch.ones(3), "b": torch.ones(4)}}, first)
    assert second.files["w"]["w/a"].data_ptr() == memory and second.files["w"]["w/a"].sum() == 3
    assert second.files["w"]["w/b"].shape == (4,)
    assert second.size == 7 * 4


def test_a_failed_save_is_a_warning_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, 2)
    saver.save(1, state(1))
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(
            saving.checkpoint,
            "write_checkpoint",
            Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")),
        )
        saver.save(2, state(2))
        while saver._running is not None:
            saver.poll()
    assert "step-000002 could not be written: No space left" in caplog.text
    assert "needed" in caplog.text and "last good one is step-000001" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(saving, "snapshot", Mock(side_effect=MemoryError))
        saver.save(3, state(3))
        patch.setattr(saving, "snapshot", Mock(side_effect=RuntimeError("a defect")))
        with pytest.raises(RuntimeError, match="a defect"):
            saver.save(3, state(3))
    assert "step 3: too little memory to copy the state" in caplog.text
    saver.save(4, state(4))
    saver.close()
    assert names(tmp_path) == ["step-000001", "step-000004"]


def test_a_full_disk_costs_no_old_checkpoint_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "3m"):
        root = tmp_path / "disk" / "checkpoints"
        saver = Saver(root, 1)
        saver.save_now(1, state(1, 500_000))  # 2 MB
        with pytest.raises(RunError, match=r"No space left.*free there, 1.9 MiB are needed") as caught:
            saver.save_now(2, state(2, 500_000))
        assert caught.value.status == 1 and "Free some space" in caught.value.fix
        # It fills up during the save as well: the estimate is not the only guard.
        monkeypatch.setattr(saving.shutil, "disk_usage", Mock(return_value=Mock(free=10**9)))
        with pytest.raises(RunError, match="No space left"):
            saver.save_now(2, state(2, 500_000))
        assert names(root) == ["step-000001"]
        loaded = load_latest(root)
        assert loaded is not None and loaded["step"] == 1
        saver.save_now(3, state(3, 1000))  # small enough: the run goes on, and only now the old one goes
        assert names(root) == ["step-000003"]
        saver.close()


def test_a_file_that_may_not_grow_is_told_of(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 2)
    saver.save_now(1, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="File too large") as caught:
            saver.save_now(2, state(2, 500_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ulimit" in caught.value.fix
    assert names(tmp_path) == ["step-000001"]
    saver.close()


def test_a_folder_that_became_read_only_is_told_of_and_keeps_what_it_has(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "3m"):
        root = tmp_path / "disk"
        saver = Saver(root, 2)
        saver.save_now(1, state(1))
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        with pytest.raises(RunError, match="Read-only file system") as caught:
            saver.save_now(2, state(2))
        assert "writing again" in caught.value.fix
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        saver.save_now(2, state(2))
        assert names(root) == ["step-000001", "step-000002"]
        saver.close()


def test_a_damaged_newer_checkpoint_never_costs_the_one_just_written(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 1)
    saver.save_now(12, state(12))
    (tmp_path / "step-000012" / "state.json").write_text("{")
    saver.save_now(11, state(11))  # resumed from before 12, stopped at 11
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded["step"] == 11
    saver.close()


def test_checkpoints_are_ordered_by_number_and_only_ours_are_counted(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000001-my-backup").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".step-000004.tmp", ".step-000002.gone", ".step-mine.tmp", ".cache", "step-000004"):
        (tmp_path / name).mkdir()
    removed = clean_up(tmp_path, r"step-\d+")
    assert [path.name for path in removed] == [".step-000002.gone", ".step-000004.tmp"]
    assert names(tmp_path) == [".cache", ".step-mine.tmp", "step-000004"]


@pytest.mark.parametrize(
    "error", [SafetensorError("header too large"), SafetensorError("I/O error: no space (os error 28)")]
)
def test_a_folder_that_could_not_be_written_is_as_it_was(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    write_folder(folder, lambda path: fill(path, "old"))
    with pytest.raises(OSError if "28" in str(error) else SafetensorError):
        write_folder(folder, Mock(side_effect=error))
    monkeypatch.setattr(folders, "_sync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        write_folder(folder, lambda path: fill(path, "new"))
    assert names(tmp_path) == ["result"] and (folder / "a").read_text() == "old"


@pytest.mark.parametrize("call", range(10))
def test_killed_at_any_call_a_replaced_folder_is_the_old_or_the_new_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Stops dead before each of the calls that change the disk, as SIGKILL does, and starts again."""
    folder = tmp_path / "result"
    write_folder(folder, lambda path: fill(path, "old"))
    calls = 0

    class KilledError(BaseException):
        pass

    def counted(function):  # type: ignore[no-untyped-def]
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                raise KilledError
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_sync", counted(folders._sync))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(folders.shutil, "rmtree", counted(folders.shutil.rmtree))
        try:
            write_folder(folder, lambda path: fill(path, "new"))
            died = False
        except KilledError:
            died = True
    assert died == (call < 9)
    clean_up(tmp_path, "result")
    contents = {file.read_text() for file in folder.iterdir()}
    assert contents in ({"old"}, {"new"}) and len(list(folder.iterdir())) == 2
    assert names(tmp_path) == ["result"]


def fill(path: Path, text: str) -> None:
    for name in "ab":
        (path / name).write_text(text)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_sigkill_while_saving_leaves_the_newest_complete_checkpoint(tmp_path: Path, delay: float) -> None:
    """A process that does nothing but save, 4 MB at a time, killed a moment after its second checkpoint is there."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not forked with the process
            saver, step = Saver(tmp_path, 2), 0
            while True:
                step += 1
                tensors = {str(number): torch.full((200_000,), float(step)) for number in range(5)}
                saver.save(step, {"step": step, "w": tensors})
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "step-000002").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    clean_up(tmp_path, r"step-\d+")
    found = list_checkpoints(tmp_path)
    assert len(found) >= 2 and not list(tmp_path.glob(".*"))
    for folder in found:
        loaded = load_checkpoint(folder)
        assert all(bool((one == loaded["step"]).all()) for one in loaded["w"].values())
