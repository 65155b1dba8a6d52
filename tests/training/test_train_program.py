"""`latentflow train` as users run it: killed, resumed, on two processes, fine-tuned, and given nonsense."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentflow import LatentFlowPipeline
from latentflow.data import Source
from latentflow.errors import UserError
from latentflow.training.networks import refuse_renumbered_classes

from ..data.images import noise
from .command import ROOT, TINY, call, environment
from .forking import fork_ranks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of 8 steps, and what it said. (tests/test_wheel.py has one in a process of its own.)"""
    run = tmp_path_factory.mktemp("finished")
    said = call(cache, images, "-o", run, *TINY, "--max-train-steps", 8, "--checkpointing-steps", 2)
    return run, said


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        f"{file.name}/{key}": one
        for file in last.glob("*.safetensors")
        for key, one in load_file(file).items()
    }


def test_a_run_leaves_what_the_documentation_lists(finished: tuple[Path, str], images: Path) -> None:
    run, said = finished
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "samples/step-000008.png",
        "pipeline/model_index.json",
    ):
        assert (run / name).is_file(), name
    assert "captions from metadata.jsonl" in said  # what was inferred is said before training
    assert "memorise" in said and "no GPU" in said
    assert sorted(path.name for path in images.iterdir()) == [f"{n:02d}.png" for n in range(12)] + [
        "metadata.jsonl"
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert any("val_loss" in row for row in rows)


def test_the_pipeline_generates_from_a_caption(finished: tuple[Path, str]) -> None:
    pipe = LatentFlowPipeline.from_pretrained(finished[0] / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
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
    finished: tuple[Path, str], images: Path, cache: Path, tmp_path: Path
) -> None:
    line = [images, *TINY, "--max-train-steps", 8, "--checkpointing-steps", 2]
    process = begin(tmp_path, cache, *line, losses=random.Random().randint(1, 6))
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it ended before it could be killed"
    call(cache, *line, "-o", tmp_path)
    whole, resumed = tensors(finished[0]), tensors(tmp_path)
    assert whole.keys() == resumed.keys() and len(whole) > 50
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_result_that_is_made_again_keeps_what_the_user_put_there(
    finished: tuple[Path, str], images: Path, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for mark in run.rglob("exported"):  # as in runs of before there was this mark
        mark.unlink()
    for folder in ("pipeline", "autoencoder/autoencoder"):
        (run / folder / "notes.txt").write_text("mine")
    card = (run / "pipeline" / "README.md").read_text()
    call(cache, images, "-o", run, *TINY, "--max-train-steps", 8, "--checkpointing-steps", 2)
    assert len(list(run.rglob("exported"))) == 2  # both were made again
    for folder in ("pipeline", "autoencoder/autoencoder"):
        assert (run / folder / "notes.txt").read_text() == "mine"
    assert len(list((run / "pipeline").glob("README*"))) == 1
    assert (run / "pipeline" / "README.md").read_text() != card  # of a run that lies elsewhere now
    LatentFlowPipeline.from_pretrained(run / "pipeline")


def test_config_yaml_reproduces_the_run(finished: tuple[Path, str], cache: Path, tmp_path: Path) -> None:
    config = finished[0] / "config.yaml"
    data = next(line.split(": ")[1] for line in config.read_text().splitlines() if line.startswith("data:"))
    call(cache, data, "--config", config, "-o", tmp_path)
    whole, again = tensors(finished[0]), tensors(tmp_path)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_sigterm_saves_and_prints_the_line_that_resumes(images: Path, cache: Path, tmp_path: Path) -> None:
    line = [images, *TINY, "--max-train-steps", 100000]
    process = begin(tmp_path, cache, *line, losses=3, expect=143)
    os.kill(process, signal.SIGTERM)
    assert os.waitpid(process, 0)[1] == 0
    said = (tmp_path / "train.log").read_text()
    assert "resume with" in said and f"latentflow train {images}" in said, said
    assert list((tmp_path / "checkpoints").glob("step-*/state.json"))


def forked(cache: Path, *arguments: object) -> None:
    assert [os.waitpid(one, 0)[1] for one in fork_ranks(2, lambda rank: call(cache, *arguments))] == [0, 0]


def torchrun(cache: Path, *arguments: object) -> None:
    # Not `accelerate launch --cpu --num_processes 2`: accelerate 1.15 starts one process there, without a word.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train" / "flow.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launch", [forked, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_and_resume_like_one_with_the_same_global_batch(
    launch: Callable[..., None],
    images: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = [
        images, *TINY, "--checkpointing-steps", 10, "--mixed-precision", "no", "--validation-steps", 0,
        "--preview-steps", 0, "--lr-scheduler", "constant",
    ]  # fmt: skip
    # One process trains the autoencoder both times: only the flow is compared.
    call(cache, *settings, "-o", tmp_path / "one", "--train-batch-size", 4, "--max-train-steps", 20)
    settings += ["--vae", tmp_path / "one" / "autoencoder" / "autoencoder", "--train-batch-size", 2]
    for steps in (10, 20):  # the second resumes at 10
        launch(cache, *settings, "-o", tmp_path / "two", "--max-train-steps", steps)

    def losses(run: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows]

    one, two = losses("one"), losses("two")
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, abs=1e-4)


def test_fine_tuning_on_other_words_keeps_what_was_known(
    finished: tuple[Path, str], cache: Path, tmp_path: Path
) -> None:
    from PIL import Image

    (tmp_path / "data").mkdir()
    for number, text in enumerate(["a purple zebra", "a red circle", "a red zebra", "a blue circle"]):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(text)
    source = finished[0] / "pipeline"
    said = call(
        cache, tmp_path / "data", "-o", tmp_path / "run", *TINY, "--init-from", source, "--max-train-steps", 1,
        "--learning-rate", 0, "--weight-decay", 0, "--validation", 0,
    )  # fmt: skip
    assert "new words" in said
    before, after = (
        LatentFlowPipeline.from_pretrained(source),
        LatentFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline"),
    )
    for pipe in (before, after):
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe: LatentFlowPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a small red circle on the left", num_inference_steps=2, generator=generator, output_type="pt"
        ).images

    torch.testing.assert_close(
        draw(before), draw(after), rtol=0, atol=1e-5
    )  # known words mean what they meant
    assert "zebra" in after.tokenizer.get_vocab() and "zebra" not in before.tokenizer.get_vocab()


def test_classes_from_subfolders_and_fine_tuning_on_another_number_of_them(
    cache: Path, tmp_path: Path
) -> None:
    from PIL import Image

    def folder(name: str, classes: list[str]) -> Path:
        for index, label in enumerate(classes):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 16), (80 * index, 40 * number, 9)).save(
                    tmp_path / name / label / f"{number}.jpg"
                )
        return tmp_path / name

    quick = [*TINY, "--max-train-steps", 1, "--validation", 0, "--learning-rate", 0, "--weight-decay", 0]
    said = call(cache, folder("two", ["cat", "dog"]), "-o", tmp_path / "a", *quick)
    assert "2 classes: cat, dog" in said
    call(
        cache,
        folder("three", ["ant", "dog", "cat"]),
        "-o",
        tmp_path / "b",
        *quick,
        "--init-from",
        tmp_path / "a" / "pipeline",
    )
    first = LatentFlowPipeline.from_pretrained(tmp_path / "a" / "pipeline")
    second = LatentFlowPipeline.from_pretrained(tmp_path / "b" / "pipeline")
    assert list(first.labels) == ["cat", "dog"] and list(second.labels) == ["cat", "dog", "ant"]
    old, new = (pipe.transformer.y_embedder.embedding_table.weight for pipe in (first, second))
    assert torch.equal(new[[0, 1, 3]], old)  # the null is last


def test_a_run_is_not_resumed_with_other_numbers_of_its_classes(tmp_path: Path) -> None:
    """Whole numbers are in their order (2 before 10); in runs of earlier versions "10" came before "2"."""
    (tmp_path / "model_index.json").write_text('{"id2label": {"0": "10", "1": "2", "2": "cat"}}')
    with pytest.raises(UserError, match=r"'2' was 1, is 0, '10' was 0, is 1\n.*--init-from"):
        refuse_renumbered_classes(tmp_path, Source("d", (), "class", ("2", "10", "cat")))
    for same in (("10", "2", "cat"), ("10", "2", "kitten")):
        refuse_renumbered_classes(tmp_path, Source("d", (), "class", same))
    refuse_renumbered_classes(tmp_path / "none", Source("d", (), "class", ("2", "10", "cat")))


def test_a_run_goes_on_with_renamed_images_only_where_their_order_is_the_same(
    cache: Path, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "17"], "--resolution"),
        (["--learning-rat", "1"], "learning-rate"),
        (["--path", "conddot"], "did you mean 'condot'"),
        (["--max-train-steps", "0"], "--max-train-steps is 0"),
        (["--log-steps", "0"], "--log-steps is 0"),
        (["--adam-beta2", "1"], "--adam-beta2 is 1.0"),
        (["--vae", "/nowhere"], "no autoencoder at '/nowhere'"),
        (
            ["--text-encoder", "/nowhere"],
            "the text encoder '/nowhere' cannot be read: there is no such folder",
        ),
        (["--init-from", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_screen_that_names_the_remedy(
    flags: list[str], message: str, images: Path, cache: Path, tmp_path: Path
) -> None:
    said = call(cache, images, "-o", tmp_path, *TINY, "--max-train-steps", 1, "--dry-run", *flags, expect=2)
    assert message in said and "Traceback" not in said and len(said.splitlines()) < 40


def test_a_u_net_and_an_unconditional_model_train_as_well(images: Path, cache: Path, tmp_path: Path) -> None:
    quick = [
        *TINY,
        "--max-train-steps",
        1,
        "--network",
        "unet",
        "--condition",
        "none",
        "--gradient-checkpointing",
        "--preview-steps",
        0,
    ]
    call(cache, images, "-o", tmp_path, *quick)
    pipe = LatentFlowPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer).__name__ == "UNet" and not pipe.takes_text
    assert len(pipe(num_images_per_prompt=2, num_inference_steps=1).images) == 2


def test_data_that_is_not_there_ends_with_status_2(cache: Path, tmp_path: Path) -> None:
    said = call(cache, tmp_path / "nothing", "-o", tmp_path / "run", expect=2)
    assert "there is no folder" in said and "Traceback" not in said


def test_dry_run_prints_sizes_and_time_and_writes_nothing(images: Path, cache: Path, tmp_path: Path) -> None:
    said = call(cache, images, "-o", tmp_path / "run", *TINY, "--dry-run")
    for word in ("parameters", "memory:", "time:", "epochs"):
        assert word in said
    assert not (tmp_path / "run").exists()


def test_help_answers(cache: Path) -> None:
    said = call(cache, "--help")
    for flag in (
        "--resolution",
        "--max-train-steps",
        "--learning-rate",
        "--preset",
        "--init-from",
        "--config",
    ):
        assert flag in said
