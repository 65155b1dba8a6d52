"""Shards survive kills and damage, are shared by processes, and stay within the cache's limit."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from latentflow.data.cache import store, tensors
from latentflow.data.cache.store import LOCK, LOOKS, Array, ShardSet, Tables, cache_limit, digests, open_cache
from latentflow.data.cache.tensors import RowIndex
from latentflow.errors import UserError

N, ROWS = 44, 8  # five shards of eight rows and one of four
KEYS = np.unique(digests(str(number) for number in range(N)))


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_ROWS", ROWS)
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LATENTFLOW_CACHE_LIMIT", raising=False)


def builder(record: Path, seconds: float = 0.0) -> Callable[[Array], Iterator[Tables]]:
    """Rows that hold their own position, four at a time; each is noted in a file that processes may share."""

    def build(chunk: Array) -> Iterator[Tables]:
        for part in np.split(chunk, range(4, len(chunk), 4)):
            time.sleep(seconds)
            with record.open("a") as file:
                file.write("".join(f"{row}\n" for row in part))
            values = torch.from_numpy(part).float()
            yield {"value": values[:, None].expand(-1, 3).contiguous(), "half": values / 2}

    return build


def built(record: Path) -> list[int]:
    return sorted(map(int, record.read_text().split())) if record.exists() else []


def fill(shards: ShardSet, record: Path, seconds: float = 0.0) -> RowIndex:
    def find() -> Array:
        shards.fill(KEYS, builder(record, seconds), 16)
        return shards.find(KEYS)

    return RowIndex(shards, find)


def assert_right(rows: RowIndex) -> None:
    table = rows.table("value")
    assert table is not None and table.shape == (N, 3)
    assert torch.equal(table[:], torch.arange(N).float()[:, None].expand(-1, 3))
    assert torch.equal(rows.column("half"), torch.arange(N) / 2)


def shard_files(shards: ShardSet) -> list[Path]:
    return sorted(shards.folder.glob("*.safetensors"))


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


def test_killed_while_writing_keeps_the_complete_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    shards = open_cache("things", {})

    def work() -> None:
        replace = Path.replace

        def stuck(path: Path, target: Path) -> Path:
            if len(shard_files(shards)) == 2:
                time.sleep(1000)
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", stuck)
        fill(open_cache("things", {}), record)

    child = in_child(work)
    wait_until(lambda: len(built(record)) == 3 * ROWS and len(list(shards.folder.glob("*.tmp"))) == 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(shard_files(shards)) == 2
    before = {path: path.stat().st_mtime_ns for path in shard_files(shards)}
    record.unlink()
    assert_right(fill(open_cache("things", {}), record))
    assert len(built(record)) == N - 2 * ROWS  # what was complete was not made again
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not list(shards.folder.glob("*.claim"))
    assert len(shard_files(shards)) == 6


def test_processes_share_the_work_and_make_nothing_twice(tmp_path: Path) -> None:
    record, theirs = tmp_path / "record", tmp_path / "theirs"
    child = in_child(lambda: assert_right(fill(open_cache("things", {}), theirs, 0.02)))
    wait_until(lambda: len(built(theirs)) >= 4)
    rows = fill(open_cache("things", {}), record, 0.02)
    assert_right(rows)  # those that the other process makes are waited for
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(built(record) + built(theirs)) == list(range(N))
    assert built(record) and built(theirs)


def test_a_process_that_dies_leaves_its_part_to_the_others(tmp_path: Path) -> None:
    record, theirs = tmp_path / "record", tmp_path / "theirs"
    child = in_child(lambda: assert_right(fill(open_cache("things", {}), theirs, 0.5)))
    wait_until(lambda: len(built(theirs)) >= 4)  # half a shard

    def kill_soon() -> None:
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)

    killer = in_child(kill_soon)
    assert_right(fill(open_cache("things", {}), record))
    os.waitpid(killer, 0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("damage", ["values", "keys", "torn", "empty"])
def test_only_a_damaged_shard_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    record = tmp_path / "record"
    shards = open_cache("things", {})
    assert_right(fill(shards, record))
    path = shard_files(shards)[2]
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    keys = KEYS.tobytes()
    at = next(place for place in range(start, len(data)) if data[place : place + 16] in keys)
    if damage in ("torn", "empty"):
        data = data[:-9] if damage == "torn" else bytearray()
    else:  # tables are kept in order of their types and names: the keys, bytes, come last
        data[at + 3 if damage == "keys" else at - 2] ^= 4
    del shards
    path.unlink()
    path.write_bytes(data)
    record.unlink()
    with caplog.at_level(logging.WARNING):
        assert_right(fill(open_cache("things", {}), record))
    assert len(built(record)) == ROWS and "damaged" in caplog.text and str(path) in caplog.text
    caplog.clear()
    assert_right(fill(open_cache("things", {}), record))
    assert len(built(record)) == ROWS and not caplog.text


def test_damage_is_found_before_a_row_is_used_and_reported_where_it_cannot_be_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    shards = ShardSet(tmp_path / "folder", "things")
    fill(shards, record)
    path = shard_files(shards)[0]
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 64 + 5] ^= 1  # behind the 64 bytes of checksums
    path.unlink()
    path.write_bytes(data)
    table = fill(ShardSet(tmp_path / "folder", "things", read_only=True), record).table("value")
    assert table is not None
    with pytest.raises(UserError, match=r"damaged.*\n.*only the damaged part"):
        table[:]
    table = fill(ShardSet(tmp_path / "folder", "things"), record).table("value")
    assert table is not None
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"damaged.*\n.*--num-workers 0"):
        patch.setattr(tensors, "get_worker_info", lambda: "a process that loads data")
        table[:]
    assert path.exists()  # it is the user's
    again = ShardSet(tmp_path / "folder", "things")
    again.verify()
    record.unlink()
    assert_right(fill(again, record))
    assert len(built(record)) == ROWS
    torn = path.read_bytes()[:-9]
    path.unlink()
    path.write_bytes(torn)
    with pytest.raises(UserError, match=f"{ROWS} of {N} things are missing"):
        fill(ShardSet(tmp_path / "folder", "things", read_only=True), record)
    assert path.read_bytes() == torn


def test_rows_are_indexed_as_a_tensor_is(tmp_path: Path) -> None:
    table = fill(open_cache("things", {}), tmp_path / "record").table("value")
    assert table is not None and table.dtype == torch.float32 and len(table) == N
    whole = table[:]
    several = (slice(2, 20, 3), [5, 1, 5], torch.tensor([4, 0]), torch.arange(N) > 40)
    for index in (3, -1, (2, 0), *several, (slice(0, 3), 1), ([5, 1], [0, 2]), ([5, 1], slice(1, 2))):
        assert torch.equal(table[index], whole[index]), index
    with pytest.raises(IndexError):
        table[N]
    assert torch.equal(torch.stack(list(table)), whole)


# --- how large it grows -------------------------------------------------------------------------------


def make(name: str, tmp_path: Path, used: float) -> ShardSet:
    """A set that was last used ``used`` seconds ago."""
    shards = open_cache("things", {"name": name})
    fill(shards, tmp_path / name)
    os.utime(shards.folder / LOCK, (time.time() - used, time.time() - used))
    return shards


def test_the_set_that_was_not_used_for_longest_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [
        make(name, tmp_path, used).folder for name, used in [("old", 300), ("older", 400), ("new", 200)]
    ]
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", str(int(3.2 * size)))
    with caplog.at_level(logging.INFO, logger="latentflow"):
        newest = make("newest", tmp_path, 0)
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert str(folders[1]) in caplog.text and "LATENTFLOW_CACHE_LIMIT" in caplog.text
    assert_right(fill(newest, tmp_path / "newest"))
    assert not list(tmp_path.rglob("*.deleted-*"))


def test_what_is_not_ours_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LATENTFLOW_CACHE may be a folder that holds other things."""
    names = "models/base.safetensors", "old/run.deleted-2/x.txt", f"models/{'a' * 40}.pt", "things/in-use"
    theirs = [tmp_path / "cache" / name for name in names]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    ours = tmp_path / "cache" / "latents" / f"{'a' * 40}.safetensors"  # of an earlier version
    ours.parent.mkdir()
    ours.write_bytes(bytes(1000))
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", "1")
    make("new", tmp_path, 0)
    assert all(path.exists() for path in theirs) and not ours.exists()


def test_what_is_remembered_of_images_counts_and_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = tmp_path / "cache" / LOOKS.format(1)
    used = make("used", tmp_path, 0)
    looks.write_bytes(bytes(10**6))
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", "2MB")
    make("new", tmp_path, 0)
    assert looks.exists()
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", "1MB")
    make("newest", tmp_path, 0)
    assert not looks.exists() and used.folder.exists()


def test_what_is_in_use_stays_and_the_excess_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    oldest = make("oldest", tmp_path, 500)
    rows = fill(oldest, tmp_path / "oldest")
    idle = make("idle", tmp_path, 100).folder
    size = sum(path.stat().st_size for path in idle.iterdir())
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", str(int(0.5 * size)))
    with caplog.at_level(logging.INFO, logger="latentflow"):
        newest = make("newest", tmp_path, 0)
    assert oldest.folder.exists() and newest.folder.exists() and not idle.exists()
    assert caplog.text.count("is in use") == 1
    assert_right(rows)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, size in {"20GB": 20e9, "500 mb": 500e6, "1.5G": 1.5e9, "4096": 4096, "": None}.items():
        monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", limit)
        assert cache_limit() == size
    monkeypatch.setenv("LATENTFLOW_CACHE_LIMIT", "plenty")
    with pytest.raises(UserError, match="'plenty'"):
        cache_limit()


def test_a_full_disk_keeps_rows_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(shard: object, folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Shard, "write", full)
    with caplog.at_level(logging.WARNING):
        assert_right(fill(open_cache("things", {}), tmp_path / "record"))
    assert caplog.text.count("No space left") == 1
    shards = ShardSet(tmp_path / "folder", "things")  # one of the user's
    with pytest.raises(OSError, match="No space left"):
        fill(shards, tmp_path / "record")
