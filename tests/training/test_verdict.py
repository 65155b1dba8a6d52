"""The verdict at the end of a run: on curves whose truth is known, on figures of real runs, and by the real command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from latentflow.training.fine_tune import learning
from latentflow.training.report.folder import read_run
from latentflow.training.report.page import report_page
from latentflow.training.report.verdict import judge, measured_lines, trend

from .command import TINY, call, paste

STEPS = list(range(100, 2001, 100))
X = np.linspace(0, 1, 20)


def share(kind: str, clean: np.ndarray, noise: float, tries: int = 400) -> float:
    """Return how often curves with Gaussian noise are called so."""
    rng = np.random.default_rng(0)
    found = [trend(STEPS, clean + noise * rng.standard_normal(20)).kind for _ in range(tries)]
    return found.count(kind) / tries


def test_flat_noise_is_called_a_trend_in_two_of_a_hundred_cases_at_most() -> None:
    # Binomial: 400 tries at 2 % exceed 3.75 % in 1 of 100 cases.
    assert share("flat", np.full(20, 0.5), noise=0.05) >= 0.9625


def test_exponential_decay_falls_until_it_has_decayed() -> None:
    # Over the points of the second half, 10/19 to 1, it falls by 0.3 (exp(-20/19) - exp(-2)) = 0.064, from 0.60 on.
    assert share("falling", 0.5 + 0.3 * np.exp(-2 * X), noise=0.01) >= 0.99
    assert share("flat", 0.5 + 0.3 * np.exp(-20 * X), noise=0.01) >= 0.9625
    exact = trend(STEPS, 0.5 + 0.3 * np.exp(-2 * X))
    assert exact.kind == "falling" and exact.change == pytest.approx(0.064 / 0.57, abs=0.01)


@pytest.mark.parametrize("best", [0.2, 0.5, 0.7])
def test_a_valley_rises_since_its_bottom(best: float) -> None:
    valley = 0.5 + 0.4 * (X - best) ** 2
    assert share("rising", valley, noise=0.002) >= 0.975
    found = trend(STEPS, valley)
    assert found.kind == "rising"
    assert abs(found.step - (100 + 1900 * best)) <= 50  # the nearest step
    assert found.change == pytest.approx(float(valley[-3:].mean() / valley.min() - 1))


def test_what_does_not_matter_or_cannot_be_known_is_no_trend() -> None:
    assert trend(STEPS, 0.5 - 0.004 * X).kind == "flat"  # exact, but 0.4 % over half of the run
    assert trend(STEPS, np.full(20, 0.5)).kind == "flat"
    assert trend(STEPS[:7], np.linspace(2, 1, 7)).kind == "unknown" == trend([], []).kind


# ---- from the files of a run ----


def run_of(
    folder: Path,
    losses: Any,
    name: str = "loss",
    files: dict[str, dict[str, Any]] | None = None,
    log: str = "",
    **settings: Any,
) -> Any:
    folder.mkdir(exist_ok=True)
    config = {"data": "cats", "network": "dit", "max_train_steps": 2000, "learning_rate": 2e-3, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, name: value} for step, value in zip(STEPS, losses, strict=True)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for result in ("pipeline", "autoencoder"):
        (folder / result).mkdir(exist_ok=True)
    (folder / "train.log").write_text(log)
    for file, found in (files or {}).items():
        (folder / file).write_text(json.dumps(found))
    return read_run(folder)


FALLING, FLAT = 0.5 + 0.4 * np.exp(-2 * X), 0.5 + 0.4 * np.exp(-20 * X)
VALLEY = 0.5 + 0.4 * (X - 0.5) ** 2


def learnt(after: float, without: float, images: int = 20, **more: float) -> dict[str, dict[str, float]]:
    """What `LearningMeter` writes."""
    found = {"images": images, "measured": images, "before": 1.6, "after": after, "error": 0.02}
    return {"learning.json": found | {"without_captions": without, "distinct_captions": 1.0} | more}


def test_runs_from_scratch(tmp_path: Path) -> None:
    def verdict(*arguments: Any, **settings: Any) -> Any:
        return judge(run_of(tmp_path, *arguments, **settings))

    falling = verdict(FALLING, "val_loss")
    assert falling.kind == "still falling" and falling.command.endswith("--max-train-steps 4000")
    assert "on held-out images fell by another" in falling.text and "training loss" in verdict(FALLING).text
    done = verdict(FLAT, "val_loss")
    assert (done.kind, done.command) == ("done", "")
    memorising = verdict(VALLEY, "val_loss")
    assert (
        memorising.kind == "memorising" and "since step 1000" in memorising.text
    )  # or 1100, as near to the bottom
    assert memorising.command.endswith(f"-o {tmp_path}-1000-steps --max-train-steps 1000")
    one = "2026-01-01 10:00:00,000 data: 40 images to train on, 1 held out; condition: class"
    assert verdict(VALLEY, "val_loss", log=one) is None  # no training loss was logged here
    unstable = verdict([2.0, *VALLEY[1:]])  # a training loss that rises memorises nothing
    assert unstable.kind == "unstable"
    assert unstable.command.endswith(f"-o {tmp_path}-rate-0.001 --learning-rate 0.001")
    assert verdict(2.0 - 0.05 * X).kind == "still falling"
    unlearnt = verdict(2.0 - 0.05 * (1 - np.exp(-20 * X)))
    assert unlearnt.kind == "not learnt" and "fell by only 2%" in unlearnt.text
    flat = verdict(2.0 + 0.01 * np.sin(40 * X))
    assert (
        flat.command.endswith("--max-train-steps 4000 --learning-rate 0.004")
        and "0.002 to 0.004" in flat.text
    )
    assert verdict(FALLING, "val_loss", max_train_steps=3000) is None  # not finished
    stopped = (
        "2026-01-01 10:00:00,000 stopped early at step 2000; the result is of step 900, whose val_loss was"
    )
    early = verdict(VALLEY, "val_loss", log=stopped, early_stop=3)
    assert early.kind == "stopped early" and "after step 900" in early.text
    assert verdict(FALLING, method="distribution-matching") is None
    assert (
        verdict(2.0 - 0.05 * X, "val_loss", method="shortcut").kind == "still falling"
    )  # a student is its teacher


def test_an_autoencoder_is_judged_by_its_psnr(tmp_path: Path) -> None:
    settings = {"autoencoder_steps": 2000, "autoencoder_learning_rate": 1e-3}
    run = run_of(tmp_path, 20 + 5 * X, "val_psnr", **settings)
    del run.config["network"]
    verdict = judge(run)
    assert verdict is not None and verdict.kind == "still falling"
    assert (
        verdict.command
        == f"latentflow autoencoder --config {tmp_path}/config.yaml -o {tmp_path} --autoencoder-steps 4000"
    )


# Ten real fine-tunes on 20 to 77 captioned images: the loss after, the same without captions, and the share of the
# captions that drew the right image.
REAL = {
    "twemoji-20, LoRA 2e-3": (0.537, 0.724, 0.30),
    "fluent-50, LoRA 2e-3": (0.350, 0.487, 0.36),
    "clipart-80, LoRA 2e-3": (0.783, 0.894, 0.10),
    "clipart-80, LoRA 6e-3": (0.574, 0.802, 0.18),
    "clipart-80, full": (0.403, 0.692, 0.40),
    "fluent-50, LoRA 6e-3": (0.164, 0.442, 0.82),
    "twemoji-20, LoRA 6e-3": (0.220, 0.598, 0.95),
    "twemoji-20, full": (0.126, 0.501, 0.95),
    "fluent-50, full": (0.072, 0.386, 0.98),
    "twemoji-20, LoRA 6e-3, 300 steps of 20": (0.093, 0.487, 1.0),
}


@pytest.mark.parametrize("name", REAL)
def test_fine_tunes_whose_captions_draw_nothing_right_are_reported(name: str, tmp_path: Path) -> None:
    after, without, retrieval = REAL[name]
    run = run_of(tmp_path, FLAT, files=learnt(after, without, 77), init_from="emoji-64", lora_rank=8)
    verdict = judge(run)
    assert verdict is not None
    if retrieval >= 0.4:
        assert verdict.kind == "done"
        return
    assert verdict.kind == "not learnt" and verdict.command.endswith("--learning-rate 0.004")
    assert (
        f"Loss on the training images: 1.60 -> {after:.2f} ({without:.2f} without their captions)"
        in verdict.text
    )


@pytest.mark.parametrize(("copied", "kind"), [(3, "not learnt"), (7, "done")])
def test_captions_that_draw_copies_draw_their_images(copied: int, kind: str, tmp_path: Path) -> None:
    """A real fine-tune on 47 icons of 4,096 numbers each: 86 % of the captions drew the right one."""
    copies = {"copied": copied, "drawn": 16, "copies": copied / 16, "usual": [0.0, 0.1875], "ratio": 0.5}
    files = learnt(0.332, 0.485, 47) | {"memorisation.json": copies}
    verdict = judge(run_of(tmp_path, FLAT, files=files, init_from="pictograms-128"))
    assert verdict is not None and verdict.kind == kind


def test_a_fine_tune_that_was_cut_short_goes_on_before_its_rate_is_raised(tmp_path: Path) -> None:
    def verdict(rate: float, **usual: float) -> Any:
        files = learnt(0.84, 0.91, 75, **usual)
        return judge(run_of(tmp_path, FLAT, files=files, init_from="emoji-64", learning_rate=rate))

    short = verdict(0.012, usual_steps=4800, usual_learning_rate=0.012)  # of 2,000 steps
    assert short.kind == "not learnt" and "2000 steps are fewer than the 4800 that" in short.text
    assert short.command.endswith("--max-train-steps 4800")
    for other in (
        verdict(0.012, usual_steps=479, usual_learning_rate=0.012),
        verdict(0.002, usual_steps=4800, usual_learning_rate=0.012),
        verdict(0.012),  # of an earlier version
    ):
        assert "Raise the learning rate" in other.text


def test_other_fine_tunes(tmp_path: Path) -> None:
    def verdict(losses: Any, files: Any, name: str = "loss") -> Any:
        return judge(run_of(tmp_path, losses, name, files, init_from="emoji-64", train_batch_size=64))

    # Of many images a caption says little, and a paired fall is what counts.
    assert verdict(FLAT, learnt(1.5, 1.55, images=5000)).kind == "done"
    unmoved = verdict(FLAT, learnt(1.59, 1.6, images=5000))
    assert unmoved.kind == "not learnt" and "or the checkpoint knew these images already" in unmoved.text
    assert unmoved.command.endswith("--learning-rate 0.004")
    assert verdict(FALLING, learnt(0.9, 1.0)).command.endswith("--max-train-steps 4000")  # the rate is well
    copies = {"copied": 16, "drawn": 16, "copies": 1.0, "usual": [0.0, 0.25], "ratio": 0.18}
    found = learnt(0.1, 0.5) | {"memorisation.json": copies}
    memorising = verdict(FALLING, found)
    assert (
        memorising.kind == "memorising" and "16 of 16 generated images are nearly copies" in memorising.text
    )
    assert memorising.command.endswith("--max-train-steps 1000")
    # Held-out captions of few images say nothing about others: half the steps, not those of the bottom.
    few = verdict(0.5 + 0.4 * (X - 0.2) ** 2, learnt(0.1, 0.5), "val_loss")
    (tmp_path / "memorisation.json").unlink()
    few = verdict(0.5 + 0.4 * (X - 0.2) ** 2, learnt(0.1, 0.5), "val_loss")
    assert few.kind == "memorising" and few.command.endswith("--max-train-steps 1000")
    some = copies | {"copied": 3, "copies": 3 / 16, "ratio": 0.78}
    run = run_of(tmp_path, FLAT, "val_loss", learnt(0.1, 0.5) | {"memorisation.json": some}, init_from="x")
    assert judge(run).kind == "done"  # type: ignore[union-attr]
    assert any("3 of 16 generated images are nearly copies" in line for line in measured_lines(run, None))
    (tmp_path / "learning.json").write_text('{"images": 2')  # torn
    assert judge(read_run(tmp_path)).kind == "done"  # type: ignore[union-attr]


def test_a_fine_tune_that_got_worse_is_not_sent_to_a_higher_rate(tmp_path: Path) -> None:
    run = run_of(tmp_path, FLAT, files=learnt(1.7, 1.7, 5000), init_from="emoji-64", train_batch_size=64)
    verdict = judge(run)
    assert verdict is not None and "1.60 -> 1.70 (1.70 without their captions). It has risen" in verdict.text
    assert "Halve it, in a new run:" in verdict.text and verdict.command.endswith("--learning-rate 0.001")
    assert shlex.split(verdict.command)[5] != str(tmp_path)
    html = report_page(tmp_path).html()
    assert "rate-0.001" in html and "as many steps again" not in html


def test_a_fine_tune_of_many_images_in_few_steps_is_sent_on_to_as_many_as_are_usual(tmp_path: Path) -> None:
    measured = learnt(1.59, 1.6, 5000, usual_steps=15_625, usual_learning_rate=0.002)
    verdict = judge(run_of(tmp_path, FLAT, files=measured, init_from="emoji-64"))
    assert verdict is not None and verdict.text.startswith("not learnt yet. Loss on the training images")
    assert "2000 steps are fewer than the 15625 that" in verdict.text
    assert verdict.command.endswith("--max-train-steps 15625") and "--learning-rate" not in verdict.command


# ---- by the real command ----


@pytest.fixture(scope="module")
def base(images: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base")
    call(cache, images, "-o", run, *TINY, "--max-train-steps", 4, "--preview-steps", 0)
    return run


def last_verdict(said: str) -> tuple[str, str]:
    """Return the last line of a run and the command below it."""
    found = re.search(r"verdict: (.*)\n  (latentflow .*)\n$", said)
    assert found, said
    return found[1], found[2]


def test_a_fine_tune_that_learns_nothing_says_so_last_and_its_command_works(
    images: Path, base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "my run"
    few = ["--prior-samples", 0, "--validation-steps", 0, "--preview-steps", 0, "--max-train-steps", 12]
    flags = [*TINY, *few, "--init-from", base, "--lora-rank", 2, "--learning-rate", "1e-6", "--validation", 0]
    text, command = last_verdict(call(cache, images, "-o", run, *flags))
    assert text.startswith("not learnt. Your captions do not draw your images yet. Loss on the training")
    assert shlex.split(command)[-4:] == ["--max-train-steps", "24", "--learning-rate", "2e-06"]
    figures = json.loads((run / "learning.json").read_text())
    assert (figures["usual_steps"], figures["usual_learning_rate"]) == (750, 0.012)  # 250 * 12 / 4
    card = (run / "pipeline" / "README.md").read_text()
    assert (
        "Verdict at the end of the run: not learnt. Your" in card and "Loss on the training images: " in card
    )
    assert "nearly copies of a training image" in card
    assert "Verdict: not learnt. Your" in report_page(run).html()
    found = json.loads((run / "learning.json").read_text())
    assert found["before"] == pytest.approx(found["after"], rel=1e-3) and found["distinct_captions"] > 0.5
    # The measure changes nothing of the run.
    monkeypatch.setattr(learning.LearningMeter, "__init__", lambda *arguments: None)
    monkeypatch.setattr(learning.LearningMeter, "write", lambda self, run: None)
    call(cache, images, "-o", tmp_path / "bare", *flags)
    one, other = (
        load_file(folder / "adapter/pytorch_lora_weights.safetensors") for folder in (run, tmp_path / "bare")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
    monkeypatch.undo()
    assert "done:" in paste(cache, command)


def test_a_run_that_still_falls_ends_with_the_command_that_goes_on(
    images: Path, cache: Path, tmp_path: Path
) -> None:
    steps = ["--max-train-steps", 16, "--validation-steps", 1, "--preview-steps", 0, "--learning-rate", 0.01]
    steps += ["--validation", 0.7]  # 8 images
    text, command = last_verdict(call(cache, images, "-o", tmp_path / "run", *TINY, *steps))
    assert text.startswith("still falling. Over the second half of the run the loss on held-out images fell")
    assert "step 32" in paste(cache, command, "--early-stop", 0)


def test_an_autoencoder_ends_with_a_verdict_too(images: Path, cache: Path, tmp_path: Path) -> None:
    own = TINY[: TINY.index("--network-preset")]
    steps = ["--autoencoder-steps", 16, "--validation-steps", 1, "--preview-steps", 0]
    said = call(cache, images, "-o", tmp_path / "run", *own, *steps, file="autoencoder")
    text, command = last_verdict(said)
    assert text.startswith(
        "still falling. Over the second half of the run the squared error on held-out images"
    )
    assert "step 32" in paste(cache, command)


def test_a_shorter_run_has_a_folder_of_its_own_and_the_same_autoencoder(
    images: Path, base: Path, cache: Path
) -> None:
    (base / "train.log").unlink()  # by which two images are held out, too few
    with (base / "metrics.jsonl").open("a") as file:
        for step in range(5, 20):
            file.write(
                json.dumps({"step": step, "loss": 1 / step, "val_loss": 0.1 + 0.01 * abs(step - 6)}) + "\n"
            )
    (base / "config.yaml").write_text(
        (base / "config.yaml").read_text().replace("max_train_steps: 4", "max_train_steps: 19")
    )
    verdict = judge(read_run(base))
    assert verdict is not None and verdict.command.endswith(f"--vae {base}/autoencoder/autoencoder")
    said = paste(cache, verdict.command)
    assert f"done: {base}-6-steps/pipeline" in said and "training one" not in said


def test_the_loss_is_compared_in_pairs(images: Path, base: Path, cache: Path, tmp_path: Path) -> None:
    """Two measurements of the same networks are equal to the last bit, whatever random state they begin in."""
    found: list[torch.Tensor] = []
    measure = learning.LearningMeter._losses

    def seen(self: Any, drop: bool = False) -> torch.Tensor:
        torch.rand(3)
        assert not any(part.training for part in self._loss.modules())  # no captions are dropped
        found.append(measure(self, drop))
        return found[-1]

    flags = ["--prior-samples", 0, "--max-train-steps", 1, "--learning-rate", 0, "--weight-decay", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.LearningMeter, "_losses", seen)
        call(cache, images, "-o", tmp_path, *TINY, *flags, "--init-from", base / "pipeline")
    before, after, without = found
    assert torch.equal(before, after) and len(before) == 10 and not torch.equal(after, without)
