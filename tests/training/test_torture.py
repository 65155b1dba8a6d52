"""Twenty-five SIGKILLs over one run, which ends with the weights of the run that was never killed.

pytest -n0 --run-slow -s tests/training/test_torture.py     (KILLS=5 in the environment: fewer)
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .command import TINY, call
from .forking import fork_ranks

KILLS = int(os.environ.get("KILLS", 25))
SETTINGS = [
    *TINY, "--autoencoder-steps", 3, "--max-train-steps", 150, "--checkpointing-steps", 1, "--validation-steps", 50,
    "--preview-steps", 125, "--mixed-precision", "no",
]  # fmt: skip


class Attempt:
    """The program in forked processes: nothing is imported again, so that the kills fall into the run itself."""

    def __init__(self, cache: Path, line: list[object], processes: int, log: Path) -> None:
        def run(rank: int) -> None:
            said = log.with_suffix(f".{rank}.txt")
            try:
                said.write_text(call(cache, *line))
            except BaseException as error:
                said.write_text(str(error))
                raise

        self.ranks = fork_ranks(processes, run)
        self.status: dict[int, int] = {}

    def running(self) -> bool:
        for process in self.ranks:
            if process not in self.status:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.status[process] = status
        return len(self.status) < len(self.ranks)

    def kill(self) -> bool:
        """SIGKILL to every process; whether all of them were still running."""
        alive = self.running() and not self.status
        for process in self.ranks:
            if process not in self.status:
                os.kill(process, signal.SIGKILL)
                _, self.status[process] = os.waitpid(process, 0)
        return alive

    def finish(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()
        assert not any(self.status.values()), self.status


def half_written(run: Path) -> list[Path]:
    return [
        *run.glob("checkpoints/.step-*"),
        *run.glob("autoencoder/checkpoints/.step-*"),
        *run.glob(".pipeline.*"),
    ]


def entries(cache: Path) -> set[Path]:
    return set(cache.rglob("*"))


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def kill_at(moment: str, attempt: Attempt, run: Path, cache: Path, rng: random.Random) -> str | None:
    """Kill at a moment of the kind; where it fell: "save", "cache", "other", or None if the run had ended."""
    before, until, seconds = entries(cache), newest(run) + rng.randint(1, 5), rng.uniform(0, 8)
    start = time.monotonic()
    ready: dict[str, Callable[[], bool]] = {
        # Of the network: the autoencoder's three steps would never end if each of their saves were hit.
        "save": lambda: newest(run) >= until - 1 and any(run.glob("checkpoints/.step-*")),
        "cache": lambda: entries(cache) != before,
        "any": lambda: newest(run) >= until or time.monotonic() > start + seconds,
    }
    while attempt.running() and not ready[moment]() and time.monotonic() < start + 60:
        time.sleep(0.0003)
    time.sleep(rng.uniform(0, 0.01))
    alive = attempt.kill()
    if not alive:
        return None
    if half_written(run):
        return "save"
    return "cache" if entries(cache) != before else "other"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [*last.glob("*.safetensors"), *(run / "pipeline").rglob("*.safetensors")]
    return {
        f"{file.name}/{file.parent.name[:4]}/{key}": one
        for file in files
        for key, one in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"), [(1, []), (2, []), (2, ["--shard"])], ids=["one", "two", "sharded"]
)
def test_a_run_killed_25_times_equals_the_run_that_was_never_killed(
    images: Path, tmp_path: Path, processes: int, flags: list[str]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    rng, settings = random.Random(seed), [*SETTINGS, *flags, "--train-batch-size", 4 // processes]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        for folder in (tmp_path / "cache-warm", tmp_path / "cache-whole", tmp_path / "cache"):
            folder.mkdir()
        # What the program imports is imported here, once: the kills are to fall into the run, not before it.
        call(tmp_path / "cache-warm", images, "-o", tmp_path / "warm", *settings, "--max-train-steps", 1)
        Attempt(
            tmp_path / "cache-whole", [images, "-o", whole, *settings], processes, tmp_path / "whole"
        ).finish(600)
        fell: Counter[str] = Counter()
        moments = ["cache"] * 4 + rng.choices(["save", "any"], [12, 9], k=KILLS)
        while sum(fell.values()) < KILLS:
            moment = moments[sum(fell.values())]
            if moment == "cache" and (killed / "checkpoints").exists():
                moment = "save"  # caches are complete before the network is trained
            attempt = Attempt(
                tmp_path / "cache", [images, "-o", killed, *settings], processes, tmp_path / "killed"
            )
            where = kill_at(moment, attempt, killed, tmp_path / "cache", rng)
            said = "".join(file.read_text() for file in tmp_path.glob("killed.*.txt"))
            assert where is not None, f"seed {seed}: the run ended after {fell}: {said[-3000:]}"
            fell[where] += 1
            done = sorted((killed / "checkpoints").glob("step-*"))
            print(
                f"kill {sum(fell.values())}: {moment} -> {where}, {done[-1].name if done else 'no checkpoint yet'}"
            )
        Attempt(tmp_path / "cache", [images, "-o", killed, *settings], processes, tmp_path / "killed").finish(
            600
        )
    finally:
        torch.set_num_threads(threads)
    print(f"seed {seed}: {KILLS} kills fell into {dict(fell)}")
    assert fell["save"] >= KILLS // 5 and fell["cache"] >= 1
    assert not half_written(killed)
    first, second = tensors(whole), tensors(killed)
    assert first.keys() == second.keys() and len(first) > 100
    assert all(torch.equal(first[key], second[key]) for key in first)
