"""One run in one folder, across processes, deaths and hosts."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from latentflow.errors import RunError, UserError
from latentflow.training.loop import run_folder as module
from latentflow.training.loop.run_folder import run_lock

from .forking import fork_ranks, run_ranks


def test_a_second_run_is_refused_in_words_and_a_killed_one_gives_way_at_once(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold(rank: int) -> None:
        with run_lock(tmp_path):
            child = os.fork()  # as a process that loads data: it must not keep the lock
            if child:
                os.write(told, f"{child}\n".encode())
            time.sleep(100)

    (holder,) = fork_ranks(1, hold)
    orphan = int(os.read(ready, 20))
    try:
        words = rf"process {holder} on host {socket.gethostname()}, started 2"
        with pytest.raises(UserError, match=words) as caught:
            run_lock(tmp_path).__enter__()
        assert str(tmp_path) in caught.value.what and "another output folder" in caught.value.fix
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with run_lock(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(orphan, signal.SIGKILL)


def other_process_may_enter(folder: Path) -> bool:
    def enter(rank: int) -> None:
        with run_lock(folder):
            pass

    (process,) = fork_ranks(1, enter)
    return os.waitpid(process, 0)[1] == 0


def test_the_same_process_may_enter_again_and_keeps_the_lock_until_the_outer_end(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with run_lock(tmp_path):
            pass
        assert (tmp_path / "run.lock").read_text()
        assert not other_process_may_enter(tmp_path)
    assert (tmp_path / "run.lock").read_text() == ""  # an orderly end
    with run_lock(tmp_path):
        pass


def left_by_another_host(folder: Path) -> None:
    (folder / "run.lock").write_text(
        json.dumps({"pid": 7, "host": "elsewhere", "started": "2026-01-01 00:00:00"})
    )


def test_a_lock_of_another_host_is_taken_over_when_it_shows_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    left_by_another_host(tmp_path)
    start = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - start >= 0.15
        assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()


def test_a_run_that_lives_on_another_host_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.3)
    left_by_another_host(tmp_path)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.1):
            os.utime(tmp_path / "run.lock")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on host elsewhere"):
            run_lock(tmp_path).__enter__()
    finally:
        stop.set()
        thread.join()


def test_the_holder_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    with run_lock(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").stat().st_mtime > 0


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("latentflow").propagate = True
    monkeypatch.setattr(module.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with run_lock(tmp_path):
        assert "file system without locks: start no second run there" in caplog.text


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"run folder .*file/run could not be written"):
        run_lock(tmp_path / "file" / "run").__enter__()


def test_a_folder_in_use_is_refused_in_every_process_and_none_waits_for_the_other(tmp_path: Path) -> None:
    def rank(number: int) -> None:
        with pytest.raises(UserError, match=f"process {os.getppid()} on host"):
            run_lock(tmp_path).__enter__()
        with run_lock(tmp_path / "free"):  # entered by all, held by one
            assert ((tmp_path / "free" / "run.lock").read_text() != "") or number
            with run_lock(tmp_path / "free"):
                pass

    with run_lock(tmp_path):
        run_ranks(2, rank)
    assert (tmp_path / "free" / "run.lock").read_text() == ""
