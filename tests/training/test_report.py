"""`latentflow report`, what a run records for it, trackers, the model card and the hub."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from latentflow.cli import parse, write_config
from latentflow.config import RunConfig
from latentflow.data import find_source
from latentflow.errors import UserError, few
from latentflow.training.loop import logging as trackers
from latentflow.training.loop.logging import Reporter
from latentflow.training.report import export
from latentflow.training.report.card import CardFacts, write_card
from latentflow.training.report.export import carry_over, is_generated, signed
from latentflow.training.report.folder import Run, data_lines, read_metrics, read_run
from latentflow.training.report.page import report_page, thinned
from latentflow.utils.libraries import DISTRIBUTION


def row(step: int, **values: float) -> str:
    return json.dumps({"step": step, "time": 1e9 + step, **values})


def trained(step: int, loss: float) -> str:
    return row(step, loss=loss, lr=1e-3, images_per_second=8.0, memory_gib=1.0)


def write_log(run: Path, *messages: str) -> None:
    (run / "train.log").write_text("\n".join(f"2026-01-01 10:00:00,000 {line}" for line in messages))


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run of two stages: killed while writing step 5, resumed from 3, killed again at 6 of 8; one preview is torn."""
    run = tmp_path / "cats"
    (run / "samples").mkdir(parents=True)
    (run / "autoencoder" / "samples").mkdir(parents=True)
    settings = {
        "data": "my/cats", "vae": "/home/me/vae", "output": "x", "network": "dit", "width": 96,
        "max_train_steps": 8, "train_batch_size": 4, "autoencoder_steps": 2, "autoencoder_batch_size": 2,
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [trained(1, 9.0), trained(2, 8.0), trained(3, 7.0), row(3, val_loss=6.0), trained(4, 100.0)]
    torn = trained(5, 200.0)[:30] + trained(4, 5.0)  # by a start that did not end the line
    lines += [torn, trained(5, 4.0), row(5, val_loss=3.0), trained(6, float("nan")), trained(6, 2.0)[:20]]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    stage = [trained(1, 1.0), row(2, loss=0.5, val_psnr=20.5, images_per_second=8.0)]
    (run / "autoencoder" / "metrics.jsonl").write_text("\n".join(stage))
    for folder, step in ((run, 3), (run / "autoencoder", 2)):
        Image.new("RGB", (1300, 650), "red").save(folder / "samples" / f"step-{step:06d}.png")
    (run / "samples" / "step-000005.png").write_bytes(b"\x89PNG torn")
    ended = ("done: x; try it with\n  latentflow generate", "verdict: still falling:\n  latentflow train")
    first = ("notes of old", "plan: 8 steps", "step 3: val_loss 6", *ended, "my/cats: <b>9</b> images")
    write_log(
        run,
        *first,
        "data: 9 to train on",
        "plan: 8 steps",
        "WARNING: step 5: not finite. The update is skipped.",
    )
    return run


def test_repeated_and_torn_lines_leave_the_curve_of_the_last_start(killed: Path, tmp_path: Path) -> None:
    rows = read_metrics(killed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # What is not finite is no point.
    assert [row.get("loss") for row in rows] == [9.0, 8.0, 7.0, 5.0, 4.0, None]
    assert [row.get("val_loss") for row in rows] == [None, None, 6.0, None, 3.0, None]
    # Steps 1 to 4, then 5 and 6 after going back to 4: 6 steps of 4 samples at 8 a second, whatever the clock says.
    assert read_run(killed).seconds == pytest.approx(6 * 4 / 8)
    # Steps beyond the one that was resumed from are dropped, and going back takes no time.
    (tmp_path / "metrics.jsonl").write_text("\n".join([trained(10, 1.0), trained(30, 3.0), trained(20, 2.0)]))
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]
    assert read_run(tmp_path).seconds == pytest.approx(30 / 8)


def test_a_page_of_a_killed_run_of_two_stages(killed: Path) -> None:
    html = report_page(killed).html()
    for text in (
        "not finished: step 6 of 8", "The autoencoder, trained first", "val_psnr", "20.5000 dB", "not finite: 1 (see",
        "<td>less than 1 s, 8 images per second</td>",  # the first stage has its own batch: 2 steps of 2
        "step-000005.png cannot be read", "&lt;b&gt;9&lt;/b&gt; images", "step 3</figcaption>",
    ):  # fmt: skip
        assert text in html, text
    assert html.count("<svg") == 2 and html.count("data:image/") == 2
    assert 'src="http' not in html and "<script" not in html
    before = html.split("train.log")[0]
    assert "notes of old" not in before and "latentflow generate<" not in before  # only the last start's data


def test_a_page_of_a_finished_run_of_two_processes(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "checkpoints" / "step-000030").mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    for step in range(1, 14):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"step-{step:06d}.png")
    settings = {
        "data": "cats",
        "network": "dit",
        "max_train_steps": 30,
        "ema_lengths": [0.1, 0.2],
        "learning_rate": 2e-3,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    losses = [
        (step, 1.0 + 0.1 * abs(step - 10)) for step in range(2, 31, 4)
    ]  # 1.0 at step 10, 3.0 at step 30
    lines = [trained(step, 2.0 / step) for step in range(1, 31)] + [
        row(step, val_loss=loss) for step, loss in losses
    ]
    lines.sort(key=lambda line: json.loads(line)["step"])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    start = {"started": "2026-01-01", "step": 0, "device": "cpu", "processes": 2, "command": "train.py cats"}
    (tmp_path / "environment.jsonl").write_text(json.dumps(start))
    html = report_page(tmp_path).html()
    for text in (
        "finished: step 30 of 30", "60, 2 per step", f"latentflow generate --checkpoint {tmp_path}/pipeline",
        "The run used 2 processes. Start as many",
        "memorising. The loss on held-out images has risen by 160% since step 10", "--max-train-steps 10<",
        "<td>ema_lengths</td><td>0.1 0.2</td><td></td>", "<td>checkpoints kept</td><td>step-000030</td>",
        f"12 of the 13 previews in {tmp_path}/samples",
        "train.log has no lines about the data", "<td>train.py cats</td>",
    ):  # fmt: skip
        assert text in html, text
    assert "as many steps again" not in html  # the verdict's command is another one
    assert "<td>data</td>" not in html  # it has no default


def test_a_folder_with_nothing_but_settings_has_a_page_and_any_other_folder_none(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cats"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("network: dit\nmax_train_steps: 8\n")
    assert "No figures were logged yet" in report_page(run).html()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "time": time.time(), "loss": 1.0}))
    assert re.search(r"not finished, last line \d+ s ago: step 3 of 8", report_page(run).html())
    with pytest.raises(UserError, match=r"Did you mean '.*cats'"):
        report_page(tmp_path / "runs")
    (run / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config\.yaml is not valid YAML"):
        read_run(run)


def test_previews_are_ordered_by_step_also_beyond_a_million(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("network: dit\n")
    for step in (1_000_000, 999_000, 0):
        (tmp_path / "samples" / f"step-{step:06d}.png").touch()
    assert [int(path.stem[5:]) for path in read_run(tmp_path).previews()] == [0, 999_000, 1_000_000]


def test_an_autoencoder_is_finished_when_it_has_the_steps_that_follow_from_the_run_s(tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    settings = {"max_train_steps": 20_000, "autoencoder_steps": None, "autoencoder_batch_size": 16}
    run = Run(tmp_path, settings, [{"step": 3000}], [{"processes": 2}], [])
    assert run.target == 3000 and run.finished and run.batch == 32
    assert shlex.split(run.resume())[-2:] == ["--autoencoder-steps", "6000"]


@pytest.mark.parametrize("command", ["train", "autoencoder"])
def test_the_command_to_resume_gives_the_settings_of_the_run(
    command: str, load_program: Callable[[str], Any], tmp_path: Path
) -> None:
    kind, run = RunConfig if command == "train" else load_program(command).Config, tmp_path / "my run"
    run.mkdir()
    config = parse(kind, ["my data", "-o", str(run), "--learning-rate", "0.5"], prog="x")
    write_config(config, run / "config.yaml")
    words = shlex.split(read_run(run).resume())
    assert words[:2] == ["latentflow", command]
    assert parse(kind, words[2:], prog="x") == config


def test_an_existing_page_is_replaced_only_when_asked(
    killed: Path, load_program: Callable[[str], Any]
) -> None:
    program = load_program("report")
    program.main([str(killed)])
    page = killed / "report.html"
    page.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        program.main([str(killed)])
    assert page.read_text() == "mine"
    program.main([str(killed), "--overwrite"])
    assert "cats" in page.read_text()


def test_long_curves_are_thinned_to_means() -> None:
    steps, values = thinned(range(4000), [float(step % 4) for step in range(4000)])
    assert len(steps) == 1000 and set(values) == {1.5}


def test_the_data_section_ends_at_the_plan() -> None:
    assert data_lines(["a", "plan: x", "b"]) == ["a"]
    assert data_lines(["no plan yet"]) == []


# ---- what a run records ----


def reporter(folder: Path, report_to: str = "none", step: int = 0) -> Reporter:
    return Reporter(folder, step, 8, samples_per_epoch=9, report_to=report_to, active=True)


def test_each_start_records_its_environment_and_ends_a_torn_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for step in (0, 3):
        started = reporter(tmp_path, step=step)
        started.step(4)
        started.metrics(step + 1, 4, {"loss": 1.0, "lr": 0.1})
        started.close()
        with metrics.open("a") as file:
            file.write('{"step": 9, "lo')
    starts = read_run(tmp_path).starts
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[0]["torch"] == torch.__version__ and starts[0]["processes"] == 1
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()[::2]] == [1, 4]


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "very-secret")
    (tmp_path / "config.yaml").write_text("network: dit\n")
    reporter(tmp_path).close()
    report_page(tmp_path).write(tmp_path / "report.html")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 4 and not any(b"very-secret" in path.read_bytes() for path in written)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The class of accelerate's tracker."""
    monkeypatch.setattr(trackers, "WandBTracker", made := Mock())
    monkeypatch.setitem(sys.modules, "wandb", trackers)
    return made


def test_wandb_gets_settings_curves_and_images_and_a_resumed_run_its_old_name(
    tmp_path: Path, wandb: Mock
) -> None:
    (tmp_path / "config.yaml").write_text("learning_rate: 0.5\n")
    for step in (1, 2):
        logger = reporter(tmp_path, "wandb")
        logger.metrics(step, 4, {"loss": 0.5, "lr": 0.1})
        logger.validation(step, {"loss": 0.25})
        logger.image(step, Image.new("RGB", (6, 4), "red"))
        logger.close()
    first, second = (call.kwargs for call in wandb.call_args_list)
    assert first["id"] == second["id"] and first["dir"] == str(tmp_path)
    names, arguments, options = zip(*wandb.return_value.mock_calls[:6], strict=True)
    assert names == ("start", "store_init_configuration", "log", "log", "log_images", "finish")
    assert arguments[1] == ({"learning_rate": 0.5},)
    assert arguments[2][0]["loss"] == 0.5 and options[2] == {"step": 1}
    assert arguments[3] == ({"val_loss": 0.25},)
    assert arguments[4][0]["preview"].shape == (1, 4, 6, 3)


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, wandb: Mock) -> None:
    wandb.return_value.log.side_effect = ConnectionError("gone")
    logger = reporter(tmp_path, "wandb")
    for step in (1, 2):
        logger.metrics(step, 4, {"loss": 0.5, "lr": 0.1})
    logger.close()
    assert len(read_metrics(tmp_path)) == 2 and wandb.return_value.log.call_count == 1


def test_a_tracker_that_cannot_start_says_what_to_do(tmp_path: Path, wandb: Mock) -> None:
    wandb.return_value.start.side_effect = ConnectionError("no key")
    with pytest.raises(UserError, match=r"--report-to wandb could not start: no key\n.*`wandb login`"):
        reporter(tmp_path, "wandb")


def test_tensorboard_gets_curves_and_images(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = reporter(tmp_path, "tensorboard")
    logger.metrics(3, 4, {"loss": 0.5, "lr": 0.1})
    logger.image(3, Image.new("RGB", (6, 4), "red"))
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    image = events.Images("preview")[0]
    assert (image.width, image.height) == (6, 4)


# ---- the model card and the hub ----


def facts(images: Path) -> CardFacts:
    source = find_source(str(images))
    parts = {"transformer": torch.nn.Linear(999, 1000)}
    return CardFacts(where="owner/cats", kind=source.kind, example=source.captions()[0], parts=parts)


def card_of(run: Path, facts: CardFacts) -> str:
    folder = run.parent / "new"
    folder.mkdir(exist_ok=True)
    write_card(folder, run, facts)
    return (folder / "README.md").read_text("utf-8")


def test_the_card_says_what_it_is_how_it_was_trained_and_how_to_load_it(killed: Path, images: Path) -> None:
    card = card_of(killed, facts(images))
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": DISTRIBUTION, "pipeline_tag": "text-to-image", "tags": ["latentflow", "flow-matching"]
    }  # fmt: skip
    assert "# license:" in header  # for the user to write
    caption = find_source(str(images)).captions()[0]
    for text in (
        'from_pretrained("owner/cats")', f"prompt={caption!r}", "`transformer` | Linear | 1.00 M",
        "- data: 9 to train on", "- cats: \\<b\\>9\\</b\\>", "# cats", "| width | 96 |", "| vae | vae |",
        "6 steps of 4 samples (the run is not finished: 8 are planned), 3 s; the",
        "at step 5: `val_loss` 3.0000. Compare", "![Samples](sample.png)",
        "Samples at step 5,",  # the last preview
    ):  # fmt: skip
        assert text in body, text
    assert (killed.parent / "new" / "sample.png").is_file()
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def test_what_a_reader_pastes_is_quoted_and_names_no_folder_of_the_author_s(killed: Path) -> None:
    (killed / "config.yaml").write_text(yaml.safe_dump({"data": "/home/me/my cats", "network": "dit"}))
    write_log(
        killed,
        "/home/me/my cats: 2 left out: /home/me/my cats/1.png, /tmp/x/2.png",
        "5.5 % of 1/2",
        "plan: 8",
    )
    shown = {"kind": "text", "example": "a $(reboot) `x`", "parts": {}}
    card = card_of(killed, CardFacts(where="my runs/cats", **shown))
    command = card.split("```bash\n")[1].split("\n```")[0]
    assert shlex.split(command)[2:5] == ["a $(reboot) `x`", "--checkpoint", "my runs/cats"]
    assert "'a $(reboot) `x`'" in command  # single quotes: a shell runs nothing
    assert "- my cats: 2 left out: my cats/1.png, 2.png" in card and "- 5.5 % of 1/2" in card
    (killed / "config.yaml").write_text(yaml.safe_dump({"data": ".", "network": "dit"}))
    assert "- 5.5 % of 1/2" in card_of(killed, CardFacts(where="owner/cats", **shown))


HOSTILE = (
    "a\n```\n# injected\n---\nlicense: mit\n---\n<script>alert(1)</script> [x](http://y) | `z` ``` "
    "\x1b[31m\u202e \\ $(reboot) 'q' \"r\""
)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_text_of_the_data_is_no_markup_in_the_card(kind: Any, killed: Path) -> None:
    settings = {"data": "cats", "network": "dit", "checkpoint": HOSTILE, "width": 96}
    (killed / "config.yaml").write_text(yaml.safe_dump(settings))
    advice = "WARNING: 9 images are few: `latentflow evaluate` measures it"
    write_log(killed, f"cats: 1 left out: {few([HOSTILE])}", HOSTILE.splitlines()[-1], advice, "plan: 8")
    facts = CardFacts(
        where=f"runs/{HOSTILE}", kind=kind, example=HOSTILE, classes=("a cat", HOSTILE), parts={}
    )
    text = card_of(killed, facts)
    assert ("pixels of 2 classes." in text and "\nClasses: a cat, " in text) == (kind == "class")
    assert ModelCard(text, ignore_metadata_errors=False).data.to_dict() == {
        "library_name": DISTRIBUTION,
        "pipeline_tag": "text-to-image" if kind == "text" else "unconditional-image-generation",
        "tags": ["latentflow", "flow-matching"],
    }  # fmt: skip
    assert not set(text) & set("\x1b\u202e")
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    inside = [child for token in tokens for child in token.children or ()]
    assert [token.info for token in tokens if token.type == "fence"] == ["python", "bash"]
    assert sum(token.type == "heading_open" for token in tokens) == 6  # the name, and the card's own
    html = [token.type for token in [*tokens, *inside] if "html" in token.type]
    assert html == ["html_block"]  # the signature
    links = [child.attrs["href"] for child in inside if child.type == "link_open"]
    assert links == []
    python, bash = (token.content for token in tokens if token.type == "fence")
    compile(python, "card", "exec")
    words = shlex.split(bash)
    assert words[:2] == ["latentflow", "generate"] and words[-1] == "image.png" and len(words) in (7, 8)
    assert "`latentflow evaluate` measures it" in text  # our own command stays one
    assert any("<script>alert(1)</script> [x](http://y) | `z` ```" in child.content for child in inside)


def test_a_card_of_ours_is_renewed_and_one_of_the_user_s_stays(killed: Path, images: Path) -> None:
    old, new = killed / "pipeline", killed / ".new"
    for folder in (old, new):
        folder.mkdir()
        write_card(folder, killed, facts(images))
        assert is_generated((folder / "README.md").read_text().replace("\n", "\r\n"))
        assert len(list(folder.iterdir())) == 2
    mine = (old / "README.md").read_text().replace("# license: name the licence here", "license: mit  #")
    (old / "README.md").write_text(mine)
    write_card(new, killed, facts(images))
    assert (new / "README.md").read_text() == mine
    beside = (new / "README-step-000006.md").read_text()
    assert "owner/cats" in beside and "![Samples](sample-step-000006.png)" in beside
    assert (new / "sample-step-000006.png").is_file()


@pytest.mark.parametrize("links", [True, False])
def test_a_result_made_anew_keeps_what_users_put_beside_it(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # as on a file system without hard links
        monkeypatch.setattr(export.os, "link", Mock(side_effect=PermissionError))
    ours = ["transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/model.fp16.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.json"]  # fmt: skip
    users = ["notes.txt", "lora/mine.safetensors", "transformer/mine.json", "README-step-000003.md"]
    for name in (*ours, *users, "README-step-000004.md", "vae/config.json"):
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_text(signed("old") if name == "README-step-000004.md" else "old")
    (tmp_path / "new" / "vae").mkdir(parents=True)
    (tmp_path / "new" / "vae" / "config.json").write_text("new")
    carry_over(tmp_path / "old", tmp_path / "new")
    new = tmp_path / "new"
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == {
        *users,
        "vae/config.json",
    }
    assert (new / "vae" / "config.json").read_text() == "new"
    assert (new / "notes.txt").read_text() == "old"
