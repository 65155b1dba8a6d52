"""The commands that `latentflow check` suggests: they work when pasted, and state what the program then does."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from latentflow.config import PRESETS, RunConfig
from latentflow.data import Report
from latentflow.data.checking.report import reach
from latentflow.training import estimate
from latentflow.training.suggest import _CHECKPOINT, _FITS, Machine, suggest

from ..data.images import load_program, noise, save_all

CPU, GPU = Machine("cpu", 100e9), Machine("cuda", 100e12)


def report(side: int, images: int = 5000, condition: str = "class") -> Report:
    sizes = [(side, 2 * side)] * images
    counts = {f"{side}x{2 * side}": images}
    return Report("my cats", condition, images, sizes=counts, reach=reach(sizes), kept_by_square_crop=0.5)


@pytest.mark.parametrize(
    ("condition", "flags"),
    [("text", ()), ("class", ()), ("unconditional", ()), ("text", ("--control", "image"))],
)
def test_commands_work_when_pasted(
    condition: str,
    flags: tuple[str, ...],
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(estimate, "_TIMED_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        folder = tmp_path / "my cats" / ("ab"[number % 2] if condition == "class" else "")
        folder.mkdir(parents=True, exist_ok=True)
        noise(number, width=80, height=70).save(folder / f"{number}.png")
        if condition == "text":
            (folder / f"{number}.txt").write_text(f"cat number {number}")
        if flags:
            noise(number, width=80, height=70).save(folder / f"{number}-control.png")
    load_program(repository / "train" / "check.py").main(["my cats", *flags])
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  latentflow train")]
    steps = [
        match.groups() for line in lines if (match := re.match(r" +steps: ([\d,]+) of (\d+) samples", line))
    ]
    assert len(commands) == 2 and ["--lora-rank" in command for command in commands] == [False, True]
    train = load_program(repository / "train" / "flow.py").main
    for command, (count, batch) in zip(commands, steps, strict=True):
        train([*command[2:], "--dry-run"])
        plan = capsys.readouterr().err
        assert f"plan: {count} steps of {batch} samples" in plan
        assert f"condition: {'text' if condition == 'class' else condition}" in plan
        gflops = float(re.findall(r"compute: ([\d.]+) GFLOPs a sample", plan)[0])
        assert gflops == pytest.approx(_CHECKPOINT.gflops, rel=0.1)


@pytest.mark.parametrize(("side", "preset"), [(32, "tiny"), (64, "small")])
def test_a_new_network_costs_what_is_assumed(
    side: int,
    preset: str,
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(estimate, "_TIMED_SECONDS", 0.02)
    save_all(tmp_path, [f"{number}.png" for number in range(8)])
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("a cat")
    (suggestion,) = suggest(dataclasses.replace(report(side, 50_000, "text"), data=str(tmp_path)), CPU)
    load_program(repository / "train" / "flow.py").main([*shlex.split(suggestion.command)[2:], "--dry-run"])
    gflops = float(re.findall(r"compute: ([\d.]+) GFLOPs a sample", capsys.readouterr().err)[0])
    assert _FITS[preset].side == side and gflops == pytest.approx(_FITS[preset].gflops, rel=0.3)


@pytest.mark.parametrize(
    ("images", "starts"),
    [
        (20, ["fine-tune", "or train an adapter"]),
        (999, ["fine-tune", "or train an adapter"]),
        (1000, ["fine-tune", "train from scratch"]),
        (3000, ["train from scratch", "fine-tune"]),
        (50_000, ["train from scratch"]),
    ],
)
@pytest.mark.parametrize("condition", ["text", "class", "unconditional"])
def test_few_images_start_from_a_checkpoint(images: int, starts: list[str], condition: str) -> None:
    suggestions = suggest(report(100, images, condition), CPU)
    assert all(s.title.startswith(start) for s, start in zip(suggestions, starts, strict=True))
    outputs = [shlex.split(s.command)[shlex.split(s.command).index("-o") + 1] for s in suggestions]
    assert len(set(outputs)) == len(outputs), "two runs in one folder"
    assert all(f"{s.reasons['time']}".startswith("about ") for s in suggestions)


@pytest.mark.parametrize(
    ("side", "machine", "resolution", "preset"),
    [(20, CPU, 32, "tiny"), (63, GPU, 32, "tiny"), (64, CPU, 64, "small"), (500, CPU, 64, "small"),
     (130, GPU, 128, "small"), (500, GPU, 256, "base")],
)  # fmt: skip
def test_a_line_from_scratch_is_one_that_train_takes(
    side: int, machine: Machine, resolution: int, preset: str, repository: Path
) -> None:
    suggestion = suggest(report(side), machine, ("--masks", "alpha"))[0]
    words = shlex.split(suggestion.command)
    assert words[:3] == ["latentflow", "train", "my cats"]
    config = load_program(repository / "train" / "flow.py").parse(
        RunConfig,
        words[2:],
        prog="latentflow train",
        presets=PRESETS,
    )
    assert config.data.resolution == resolution and config.data.masks == "alpha"
    assert words[words.index("--preset") + 1] == preset and (config.vae is not None) == (resolution == 256)
    assert all(choice in suggestion.command for choice in suggestion.reasons if choice.startswith("--"))
    assert f"batches of {config.loop.train_batch_size};" in "".join(suggestion.reasons.values())


def _scratch(images: int, side: int) -> tuple[int, float, float]:
    """Return the steps of a training from scratch, its epochs and those of its autoencoder."""
    words = shlex.split(next(s for s in suggest(report(side, images), CPU) if "scratch" in s.title).command)
    given = {
        name: int(words[words.index(f"--{name}") + 1]) for name in ("max-train-steps", "autoencoder-steps")
    }
    batch = PRESETS[words[words.index("--preset") + 1]]["train_batch_size"]
    steps, first = given.values()
    return steps, steps * batch / images, first * 16 / images


@pytest.mark.parametrize("side", [32, 64])
def test_steps_grow_with_the_images(side: int) -> None:
    assert _scratch(1000, side)[0] == 2000  # the floor
    epochs = [_scratch(images, side)[1] for images in (12_800, 51_200, 204_800)]
    assert epochs == pytest.approx([35, 17.5, 8.75], rel=0.05)
    for images in (1000, 50_000, 300_000):
        assert _scratch(images, side)[2] >= 1, "the autoencoder does not see every image"


def test_time_is_work_by_speed_and_at_least_that_of_starting_kernels() -> None:
    assert CPU.seconds(10, 2e9) == pytest.approx(10 * 2e9 / (0.2 * 100e9))
    assert GPU.seconds(10, 4e12) == pytest.approx(10 * 4e12 / (0.4 * 100e12))
    assert GPU.seconds(1000, 1.0) == pytest.approx(30)


@pytest.mark.parametrize(("kept", "buckets"), [(0.5, True), (0.89, True), (0.91, False), (1.0, False)])
def test_several_aspect_ratios_are_suggested_where_a_square_cuts_off_much(kept: float, buckets: bool) -> None:
    suggestion = suggest(dataclasses.replace(report(64), kept_by_square_crop=kept), CPU)[0]
    assert ("--buckets" in shlex.split(suggestion.command)) == buckets == ("--buckets" in suggestion.reasons)
    if buckets:
        assert f"{1 - kept:.0%} of an image" in suggestion.reasons["--buckets"]


def test_masks_are_a_reason_of_their_own() -> None:
    suggestion = suggest(dataclasses.replace(report(64), masks=3), CPU)[0]
    assert "3 images with a mask" in suggestion.reasons["masks"]


def test_names_of_classes_are_captions_for_the_checkpoint() -> None:
    classes = dict.fromkeys(["apple", "ruota_dentata"], 50)
    few = dataclasses.replace(report(64, 100), classes=classes)
    for suggestion in suggest(few, CPU, ("--condition", "class", "--masks", "alpha")):
        words = shlex.split(suggestion.command)
        assert words.count("--condition") == 1 and words[words.index("--condition") + 1] == "text"
        assert words[-2:] == ["--masks", "alpha"]
    whole = suggest(few, CPU)[0]
    assert whole.reasons["new words"].endswith(
        "2 words from your images alone, and the more images have a word, the better: 'ruota', 'dentata'"
    )
    scratch = suggest(dataclasses.replace(report(64), classes=classes), CPU, ("--condition", "class"))[0]
    assert "--condition class" in scratch.command


def test_words_that_the_checkpoint_does_not_know_are_named_before_hours_are_spent() -> None:
    captions = ["red apple", "ruota dentata", "a red ruota!"]
    whole, adapter = suggest(report(64, 100, "text"), CPU, captions=captions)
    assert whole.reasons["new words"].startswith(
        "pictograms-128 knows all words of 1 of your 3 captions; it learns 2 words"
    )
    assert whole.reasons["new words"].endswith(": 'ruota', 'dentata'") and "new words" not in adapter.reasons
    assert "new words" not in suggest(report(64, 100, "text"), CPU, captions=["red apple"])[0].reasons


def test_nothing_is_suggested_for_what_cannot_be_trained_on() -> None:
    assert suggest(Report("x", "unknown", problems=("no",)), CPU) == []


def test_runs_are_named_after_the_data() -> None:
    for data, name in (("cats/train", "cats"), ("hub:owner/my set", "my-set"), ("cats.csv", "cats")):
        assert (
            f"-o runs/{name}-scratch" in suggest(dataclasses.replace(report(64), data=data), CPU)[0].command
        )
