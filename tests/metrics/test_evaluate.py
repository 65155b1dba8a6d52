"""`latentflow evaluate` from a checkpoint to a report."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from latentflow import DiT, LatentFlowPipeline
from latentflow.autoencoder import AutoencoderConfig, build_autoencoder, downscale_factor, latent_channels
from latentflow.errors import UserError
from latentflow.models import small_text_encoder, train_tokenizer

COLOURS = ["red", "lime", "blue", "yellow", "white", "black"]
THINGS = ["hat", "shoe"]


@pytest.fixture(scope="module")
def program(repository: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "evaluate_program", repository / "pipelines" / "evaluate.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look their types up there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 captioned pictures: a hat is a colour above white, a shoe a colour below white."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for thing in THINGS:
        for colour in COLOURS:
            image = Image.new("RGB", (32, 32), "white")
            image.paste(Image.new("RGB", (32, 14), colour), (0, 0 if thing == "hat" else 18))
            image.save(folder / f"{colour}-{thing}.png")
            rows.append({"file_name": f"{colour}-{thing}.png", "text": f"{colour} {thing}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (1, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **shape), 32)
    channels, side = latent_channels(vae), 32 // downscale_factor(vae)
    tokenizer = train_tokenizer([f"{colour} {thing}" for colour in COLOURS for thing in THINGS])
    encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2)
    network = DiT(in_channels=channels, width=16, depth=1, heads=2, text_dim=16, sample_size=side).eval()
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    pipe = LatentFlowPipeline(vae.eval(), network, text_encoder=encoder.eval(), tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    return folder


def evaluate(program: ModuleType, *argv: object) -> None:
    program.main([str(word) for word in argv])


def test_the_report_is_complete_and_repeatable(
    program: ModuleType, pictures: Path, checkpoint: Path, tmp_path: Path
) -> None:
    reports = []
    for name, batch in (("a.json", 4), ("b.json", 3)):
        flags = ["-n", 4, "--steps", 1, "--validation", 0.25, "--batch-size", batch, "--device", "cpu"]
        evaluate(program, checkpoint, pictures, "-o", tmp_path / name, *flags, "--attributes", *COLOURS)
        reports.append(json.loads((tmp_path / name).read_text()))
    first, second = reports
    assert Image.open(tmp_path / "a.png").size == (70, 70)  # 2 x 2 pictures with margins
    assert first["frechet_distance"]["generated"] == 4
    assert first["reconstruction"]["held_out"]["images"] == 3
    assert 0 <= first["caption_retrieval"]["top_1"] <= first["caption_retrieval"]["top_5"] <= 1
    assert first["memorisation"]["ratio"] > 0
    assert first["attributes"]["n"] == 3
    # A network that was never trained predicts zero: its loss is E|x1 - x0|^2, at least the noise's variance.
    assert first["validation_loss"]["held_out"]["value"] > 0.9
    for report in reports:
        for key in ("seconds", "settings"):
            del report[key]
    assert flat(first) == pytest.approx(flat(second), rel=1e-3)


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {name: x for key, item in value.items() for name, x in flat(item, f"{prefix}/{key}").items()}
    return {prefix: value} if isinstance(value, int | float) else {}


def test_a_run_lends_its_settings(program: ModuleType, tmp_path: Path) -> None:
    config = program.EvaluateConfig(checkpoint=str(tmp_path / "pipeline"), data="d", background="black")
    defaults = program.as_trained(config)
    assert (defaults.validation, defaults.condition, defaults.background) == (0.02, "auto", "black")
    (tmp_path / "config.yaml").write_text(
        "validation: 0.3\nseed: 7\nbackground: grey\nmissing_caption: skip\nmasks: alpha\n"
    )
    lent = program.as_trained(config)
    # Without these, other pictures would be found, and others held out.
    assert (lent.missing_caption, lent.masks) == ("skip", "alpha")
    assert (lent.validation, lent.validation_seed, lent.background) == (0.3, 7, "black")


def test_captions_come_once_before_one_comes_twice(program: ModuleType) -> None:
    chosen = program.choose(["a", "b", "a", "c"], 5, 0)
    assert sorted(chosen[:3]) == ["a", "b", "c"]
    assert len(chosen) == 5


def test_mistakes_are_told_before_anything_is_computed(
    program: ModuleType, pictures: Path, checkpoint: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(program, checkpoint, pictures, "-o", report)
    with pytest.raises(UserError, match=r"report\.json"):
        evaluate(program, checkpoint, pictures, "-o", tmp_path / "report.txt")
    with pytest.raises(UserError, match="--test FOLDER"):
        evaluate(program, checkpoint, pictures, "-o", tmp_path / "x.json", "--validation", 0)
    assert report.read_text() == "{}"
