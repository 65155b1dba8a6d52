"""The time of a run: what is left of it, what validations and previews may take, and what people see of both."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from latentflow.config import LoopConfig
from latentflow.training.loop import timing
from latentflow.training.loop.fit import Callbacks, fit
from latentflow.training.loop.timing import Clock
from latentflow.utils import progress
from latentflow.utils.progress import duration_text, progress_bar

from .forking import run_ranks
from .test_loop import CONFIG, Line, Regression


class Hands:
    """The clock's hands: they move only when a test moves them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr(timing.time, "perf_counter", made)
    return made


class Slow(Regression):
    """Each step takes half a second."""

    def __init__(self, hands: Hands) -> None:
        super().__init__()
        self._hands = hands

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._hands.sleep(0.5)
        result: dict[str, Any] = super().forward(batch)
        return result


def trained(
    folder: Path, hands: Hands, steps: int, validating: float = 3.0, previewing: float = 2.0, **settings: Any
) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    """Train; return the steps with validations and with previews, and the rows of metrics.jsonl."""

    def validate() -> dict[str, float]:
        hands.sleep(validating)
        return {"loss": 1.0}

    def preview() -> Image.Image:
        hands.sleep(previewing)
        return Image.new("RGB", (2, 2))

    config = dataclasses.replace(
        CONFIG, max_train_steps=steps, checkpointing_steps=10**6, log_steps=10, seed=1, **settings
    )
    fit(
        {"model": Slow(hands)},
        Line(),
        config,
        folder,
        callbacks=Callbacks(validate=validate, preview=preview),
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    previews = sorted(int(file.stem.removeprefix("step-")) for file in (folder / "samples").glob("*"))
    return [row["step"] for row in rows if "val_loss" in row], previews, rows


def test_validations_and_previews_take_at_most_their_share_of_the_time(
    tmp_path: Path, hands: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="latentflow")
    begun = hands.now
    often = {"validation_steps": 10, "preview_steps": 20}
    validated, previewed, _ = trained(tmp_path, hands, 1000, **often, validation_time=0.1)
    spent = 3.0 * len(validated) + 2.0 * len(previewed)
    assert 0.07 < spent / (hands.now - begun) <= 0.1
    assert validated[-1] == previewed[-1] == 1000 and len(validated) > 3 and len(previewed) > 3
    assert validated[0] < 200  # early ones are made before their cost is known
    assert caplog.text.count("is left out") == 1 and "at most 10% of the time" in caplog.text


def test_of_a_short_run_the_last_step_alone_is_validated(tmp_path: Path, hands: Hands) -> None:
    often = {"validation_steps": 10, "preview_steps": 10, "validation_time": 0.1}
    assert trained(tmp_path, hands, 60, **often)[:2] == ([60], [60])


@pytest.mark.parametrize("share", [None, 1.0])
def test_without_a_limit_all_that_are_due_are_made(tmp_path: Path, hands: Hands, share: float | None) -> None:
    often = {"validation_steps": 10, "preview_steps": 20, "validation_time": share}
    assert trained(tmp_path, hands, 50, **often)[:2] == ([10, 20, 30, 40, 50], [20, 40, 50])


def test_early_stopping_reads_all_validations(tmp_path: Path, hands: Hands) -> None:
    """When it ends a run must not depend on how fast the machine is; previews may be left out all the same."""
    often = {"validation_steps": 10, "preview_steps": 10, "validation_time": 0.1}
    validated, previewed, _ = trained(tmp_path, hands, 60, early_stop=2, **often)
    assert validated == [10, 20, 30] and len(previewed) < 3


def test_the_time_limit_is_the_default_unless_a_schedule_is_given() -> None:
    def limit(*given: str, **settings: Any) -> float | None:
        return LoopConfig(**settings).with_validation_time(given).validation_time

    assert LoopConfig().validation_time is None
    assert limit() == limit("learning_rate") == limit("preview_steps", preview_steps=0) == 0.1
    assert limit("validation_steps") == limit("preview_steps", preview_steps=7) == limit(early_stop=2) == 1.0
    # A run that goes on from its config.yaml, where all are given.
    assert limit("validation_steps", "validation_time", validation_time=0.1) == 0.1


def test_all_processes_leave_out_the_same(tmp_path: Path) -> None:
    """The main process decides: with its own clock each would wait for the other at another step."""

    def rank(number: int) -> None:
        clock = Clock(0.1)
        clock._begun -= 1e6 if number == 0 else 0.0  # the other would not afford any
        accelerator = Accelerator(cpu=True)
        assert clock.affords("validation", accelerator)
        clock = Clock(0.1)
        clock._begun -= 0.0 if number == 0 else 1e6
        assert not clock.affords("validation", accelerator)

    run_ranks(2, rank)


# ---- speed and the time that is left ----


def test_the_rate_is_that_of_training_steps_alone(tmp_path: Path, hands: Hands) -> None:
    rows = trained(tmp_path, hands, 40, validating=100.0, validation_steps=10, preview_steps=10)[2]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    samples = CONFIG.train_batch_size * CONFIG.gradient_accumulation_steps
    assert rates == pytest.approx([samples / 0.5] * len(rates)) and len(rates) == 5


def test_the_time_left_counts_all_that_a_run_does(hands: Hands) -> None:
    clock = Clock()
    assert clock.seconds_left(10) is None
    for number in range(11):
        with clock.step():
            hands.sleep(60.0 if number == 0 else 0.5)  # the first compiles
        if number == 5:
            with clock.interruption("validation"):
                hands.sleep(3.0)
            hands.sleep(2.0)  # a checkpoint
    assert clock.seconds == 65.0 and clock.steps == 11
    assert clock.seconds_left(100) == pytest.approx(100 * (10 * 0.5 + 5.0) / 10)


def test_what_comes_once_after_the_first_step_is_not_expected_again(hands: Hands) -> None:
    clock = Clock()
    for number in range(2):
        with clock.step():
            hands.sleep(60.0 if number == 0 else 0.5)
        hands.sleep(17.0 if number == 0 else 0.0)  # the first line is printed, the data's files are opened
    assert clock.seconds_left(148) == pytest.approx(148 * 0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_one_time_is_left_and_the_last_figures_are_those_of_the_last_step(
    tmp_path: Path, hands: Hands, monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := kind())
    losses = iter([0.5, 0.25])

    def validate() -> dict[str, float]:
        hands.sleep(1.0)
        return {"loss": next(losses)}

    config = dataclasses.replace(
        CONFIG, max_train_steps=60, validation_steps=30, checkpointing_steps=10**6, log_steps=10
    )
    fit({"model": Slow(hands)}, Line(), config, tmp_path, callbacks=Callbacks(validate=validate))
    lines = [line for line in re.split(r"[\r\n]+", shown.getvalue()) if line.strip()]
    last = lines[-1]
    assert "60/60" in last and "0.2500" in last and "0.5000" not in last and "left" not in last, last
    middle = [line for line in lines if "left" in line]
    assert middle and all(
        line.count("left") == 1 and "ETA" not in line and "<" not in line for line in middle
    )
    assert not any("MFU" in line for line in lines)
    if kind is io.StringIO:
        assert "\r" not in shown.getvalue()
        steps = [int(found[1]) for line in lines if (found := re.match(r"step (\d+)/60", line))]
        assert steps[0] == 1 and all(later - sooner <= 21 for sooner, later in pairwise(steps))


# ---- long work ----


def test_without_a_terminal_long_work_prints_whole_lines_and_short_work_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    for _ in progress_bar(range(30), desc="encoding images"):
        time.sleep(0.02)
    for _ in progress_bar(range(3), desc="short"):
        pass
    with progress_bar(desc="hidden", total=3, hidden=True) as bar:
        time.sleep(0.2)
        bar.update(3)
    lines = said.getvalue().splitlines()
    assert "\r" not in said.getvalue() and 3 <= len(lines) <= 15
    assert all(re.match(r"encoding images: \d+ of 30 in ", line) for line in lines), lines
    assert lines[-1].startswith("encoding images: 30 of 30")


def test_no_other_bar_is_used() -> None:
    root = Path(__file__).parents[2]
    files = [
        file for folder in ("latentflow", "train", "pipelines") for file in (root / folder).rglob("*.py")
    ]
    allowed = {"progress.py", "logging.py"}  # the helper, and the run's own bar
    assert not [file for file in files if "import tqdm" in file.read_text() and file.name not in allowed]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.06, "less than 1 s"), (1, "1 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
        (600, "10 min"), (3570, "1 h 00 min"), (3900, "1 h 05 min"), (1e6, "12 days"),
    ],
)  # fmt: skip
def test_durations_are_as_people_say_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
