"""`latentflow train` as users run it: killed, resumed, on two processes, fine-tuned, and given nonsense."""

from __future__ import annotations

import html
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentflow import LatentFlowPipeline
from latentflow.data import Source
from latentflow.errors import UserError
from latentflow.training.data import refuse_renumbered_classes
from latentflow.training.report.page import report_page

from ..data.images import noise
from .command import (
    ROOT,
    TINY,
    call,
    call_on_two,
    environment,
    losses,
    opened,
    same_state,
    sampled,
    save_images,
    state,
)  # fmt: skip
from .forking import fork_ranks

EIGHT = [*TINY, "--max-train-steps", 8, "--checkpointing-steps", 2]


@pytest.fixture(scope="module")
def finished(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of 8 steps, and its output. (tests/test_wheel.py has one in a process of its own.)"""
    run = tmp_path_factory.mktemp("finished")
    return run, call(cache, images, "-o", run, *EIGHT)


def test_a_run_leaves_what_the_documentation_lists(finished, images) -> None:
    run, said = finished
    files = "config.yaml metrics.jsonl train.log samples/step-000008.png pipeline/model_index.json"
    for name in files.split():
        assert (run / name).is_file(), name
    assert "captions from metadata.jsonl" in said  # what was inferred is said before training
    assert "memorise" in said and "no GPU" in said
    data = [f"{number:02d}.png" for number in range(12)] + ["metadata.jsonl"]
    assert sorted(path.name for path in images.iterdir()) == data
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert any("val_loss" in row for row in rows)
    image = opened(run / "pipeline")("a red circle", num_inference_steps=2).images[0]
    assert image.size == (16, 16) and image.mode == "RGB"


def begin(run: Path, cache: Path, *arguments: object, losses: int, expect: int = 0) -> int:
    """Start a run in a forked process, and wait until it has logged so many losses; the process' id."""
    (process,) = fork_ranks(1, lambda rank: call(cache, *arguments, "-o", run, expect=expect))
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count('"loss"') >= losses):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def test_killed_at_a_random_moment_and_started_again_equals_the_uninterrupted_run_bit_for_bit(
    finished, images, cache, tmp_path
) -> None:
    process = begin(tmp_path, cache, images, *EIGHT, losses=random.Random().randint(1, 6))
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it ended before it could be killed"
    call(cache, images, *EIGHT, "-o", tmp_path)
    assert same_state(finished[0], tmp_path) and len(state(tmp_path)) > 50


def test_a_result_that_is_made_again_keeps_what_the_user_put_there(finished, images, cache, tmp_path) -> None:
    run = shutil.copytree(finished[0], tmp_path / "run")
    for mark in run.rglob("exported"):  # as in runs of before there was this mark
        mark.unlink()
    notes = [run / folder / "notes.txt" for folder in ("pipeline", "autoencoder/autoencoder")]
    for note in notes:
        note.write_text("mine")
    card = (run / "pipeline" / "README.md").read_text()
    call(cache, images, "-o", run, *EIGHT)
    assert len(list(run.rglob("exported"))) == 2  # both were made again
    assert all(note.read_text() == "mine" for note in notes)
    assert len(list((run / "pipeline").glob("README*"))) == 1
    assert (run / "pipeline" / "README.md").read_text() != card  # of a run that lies elsewhere now
    LatentFlowPipeline.from_pretrained(run / "pipeline")


def test_config_yaml_reproduces_the_run(finished, cache, tmp_path) -> None:
    config = finished[0] / "config.yaml"
    data = next(line.split(": ")[1] for line in config.read_text().splitlines() if line.startswith("data:"))
    call(cache, data, "--config", config, "-o", tmp_path)
    assert same_state(finished[0], tmp_path)


def test_sigterm_saves_and_prints_the_line_that_resumes(images, cache, tmp_path) -> None:
    line = [images, *TINY, "--max-train-steps", 100000]
    process = begin(tmp_path, cache, *line, losses=3, expect=143)
    os.kill(process, signal.SIGTERM)
    assert os.waitpid(process, 0)[1] == 0
    said = (tmp_path / "train.log").read_text()
    assert "resume with" in said and f"latentflow train {images}" in said, said
    assert list((tmp_path / "checkpoints").glob("step-*/state.json"))


def torchrun(cache: Path, *arguments: object) -> None:
    # Not `accelerate launch --cpu --num_processes 2`: accelerate 1.15 starts one process there, without a word.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train" / "flow.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launch", [call_on_two, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_and_resume_like_one_with_the_same_global_batch(
    launch, images, cache, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    quick = "--mixed-precision no --validation-steps 0 --preview-steps 0 --lr-scheduler constant"
    settings = [images, *TINY, "--checkpointing-steps", 10, *quick.split()]
    # One process trains the autoencoder both times: only the flow is compared.
    call(cache, *settings, "-o", tmp_path / "one", "--train-batch-size", 4, "--max-train-steps", 20)
    settings += ["--vae", tmp_path / "one" / "autoencoder" / "autoencoder", "--train-batch-size", 2]
    for steps in (10, 20):  # the second resumes at 10
        launch(cache, *settings, "-o", tmp_path / "two", "--max-train-steps", steps)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, abs=1e-4)


def test_fine_tuning_on_other_words_keeps_what_was_known(finished, cache, tmp_path) -> None:
    texts = ["a purple zebra", "a red circle", "a red zebra", "a blue circle"]
    data = save_images(tmp_path / "data", *(f"{number}.png" for number in range(4)))
    for number, text in enumerate(texts):
        (data / f"{number}.txt").write_text(text)
    source, run = finished[0] / "pipeline", tmp_path / "run"
    flags = ["--max-train-steps", "1", "--learning-rate", "0", "--weight-decay", "0", "--validation", "0"]
    assert "new words" in call(cache, data, "-o", run, *TINY, "--init-from", source, *flags)
    before, after = opened(source), opened(run / "pipeline")
    # Known words mean what they meant.
    ask = {"prompt": "a small red circle on the left", "output_type": "pt"}
    torch.testing.assert_close(sampled(before, **ask), sampled(after, **ask), rtol=0, atol=1e-5)
    assert "zebra" in after.tokenizer.get_vocab() and "zebra" not in before.tokenizer.get_vocab()
    found = json.loads((run / "memorisation.json").read_text())  # measured at the end
    assert found["drawn"] == 16 and found["ratio"] > 0


def test_a_run_is_not_resumed_with_other_numbers_of_its_classes(tmp_path) -> None:
    """Whole numbers are in their order (2 before 10); in runs of earlier versions "10" came before "2"."""
    (tmp_path / "model_index.json").write_text('{"id2label": {"0": "10", "1": "2", "2": "cat"}}')
    with pytest.raises(UserError, match=r"'2' was 1, is 0, '10' was 0, is 1\n.*--init-from"):
        refuse_renumbered_classes(tmp_path, Source("d", (), "class", ("2", "10", "cat")))
    for same in (("10", "2", "cat"), ("10", "2", "kitten")):
        refuse_renumbered_classes(tmp_path, Source("d", (), "class", same))
    refuse_renumbered_classes(tmp_path / "none", Source("d", (), "class", ("2", "10", "cat")))


def test_a_run_goes_on_with_renamed_images_only_where_their_order_is_the_same(cache, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        noise(number, 24, 20).save(data / f"{number:02}.png")
    line = [data, "-o", tmp_path / "run", *TINY, "--preview-steps", 0]
    call(cache, *line, "--max-train-steps", 2)
    (data / "00.png").rename(data / "00-cat.png")  # still the first
    assert "step 3" in call(cache, *line, "--max-train-steps", 3)
    (data / "00-cat.png").rename(data / "cat.png")
    said = call(cache, *line, "--max-train-steps", 4, expect=2)
    assert (
        "the same images in another order (files were renamed or moved)" in said and "--allow-changes" in said
    )


@pytest.mark.parametrize("condition", ["text", "class", "none"])
def test_the_line_that_a_run_ends_with_generates_an_image(
    condition, images, cache, finished, load_program, tmp_path, monkeypatch
) -> None:
    """And the one of its report: both are the model card's."""
    run, said = finished
    if condition == "class":
        run, data = tmp_path / "run", tmp_path / "data"
        for number, file in enumerate(sorted(images.glob("*.png"))):
            place = data / ["red hat", "cat"][number % 2]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        said = call(cache, data, "-o", run, *TINY, "--max-train-steps", 1, "--preview-steps", 0)
    elif condition == "none":  # a checkpoint of captions, on images without
        base, run = run / "pipeline", tmp_path / "run"
        flags = [
            "--condition",
            "none",
            "--prior-samples",
            "0",
            "--max-train-steps",
            "1",
            "--preview-steps",
            "0",
        ]
        said = call(cache, images, "-o", run, *TINY, "--init-from", base, *flags)
    line = said.partition("try it with\n")[2].splitlines()[0].strip()
    assert line in (run / "pipeline" / "README.md").read_text().splitlines()
    assert line in html.unescape(report_page(run).html())
    monkeypatch.chdir(tmp_path)
    load_program("generate").main([*shlex.split(line)[2:], "--steps", "1"])
    assert (tmp_path / "image.png").is_file()


def test_a_setting_that_no_weight_s_shape_shows_is_not_changed_by_a_resume(
    images, cache, finished, tmp_path
) -> None:
    """Another resolution, cut, norm, autoencoder or optimiser would train on silently."""
    vae = finished[0] / "pipeline" / "vae"
    line = [images, "-o", tmp_path / "run", *TINY, "--vae", vae, "--preview-steps", 0]
    call(cache, *line, "--max-train-steps", 2)
    other = tmp_path / "other"
    shutil.copytree(vae, other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: 1.01 * value for name, value in weights.items()}, other / "diffusion_pytorch_model.safetensors"
    )
    for flags, difference in {
        "--resolution 32": "images.resolution: 16 -> 32",
        "--random-flip": "images.random_flip: False -> True",
        "--norm layer": "architecture.norm: rms -> layer",
        "--optimizer muon": "optimizer.optimizer: adamw -> muon",
        f"--vae {other}": "autoencoder: ",
    }.items():
        said = call(cache, *line, "--max-train-steps", 3, *flags.split(), expect=2)
        assert difference in said and "--allow-changes" in said
    said = call(cache, *line, "--max-train-steps", 3, "--random-flip", "--allow-changes")
    assert "changed since step 2, as allowed: images.random_flip: False -> True" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--resolution 17", "--resolution"),
        ("--path conddot", "did you mean 'condot'"),
        ("--max-train-steps 0", "--max-train-steps is 0"),
        ("--log-steps 0", "--log-steps is 0"),
        ("--adam-beta2 1", "--adam-beta2 is 1.0"),
        ("--vae /nowhere", "no autoencoder at '/nowhere'"),
        ("--text-encoder /nowhere", "the text encoder '/nowhere' cannot be read: there is no such folder"),
        ("--mirror-captions", "--mirror-captions without --random-flip"),
        ("--prior-samples 5", "--prior-samples without --init-from"),
        ("--init-from /nowhere", "Check the path"),
        ("--init-from RUN -o RUN", "would replace it"),
        ("--init-from BASE -o RUN", "would replace it"),
        ("--init-from BASE --prior-share 1", "--prior-share is 1"),
        ("", "there is no folder"),  # of data
    ],
)
def test_bad_input_is_one_screen_that_names_the_remedy(
    flags, message, images, cache, finished, tmp_path
) -> None:
    data, run = images if flags else tmp_path / "nothing", str(finished[0])
    given = flags.replace("BASE", f"{run}/pipeline").replace("RUN", run).split()
    line = [data, "-o", tmp_path, *TINY, "--max-train-steps", 1, "--dry-run", *given]
    said = call(cache, *line, expect=2)
    assert message in said and "Traceback" not in said and len(said.splitlines()) < 40


def test_a_u_net_and_an_unconditional_model_train_as_well(images, cache, tmp_path) -> None:
    flags = "--max-train-steps 1 --network unet --condition none --gradient-checkpointing --preview-steps 0"
    call(cache, images, "-o", tmp_path, *TINY, *flags.split())
    pipe = opened(tmp_path / "pipeline")
    assert type(pipe.transformer).__name__ == "UNet" and not pipe.takes_text
    assert len(pipe(num_images_per_prompt=2, num_inference_steps=1).images) == 2


# ---- which images are held out, and which are shown ----


def class_folders(root: Path) -> Path:
    names = [f"{name}/{number}.png" for name in ("cat", "dog", "owl") for number in range(8)]
    return save_images(root, *names)


def test_another_seed_is_refused_in_words(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data")
    line = [data, "-o", tmp_path / "run", *TINY, "--max-train-steps", 1, "--preview-steps", 0]
    call(tmp_path, *line)
    for step in (1, 2):  # the autoencoder's run, then the generator's
        said = call(tmp_path, *line, "--seed", 1, expect=2)
        assert not re.search(r"[0-9a-f]{64}", said), said
        if step == 1:
            assert "or other images are held out (--seed, --validation, --stratify)" in said
            line += ["--vae", tmp_path / "run/autoencoder/autoencoder"]
    assert (
        "seed: 0 -> 1 (it decides which images are held out" in said
        and "data: " not in said.split("settings:")[1]
    )


def test_a_run_of_before_goes_on_with_the_images_that_it_held_out(tmp_path: Path) -> None:
    """Earlier versions did not hold out the same share of every class, nor say so in their config.yaml."""
    data, run = class_folders(tmp_path / "data"), tmp_path / "run"
    flags = [*TINY, "--preview-steps", 0, "--seed", 1]
    call(tmp_path, data, "-o", run, *flags, "--max-train-steps", 1, "--no-stratify")
    config = run / "config.yaml"
    text = config.read_text()
    assert "stratify: false\n" in text
    config.write_text(text.replace("stratify: false\n", ""))
    call(tmp_path, data, "-o", run, *flags, "--max-train-steps", 2)
    assert "stratify: false\n" in config.read_text() and len(losses(run)) == 2
    said = call(tmp_path, data, "-o", run, *flags, "--max-train-steps", 3, "--stratify", expect=2)
    assert "other images are held out" in said
    call(tmp_path, data, "-o", tmp_path / "new", *flags, "--max-train-steps", 1)
    assert "stratify: true\n" in (tmp_path / "new" / "config.yaml").read_text()


def test_previews_of_an_autoencoder_show_every_class(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "lime"), ("c", "blue")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (16, 16), colour)
            image.putpixel((number % 16, number // 16), (9, 9, 9))
            image.save(tmp_path / "data" / name / f"{number}.png")
    flags = [flag for flag in TINY[: TINY.index("--network-preset")] if flag not in ("--validation", "0.2")]
    line = [tmp_path / "data", "-o", tmp_path / "run", *flags, "--validation", 0, "--preview-steps", 1]
    call(tmp_path, *line, file="autoencoder")
    with Image.open(tmp_path / "run" / "samples" / "step-000001.png") as preview:
        row = [preview.getpixel((2 + 18 * number + 8, 10)) for number in range(16)]
    shown = Counter(max(range(3), key=lambda channel, pixel=pixel: pixel[channel]) for pixel in row)
    assert sorted(shown.values()) == [5, 5, 6]
