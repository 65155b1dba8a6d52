"""A fine-tune of a pretrained model that is killed, started again, or spread over processes."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .command import call, call_on_two, losses, same_state, state
from .forking import fork_ranks
from .pretrained import ADAPTER, QUICK, adapter, base_flags, photos

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME = "FluxPipeline-dev"
STEPS = 30
# Two sizes, mirrored images, several captions for each, batches in two passes.
MIXED = shlex.split(
    "--buckets --random-flip --mirror-captions --gradient-accumulation-steps 2 --lora-rank 2 --learning-rate 1e-2 "
    "--checkpointing-steps 3 --lr-warmup-steps 2 --condition-dropout 0.2"
)


@pytest.fixture(scope="module")
def line(pretrained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    data = photos(tmp_path_factory.mktemp("data"), 16, 10, captions=False, wide=4)
    captions = ["a red apple", "an apple on the left", "a big apple, red"]
    entries = [{"file_name": f"{number}.png", "text": captions[: 1 + number % 3]} for number in range(10)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return [data, *base_flags(NAME, pretrained(NAME)), *QUICK, *MIXED]


@pytest.fixture(scope="module")
def whole(
    no_memorisation: None, line: list[Any], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run on one process that nobody stopped."""
    run = tmp_path_factory.mktemp("whole")
    said = call(cache, *line, "-o", run, "--train-batch-size", 2, "--max-train-steps", STEPS)
    assert "6 images with several captions" in said and "20x12: 4, 16x16: 6" in said, said
    return run


def test_killed_and_started_again_it_equals_the_run_that_was_never_stopped_bit_for_bit(
    whole: Path, line: list[Any], cache: Path, tmp_path: Path
) -> None:
    full = [*line, "-o", tmp_path, "--train-batch-size", 2, "--max-train-steps", STEPS]
    (process,) = fork_ranks(1, lambda rank: call(cache, *full))
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob("checkpoints/step-*/state.json")]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.3))
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / ADAPTER).exists()
    said = call(cache, *full)
    assert "step 1/" not in said, "it began anew"
    assert same_state(whole, tmp_path)
    kept = {key.partition(".")[0] for key in state(tmp_path)}
    assert kept == {"flow-weights", "flow-average", "flow-optimizer", "random"}
    one, two = adapter(whole), adapter(tmp_path)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert all(value.abs().max() > 0 for value in one.values())


def test_two_processes_learn_what_one_learns(
    whole: Path, line: list[Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for steps in (6, STEPS):  # the second goes on at step 6
        call_on_two(cache, *line, "-o", tmp_path, "--train-batch-size", 1, "--max-train-steps", steps)
    one, two = losses(whole), losses(tmp_path)
    assert len(one) == len(two) == STEPS and two == pytest.approx(one, abs=1e-4)
    first, second = adapter(whole), adapter(tmp_path)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-4)
