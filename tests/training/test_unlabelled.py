"""Images without a class among others that have one: they are trained on without a condition."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentflow import LatentFlowEditPipeline, LatentFlowPipeline
from latentflow.config import FlowConfig
from latentflow.data import find_source
from latentflow.errors import UserError
from latentflow.models import Condition, DiT, small_text_encoder, train_tokenizer
from latentflow.training import trained_model
from latentflow.training.data import conditions_of
from latentflow.training.distill import open_teacher
from latentflow.training.losses import FlowLoss

from .command import TINY, call, losses, opened, same_state, sampled

pytestmark = pytest.mark.usefixtures("no_memorisation")


@pytest.fixture(scope="module")
def half_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of random pixels: three in each of two classes, and six without one."""
    folder = tmp_path_factory.mktemp("half")
    pixels = torch.randint(0, 256, (12, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    for number, image in enumerate(pixels.numpy()):
        place = folder / ("a", "b", "", "")[number % 4]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return folder


def test_they_are_the_null_in_the_loss(half_labelled: Path) -> None:
    source = find_source(str(half_labelled), condition="class", missing_caption="empty")
    network = DiT(in_channels=2, width=16, depth=1, heads=1, sample_size=4, num_classes=2)
    seen: list[Condition] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            seen.append(condition)
            return network(x, t, condition)

    config = FlowConfig(condition_dropout=0.5)
    loss = FlowLoss(Watched(), config, seed=0)
    rows = [*range(12)]
    batch: dict[str, Any] = {"latents": torch.randn(12, 2, 4, 4), "sample_ids": rows}
    batch |= conditions_of(source, 0)(rows, rows)
    missing = torch.tensor([example.label is None for example in source.examples])
    assert int(missing.sum()) == 6
    loss.train()(batch)
    loss.eval()(batch)
    training, validating = seen
    assert training.drop is not None and bool(training.drop[missing].all())
    assert 0 < int(training.drop[~missing].sum()) < 6  # of the others some, at random
    assert torch.equal(validating.drop, missing)
    compared: list[Tensor] = []
    loss.coupling = lambda x0, x1, by, generator: compared.append(by) or x0
    loss.train()(batch)
    assert torch.equal(compared[0] == -1, missing)  # of no class, and not of the first
    labelled = source.subset([row for row in rows if not missing[row]])
    assert "unlabelled" not in conditions_of(labelled, 0)([0], [0])  # as runs of before


@pytest.mark.parametrize("frozen", [False, True])
def test_images_without_a_caption_are_the_null_as_well(frozen: bool, tmp_path: Path) -> None:
    """As an empty prompt is when images are drawn; the tokenizer makes a token of it."""
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(("a red hat", " ", "a dog", "")[number])
    source = find_source(str(tmp_path), missing_caption="empty")
    tokenizer = train_tokenizer(["a red hat", "a dog"])
    encoder = small_text_encoder(tokenizer, 16, 1, 2).eval()
    network = DiT(in_channels=2, width=16, depth=1, heads=1, sample_size=4, text_dim=16)
    rows = [*range(4)]
    given = conditions_of(source, 0, tokenizer, encoder if frozen else None)(rows, rows)
    mask = given["text_mask" if frozen else "attention_mask"].bool()
    assert bool(mask.any(1).all())  # all have tokens
    loss = FlowLoss(network, FlowConfig(coupling="conditional-ot"), 0, None if frozen else encoder)
    drop = loss.eval().prompts(given).drop
    assert drop is not None and drop.tolist() == [False, True, False, True]
    assert loss({"latents": torch.randn(4, 2, 4, 4), "sample_ids": rows, **given})["loss"].isfinite()
    assert "unlabelled" not in conditions_of(source, 0, tokenizer)([0, 2], [0, 2])  # as runs of before


def test_that_nothing_is_missing_is_said(tmp_path: Path) -> None:
    for kind in "ab":
        (tmp_path / kind).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / kind / f"{kind}.png")
    said = "--missing-caption empty changes nothing: no image lacks a "
    assert said + "class" in find_source(str(tmp_path), missing_caption="empty").notes
    spoken = find_source(str(tmp_path), condition="text", missing_caption="empty")
    assert said + "caption" in spoken.notes
    for settings in ({}, {"missing_caption": "skip"}, {"caption": "a photo"}):
        assert not any(said in note for note in find_source(str(tmp_path), **settings).notes)


@pytest.mark.parametrize("precomputed", [False, True])
def test_a_run_on_them(precomputed: bool, half_labelled: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    flags = ["--condition", "class", "--max-train-steps", 2]
    refused = call(cache, half_labelled, "-o", run, *TINY, *flags, expect=2)
    assert "no class for 6 of 12 images" in refused and "--missing-caption empty" in refused
    said = call(cache, half_labelled, "-o", run, *TINY, *flags, "--missing-caption", "empty")
    assert "6 images without a class, trained on without a condition" in said and "2 classes: a, b" in said
    pipe = LatentFlowPipeline.from_pretrained(run / "pipeline")
    assert pipe.model.classes == ("a", "b")
    if precomputed:
        refused = call(
            cache,
            half_labelled,
            "-o",
            tmp_path / "none",
            "--vae",
            run,
            "--balance-classes",
            file="precompute",
            expect=2,
        )
        assert "--balance-classes is chosen when training" in refused
        stored, again = tmp_path / "stored", tmp_path / "again"
        vae = ("--vae", run / "pipeline" / "vae", "--resolution", 16)
        call(
            cache,
            half_labelled,
            "-o",
            stored,
            *vae,
            *flags[:2],
            "--missing-caption",
            "empty",
            file="precompute",
        )
        first = [*TINY, "--vae", run / "pipeline" / "vae", "--max-train-steps", 2]
        call(cache, stored, "-o", again, *first)
        direct = tmp_path / "direct"
        call(cache, half_labelled, "-o", direct, *first, *flags[:2], "--missing-caption", "empty")
        assert losses(again) == losses(direct)


def test_without_dropout_there_is_no_null_to_lead_away_from(
    half_labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    line = [half_labelled, *TINY, "--condition", "class", "--max-train-steps", 1, "--condition-dropout", 0]
    said = call(cache, *line, "--missing-caption", "skip", "-o", run)
    assert "the checkpoint draws without guidance" in said
    pipe = opened(run / "pipeline")
    assert pipe.usual_guidance == pipe.model.edit_defaults.guidance == 1.0
    assert LatentFlowEditPipeline.from_pipe(pipe).model.trained_null is False
    plain = sampled(pipe, class_labels=["a"])
    assert torch.equal(plain, sampled(pipe, class_labels=["a"], guidance_scale=1.0))
    refused: list[Callable[[], Any]] = [
        lambda: sampled(pipe, class_labels=["a"], guidance_scale=3.0),
        lambda: pipe.model.features(torch.zeros(1, 3, 16, 16), 1, 0.5),
        lambda: pipe.model.null(2),
        lambda: open_teacher(str(run / "pipeline"), 3.0),
    ]
    for call_it in refused:
        with pytest.raises(UserError, match="was trained without --condition-dropout"):
            call_it()

    made: list[Any] = []

    def make(**settings: Any) -> Any:
        made.append(LatentFlowPipeline(**settings))
        return made[-1]

    monkeypatch.setattr(trained_model, "LatentFlowPipeline", make)
    tuned = [half_labelled, "--condition", "class", "--missing-caption", "skip", "--prior-samples", 0]
    tuned += ["--init-from", run / "pipeline", "--dry-run", "-o", tmp_path / "tuned"]
    said = call(cache, *line, "--missing-caption", "empty", "--dry-run", "-o", tmp_path / "other")
    assert "leads away from the images without a condition alone" in said
    call(cache, *tuned)
    call(cache, *tuned, "--condition-dropout", 0)
    assert [(pipe.model.trained_null, pipe.usual_guidance) for pipe in made] == [
        (True, 4.0),
        (True, 4.0),
        (False, 1.0),
    ]


def test_a_run_of_balanced_classes_resumes_exactly(half_labelled: Path, tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(half_labelled, data)
    for file in sorted((data / "b").iterdir())[1:]:
        file.unlink()
    line = [data, *TINY, "--condition", "class", "--missing-caption", "empty", "--validation", 0]
    line += ["--lr-scheduler", "constant", "--max-train-steps"]
    said = call(cache, *line, 4, "-o", tmp_path / "whole", "--balance-classes")
    assert "balanced classes: an epoch uses each 3 times, and an image up to 3 times" in said
    for steps in (2, 4):
        call(cache, *line, steps, "-o", tmp_path / "parts", "--balance-classes")
    assert same_state(tmp_path / "whole", tmp_path / "parts")
    assert "balance_classes: True -> None" in call(cache, *line, 6, "-o", tmp_path / "parts", expect=2)
