"""`latentflow report`, what a run records for it, trackers, the model card and the hub."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from PIL import Image

from latentflow.cli import parse, write_config
from latentflow.data import find_source
from latentflow.errors import UserError
from latentflow.training import hub, run_files, trackers
from latentflow.training.card import CardFacts, write_card
from latentflow.training.report import Reporter
from latentflow.training.run_report import data_lines, read_run, report_page, thinned

from .command import ROOT


def row(step: int, **values: float) -> str:
    return json.dumps({"step": step, "time": 1e9 + step, **values})


def trained(step: int, loss: float) -> str:
    return row(step, loss=loss, lr=1e-3, images_per_second=8.0, memory_gib=1.0)


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
    (run / "autoencoder" / "metrics.jsonl").write_text(
        "\n".join([row(1, loss=1.0), row(2, loss=0.5, val_psnr=20.5)])
    )
    for folder, step in ((run, 3), (run / "autoencoder", 2)):
        Image.new("RGB", (1300, 650), "red").save(folder / "samples" / f"step-{step:06d}.png")
    (run / "samples" / "step-000005.png").write_bytes(b"\x89PNG torn")
    told = ["notes of old", "plan: 8 steps", "step 3: val_loss 6", "my/cats: <b>9</b> pictures", "data: 9 to train on",
            "plan: 8 steps", "WARNING: step 5: not finite. The update is skipped."]  # fmt: skip
    (run / "train.log").write_text("\n".join(f"2026-01-01 10:00:00,000 {line}" for line in told))
    return run


def test_repeated_and_torn_lines_leave_the_curve_of_the_last_start(killed: Path) -> None:
    rows = run_files.read_metrics(killed)
    assert [one["step"] for one in rows] == [1, 2, 3, 4, 5, 6]
    assert [one.get("loss") for one in rows] == [
        9.0,
        8.0,
        7.0,
        5.0,
        4.0,
        None,
    ]  # what is not finite is no point
    assert [one.get("val_loss") for one in rows] == [None, None, 6.0, None, 3.0, None]


def test_what_was_written_beyond_the_step_resumed_from_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join([trained(10, 1.0), trained(30, 3.0), trained(20, 2.0)]))
    assert [one["step"] for one in run_files.read_metrics(tmp_path)] == [10, 20]
    assert read_run(tmp_path).seconds == pytest.approx(30 / 8)  # going back takes no time


def test_time_in_training_counts_repeated_steps_and_no_standstill(killed: Path) -> None:
    # Steps 1 to 4, then 5 and 6 after going back to 4: 6 steps of 4 samples at 8 a second, whatever the clock says.
    assert read_run(killed).seconds == pytest.approx(6 * 4 / 8)


def test_a_page_of_a_killed_run_of_two_stages(killed: Path) -> None:
    html = str(report_page(killed).html())
    for text in (
        "not finished: step 6 of 8", "The autoencoder, trained first", "val_psnr", "20.5000", "1 updates were skipped",
        "step-000005.png cannot be read", "&lt;b&gt;9&lt;/b&gt; pictures", "step 3</figcaption>",
    ):  # fmt: skip
        assert text in html, text
    assert html.count("<svg") == 2 and html.count("data:image/") == 2
    assert 'src="http' not in html and "<script" not in html
    assert "notes of old" not in html.split("train.log")[0]  # only the last start's data


def test_a_folder_with_nothing_but_settings_has_a_page_and_any_other_folder_none(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "cats"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("network: dit\nmax_train_steps: 8\n")
    assert "No figures were logged yet" in str(report_page(run).html())
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"Did you mean '.*cats'"):
        report_page(tmp_path / "runs")


def program(folder: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["flow", "autoencoder"])
def test_the_command_to_resume_gives_the_settings_of_the_run(name: str, tmp_path: Path) -> None:
    module, run = program("train", name), tmp_path / "my run"
    run.mkdir()
    config = parse(module.Config, ["my data", "-o", str(run), "--learning-rate", "0.5"], prog="x")
    write_config(config, run / "config.yaml")
    words = shlex.split(read_run(run).resume())
    assert words[:2] == ["latentflow", "train" if name == "flow" else "autoencoder"]
    assert parse(module.Config, words[2:], prog="x") == config


def test_an_existing_page_is_replaced_only_when_asked(killed: Path) -> None:
    module = program("train", "report")
    module.main([str(killed)])
    page = killed / "report.html"
    page.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        module.main([str(killed)])
    assert page.read_text() == "mine"
    module.main([str(killed), "--overwrite"])
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
    for step in (0, 3):
        one = reporter(tmp_path, step=step)
        one.step(4)
        one.metrics(step + 1, 4, {"loss": 1.0, "lr": 0.1})
        one.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
    starts = run_files.read_starts(tmp_path)
    assert [one["step"] for one in starts] == [0, 3]
    assert starts[0]["torch"] == torch.__version__ and starts[0]["processes"] == 1
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[::2]
    ] == [1, 4]


class FakeTracker:
    """accelerate's interface, in memory."""

    made: ClassVar[list[FakeTracker]] = []

    def __init__(self, project: str, **options: Any) -> None:
        self.options, self.calls, self.broken = options, [], False
        FakeTracker.made.append(self)

    def start(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            if self.broken:
                raise ConnectionError("gone")
            self.calls.append((name, *arguments, options))

        return call


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeTracker]:
    monkeypatch.setattr(trackers, "WandBTracker", FakeTracker)
    monkeypatch.setitem(sys.modules, "wandb", trackers)
    FakeTracker.made = []
    return FakeTracker.made


def test_wandb_gets_settings_curves_and_pictures_and_a_resumed_run_its_old_name(
    tmp_path: Path, wandb: list[FakeTracker]
) -> None:
    (tmp_path / "config.yaml").write_text("learning_rate: 0.5\n")
    for step in (1, 2):
        one = reporter(tmp_path, "wandb")
        one.metrics(step, 4, {"loss": 0.5, "lr": 0.1})
        one.validation(step, {"loss": 0.25})
        one.picture(step, Image.new("RGB", (6, 4), "red"))
        one.close()
    first, second = wandb
    assert first.options["id"] == second.options["id"] and first.options["dir"] == str(tmp_path)
    assert first.calls[0][:2] == ("store_init_configuration", {"learning_rate": 0.5})
    assert first.calls[1][1]["loss"] == 0.5 and first.calls[1][-1] == {"step": 1}
    assert first.calls[2][1] == {"val_loss": 0.25}
    assert first.calls[3][0] == "log_images" and first.calls[3][1]["preview"].shape == (1, 4, 6, 3)
    assert first.calls[4][0] == "finish"


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, wandb: list[FakeTracker]) -> None:
    one = reporter(tmp_path, "wandb")
    wandb[0].broken = True
    for step in (1, 2):
        one.metrics(step, 4, {"loss": 0.5, "lr": 0.1})
    one.close()
    assert len(run_files.read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'pip install "latentflow\[{name}\]"'):
        reporter(tmp_path, name)


def test_tensorboard_gets_curves_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = reporter(tmp_path, "tensorboard")
    one.metrics(3, 4, {"loss": 0.5, "lr": 0.1})
    one.picture(3, Image.new("RGB", (6, 4), "red"))
    one.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    picture = events.Images("preview")[0]
    assert (picture.width, picture.height) == (6, 4)


# ---- the model card and the hub ----


def facts(pictures: Path) -> CardFacts:
    return CardFacts(
        where="owner/cats",
        source=find_source(str(pictures)),
        parts={"transformer": torch.nn.Linear(999, 1000)},
    )


def test_the_card_says_what_it_is_how_it_was_trained_and_how_to_load_it(killed: Path, pictures: Path) -> None:
    folder = killed.parent / "pipeline"
    folder.mkdir()
    write_card(folder, killed, facts(pictures))
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["latentflow", "flow-matching"]
    }  # fmt: skip
    assert "# license:" in header  # for the user to write
    caption = find_source(str(pictures)).captions()[0]
    for text in (
        'from_pretrained("owner/cats")', f"prompt={caption!r}", "`transformer` | Linear | 1.0 M",
        "- data: 9 to train on",
        "- cats: <b>9</b>", "# cats", "| width | 96 |", "| vae | vae |",
        "6 steps of 4 samples", "at step 5: `val_loss` 3.0000. They", "![Samples](sample.png)",
    ):  # fmt: skip
        assert text in body, text
    assert (folder / "sample.png").is_file()
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_card_of_the_users_stays_also_when_the_pipeline_is_written_anew(
    killed: Path, pictures: Path
) -> None:
    old, new = killed / "pipeline", killed / ".new"
    for folder in (old, new):
        folder.mkdir()
    (old / "README.md").write_text("mine")
    write_card(new, killed, facts(pictures))
    assert (new / "README.md").read_text() == "mine"
    assert "owner/cats" in (new / "README-step-000006.md").read_text()


class FakeHub:
    """The calls that would have gone to the hub."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    exists, card, error = False, False, None

    def repo_exists(self, name: str) -> bool:
        return type(self).exists

    def file_exists(self, name: str, file: str) -> bool:
        return type(self).card

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", options))

    def upload_folder(self, **options: Any) -> None:
        if type(self).error:
            raise type(self).error
        self.calls.append(("upload", options))


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "token")
    FakeHub.calls, FakeHub.exists, FakeHub.card, FakeHub.error = [], False, False, None
    return FakeHub


def test_a_new_repository_is_private_and_a_card_on_the_hub_stays(
    tmp_path: Path, fake_hub: type[FakeHub]
) -> None:
    assert hub.push(tmp_path, "owner/cats") == "https://huggingface.co/owner/cats"
    assert fake_hub.calls[0] == ("create", {"private": True, "exist_ok": True})
    assert fake_hub.calls[1][1]["ignore_patterns"] == [] and fake_hub.calls[1][1]["folder_path"] == tmp_path
    fake_hub.exists = fake_hub.card = True
    hub.push(tmp_path, "owner/cats")
    assert len(fake_hub.calls) == 3 and fake_hub.calls[2][1]["ignore_patterns"] == ["README.md"]


def test_a_push_that_fails_says_how_to_try_again(tmp_path: Path, fake_hub: type[FakeHub]) -> None:
    fake_hub.error = ConnectionError("no route to the hub")
    with pytest.raises(UserError, match=r"(?s)no route.*latentflow push .* owner/cats"):
        hub.push(tmp_path, "owner/cats")


def test_what_cannot_be_pushed_is_known_before_the_run(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.check_push("owner/cats")
    for name in ("cats", "a/b/c", "owner/ca ts"):
        with pytest.raises(UserError, match="owner/name"):
            hub.check_push(name)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        hub.check_push("owner/cats")
    assert not fake_hub.calls
