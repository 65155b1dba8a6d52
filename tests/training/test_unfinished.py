"""A run that is not finished: what is generated with it, what starts from it, and what is said about it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.opening import check_checkpoint, open_pipeline
from latentflow.inference.sample import read_capabilities
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline
from latentflow.training import train, unfinished
from latentflow.training.report.export import is_generated

from .command import TINY, call, paste, sampled, save_images
from .test_ending import FlowLoss, interrupting, signal

STEPS = ["--max-train-steps", 4, "--checkpointing-steps", 1, "--validation-steps", 0, "--preview-steps", 0]
GENERATE = "../pipelines/generate"


@pytest.fixture(scope="module")
def base(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on captions, its folder."""
    run = tmp_path_factory.mktemp("base")
    call(cache, images, "-o", run, *TINY, *STEPS)
    return run


@pytest.fixture(scope="module")
def stopped(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on captions that Ctrl-C stopped at step 2 of 4."""
    run = tmp_path_factory.mktemp("runs") / "cats"
    with pytest.MonkeyPatch.context() as patch:
        interrupting(FlowLoss, signal.SIGINT, 1 * 4, patch)
        call(cache, images, "-o", run, *TINY, *STEPS, expect=130)
    return run


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


# Finished runs, one of each kind whose checkpoints differ. `{base}` is the pipeline of a finished run on captions.
KINDS = {
    "captions": "",
    "classes": "--condition class",
    "inpainting, an average over time": "--condition none --inpainting --ema-lengths 0.1",
    "all weights of a checkpoint": "--init-from {base}",
    "an adapter, new words": "--init-from {base} --lora-rank 4",
    "an adapter of captions and DoRA": "--init-from {base} --lora-rank 2 --lora-text-encoder --lora-dora",
    "few steps": "--objective shortcut",
    "feature alignment": "--alignment self --depth 2",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_opens_as_the_pipeline_that_was_exported_from_it(
    kind: str, base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save_images(tmp_path / "data", *(f"{name}/{number}.png" for name in "ab" for number in range(4)))
    if "class" not in kind:
        rows = [
            f'{{"file_name": "{name}/{n}.png", "text": "a wug {name}"}}' for name in "ab" for n in range(4)
        ]
        (data / "metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(train, "forget_initial", lambda run: None)
    flags = KINDS[kind].format(base=base / "pipeline").split()
    run = tmp_path / "run"
    call(cache, data, "-o", run, *TINY, *STEPS, "--learning-rate", 0.05, *flags)
    exported = LatentFlowPipeline.from_pretrained(run / "pipeline")
    (run / "pipeline").rename(tmp_path / "exported")
    pipe, line = unfinished.unfinished_pipeline(run)
    assert f"{run} is not finished: step 4 of 4" in line
    assert pipe.labels == exported.labels and pipe.model.few_steps == exported.model.few_steps
    found, wanted = weights(pipe), weights(exported)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    prompt = {"prompt": "a wug b"} if pipe.takes_text else {"class_labels": 1} if pipe.takes_classes else {}
    pipe.set_progress_bar_config(disable=True)
    exported.set_progress_bar_config(disable=True)
    assert torch.equal(sampled(pipe, **prompt), sampled(exported, **prompt))


def test_a_stopped_run_draws_says_so_and_the_line_that_finishes_it_works(
    stopped: Path, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "cats"
    shutil.copytree(stopped, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(stopped), str(run)))
    said = call(cache, "a red circle", "--checkpoint", run, "-o", tmp_path / "a.png", file=GENERATE)
    line = re.search(r"cats is not finished: step 2 of 4. To finish it:\n  (latentflow .*)", said)
    assert line and (tmp_path / "a.png").is_file()
    capabilities = read_capabilities(str(run))
    assert capabilities is not None and capabilities.text
    assert "done:" in paste(cache, line[1])
    assert not (run / "checkpoints" / "initial").exists()
    said = call(cache, "a red circle", "--checkpoint", run, "-o", tmp_path / "b.png", file=GENERATE)
    assert "not finished" not in said and (tmp_path / "b.png").is_file()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped: Path, tmp_path: Path, caplog: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    newest = run / "checkpoints" / "step-000002" / "flow-average.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    pipe, line = unfinished.unfinished_pipeline(run)
    assert "step 1 of 4" in line and "is damaged" in caplog.text
    average = load_file(run / "checkpoints" / "step-000001" / "flow-average.safetensors")
    name = next(name for name in average if name.startswith("flow-average/network."))
    assert torch.equal(
        weights(pipe)["transformer." + name.removeprefix("flow-average/network.")], average[name]
    )


def test_every_kind_of_pipeline_opens(stopped: Path) -> None:
    assert isinstance(
        open_pipeline(LatentFlowInpaintPipeline, str(stopped), "cpu"), LatentFlowInpaintPipeline
    )


def test_a_run_is_exported_finished_or_not(base: Path, stopped: Path, cache: Path, tmp_path: Path) -> None:
    export = "../pipelines/export"
    assert "step 2 of 4" in call(cache, stopped, "-o", tmp_path / "a", file=export)
    found = weights(LatentFlowPipeline.from_pretrained(tmp_path / "a"))
    wanted = weights(unfinished.unfinished_pipeline(stopped)[0])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    text = (tmp_path / "a" / "README.md").read_text()
    assert "2 steps of 4 samples (the run is not finished: 4 are planned)" in text and is_generated(text)
    assert (
        "the weights are those of its last checkpoint." in text
        and f'from_pretrained("{tmp_path / "a"}")' in text
    )
    call(cache, base, "-o", tmp_path / "b", "--export-dtype", "float16", file=export)
    card = "README.md"
    text = (tmp_path / "b" / card).read_text()
    assert f'from_pretrained("{tmp_path / "b"}")' in text and f"--checkpoint {tmp_path / 'b'} -o" in text
    assert str(base / "pipeline") not in text and is_generated(text)
    mine = 'My own card: from_pretrained("x")\n'
    shutil.copytree(base / "pipeline", tmp_path / "own")
    (tmp_path / "own" / card).write_text(mine)
    call(cache, tmp_path / "own", "-o", tmp_path / "d", file=export)
    assert (tmp_path / "d" / card).read_text() == mine
    said = call(cache, base, "-o", tmp_path / "c", "--adapter", "--fast", file=export, expect=2)
    assert "Give one of them" in said
    assert "holds no adapter" in call(cache, base, "-o", tmp_path / "c", "--adapter", file=export, expect=2)
    said = call(cache, stopped, "someone/cats", file="../pipelines/push", expect=2)
    assert f"latentflow export {stopped} -o FOLDER" in said
    said = call(cache, "a", "--lora", stopped, "--checkpoint", base, file=GENERATE, expect=2)
    assert f"--checkpoint {stopped} generates with what it has learnt" in said


def test_training_starts_from_runs_finished_or_not(
    images: Path, base: Path, stopped: Path, cache: Path, tmp_path: Path
) -> None:
    """An unfinished run may go on meanwhile: what was started from is kept, so that resuming gives the same weights."""
    assert "done:" in call(cache, images, "-o", tmp_path / "a", *TINY, *STEPS, "--init-from", base)
    source = tmp_path / "source"
    shutil.copytree(stopped, source)
    line = [images, "-o", tmp_path / "b", *TINY, *STEPS, "--init-from", source, "--lora-rank", 2]
    assert "is not finished: step 2 of 4" in call(cache, *line)
    shutil.rmtree(source / "checkpoints")
    assert "done:" in call(cache, *line, "--max-train-steps", 5)
    said = call(cache, images, "-o", base, *TINY, *STEPS, "--init-from", base, expect=2)
    assert "is the place of this run's own result" in said
    student = [base, images, "-o", tmp_path / "fast", *TINY[:2], "--train-batch-size", 4, *STEPS]
    assert "done:" in call(cache, *student, file="distill")


def test_what_cannot_be_opened_says_how_to_go_on(stopped: Path, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "checkpoints" / "initial")
    checks: list[Callable[[], object]] = [
        lambda: check_checkpoint(str(run)),
        lambda: read_capabilities(str(run)),
        lambda: open_pipeline(LatentFlowPipeline, str(run), "cpu"),
    ]
    for words in ("begun by a version", "has saved no checkpoint yet"):
        for check in checks:
            with pytest.raises(UserError, match=words) as error:
                check()
            assert f"latentflow train --config {run}/config.yaml -o {run}" in error.value.fix
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert SamplingConfig.checkpoint is None
    (run / "config.yaml").write_text("data: cats\nautoencoder_steps: 2\nmax_train_steps: 2\n")
    with pytest.raises(UserError, match="is the run of an autoencoder") as error:
        check_checkpoint(str(run))
    assert f"--vae {run}/autoencoder" in error.value.fix
