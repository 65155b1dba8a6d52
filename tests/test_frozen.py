"""Files that an earlier version wrote (tests/frozen): each is opened, drawn with or resumed as it was then.

Only commands and public names are used here: which module holds what may change, users' files may not. A run is resumed
by the same line again and, as its report tells users, from its config.yaml. Differences are allowed for as far as
machines round otherwise.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from latentflow import LatentFlowInpaintPipeline, LatentFlowPipeline, register_with_diffusers

from .training.command import call

FROZEN = Path(__file__).with_name("frozen")
EXPECTED = json.loads((FROZEN / "expected.json").read_text(encoding="utf-8"))
DRAWN = load_file(FROZEN / "expected.safetensors")
PROGRAMS = {"train": "flow"}  # the program of a command, where it is called otherwise
ASKED: dict[str, dict[str, Any]] = {
    "text": {"prompt": ["a red circle", "a green square"], "guidance_scale": 2.0, "solver": "heun"},
    "class": {"class_labels": ["round", "square"], "solver": "euler"},  # the default sampler changes
    "average": {"class_labels": [0, 1]},
    "unet": {"num_images_per_prompt": 2},
}
ADAPTER = "pytorch_lora_weights.safetensors"
RUNS = ["run-text", "run-lora", "run-autoencoder", "run-distil"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in which the test runs: their paths are relative."""
    folder = tmp_path / "frozen"
    shutil.copytree(FROZEN, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(folder)
    return folder


def program(*words: object) -> str:
    """Run a command with the frozen cache; return what it said."""
    command, *rest = words
    return call(Path("cache"), *rest, file=PROGRAMS.get(str(command), str(command)))


def start(name: str) -> str:
    """Run the line that made ``name`` again."""
    return program(*EXPECTED["lines"][name].split())


def draw(pipe: Any, **asked: Any) -> dict[str, torch.Tensor]:
    """Draw two images in two steps, as latents and as bytes."""
    pipe.set_progress_bar_config(disable=True)

    def drawn(kind: str) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        images: torch.Tensor = pipe(
            **asked, num_inference_steps=2, generator=generators, output_type=kind
        ).images
        return images

    return {"latents": drawn("latent"), "images": (drawn("pt") * 255).round()}


def check_drawn(name: str, drawn: dict[str, torch.Tensor]) -> None:
    """Compare to what was drawn then: to 1e-4 of the latents' size, and one level of 255."""
    latents, images = DRAWN[f"{name}/latents"], DRAWN[f"{name}/images"]
    assert (drawn["latents"] - latents).norm() <= 1e-4 * latents.norm()
    assert (drawn["images"] - images).abs().max() <= 1


def rows(run: str) -> list[dict[str, Any]]:
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_figures(run: str) -> None:
    """Compare what a run has logged to what it logged then."""
    for step, figures in EXPECTED["runs"][run]["figures"].items():
        found: dict[str, float] = {}
        for row in rows(run):
            found |= row if row["step"] == int(step) else {}
        assert {name: found.get(name) for name in figures} == pytest.approx(figures, rel=1e-3), step


def weights(folder: Path) -> dict[str, list[str]]:
    """Return the names and shapes of the weights in every file below ``folder``."""
    return {
        file.relative_to(folder).as_posix(): [
            f"{name} {[*one.shape]}" for name, one in sorted(load_file(file).items())
        ]
        for file in sorted(folder.rglob("*.safetensors"))
    }


def shards(folder: str) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*.safetensors"))}


# ---------------------------------------------------------------- pipelines and adapters


@pytest.mark.parametrize("name", ASKED)
def test_a_pipeline_draws_what_it_drew(name: str) -> None:
    pipe = LatentFlowPipeline.from_pretrained(f"pipelines/{name}")
    check_drawn(name, draw(pipe, **ASKED[name]))


@pytest.mark.parametrize("name", ASKED)
def test_stock_diffusers_opens_it(name: str) -> None:
    register_with_diffusers()
    pipe = DiffusionPipeline.from_pretrained(f"pipelines/{name}")
    assert isinstance(pipe, LatentFlowPipeline)
    check_drawn(name, draw(pipe, **ASKED[name]))


def test_a_pipeline_inpaints_as_it_did() -> None:
    pipe = LatentFlowInpaintPipeline.from_pretrained("pipelines/text")
    image, mask = (Image.open(f"images/{name}.png").crop((0, 0, 16, 16)).copy() for name in ("3", "3-mask"))
    asked = ASKED["text"] | {"solver": None}
    # As before colours were matched at the border of the hole, which is today's default.
    check_drawn("inpaint", draw(pipe, **asked, image=image, mask_image=mask, seamless=False))


def test_an_adapter_changes_what_it_changed() -> None:
    pipe = LatentFlowPipeline.from_pretrained("pipelines/text")
    pipe.load_lora_weights("adapter")
    asked = ASKED["text"] | {"prompt": ["a glimmering wug", "a green square"]}
    check_drawn("adapter", draw(pipe, **asked))


# ---------------------------------------------------------------- runs that were stopped


@pytest.mark.parametrize("again", ["by its line", "by its config.yaml"])
@pytest.mark.parametrize("run", RUNS)
def test_a_stopped_run_goes_on_as_it_would_have(run: str, again: str) -> None:
    earlier = rows(run)
    if again == "by its line":
        said = start(run)
    else:
        command = EXPECTED["lines"][run].split()[0]
        said = program(command, "--config", f"{run}/config.yaml", "-o", run)
    assert "damaged" not in said and "falling back" not in said, said
    starts = Path(run, "environment.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 4]
    assert rows(run)[: len(earlier)] == earlier
    check_figures(run)
    result = Path(run, "autoencoder" if run == "run-autoencoder" else "pipeline")
    assert weights(result) == EXPECTED["runs"][run]["weights"]
    if run == "run-text":
        # Its autoencoder was finished, and so it stays; of its averages others are made.
        assert (FROZEN / run / "autoencoder" / "metrics.jsonl").read_text() == Path(
            run, "autoencoder", "metrics.jsonl"
        ).read_text()
        assert [path.name for path in sorted(Path(run, "averages").iterdir())] == [
            "step-000004",
            "step-000008",
        ]
        program("average", run, "--ema-length", 0.12, "-o", "averaged")
        assert weights(Path("averaged")) == EXPECTED["runs"][run]["weights"]
    if run == "run-lora":
        # Held-out images were met best at step 4, by averages that the checkpoint keeps.
        best, adapter = load_file(f"{run}/adapter/{ADAPTER}"), load_file(f"adapter/{ADAPTER}")
        assert best.keys() == adapter.keys()
        assert all(torch.equal(best[name], adapter[name]) for name in adapter)


def test_a_model_card_of_then_is_renewed() -> None:
    """It is known as ours by its last line; a card that a user has changed would stay beside a new one."""
    for text, kept in ((Path("card.txt").read_text(encoding="utf-8"), False), ("My own words.\n", True)):
        shutil.copytree(FROZEN / "run-text", "cards", dirs_exist_ok=True)
        Path("cards/pipeline").mkdir()
        Path("cards/pipeline/README.md").write_text(text, encoding="utf-8")
        program(*EXPECTED["lines"]["run-text"].replace("-o run-text", "-o cards").split())
        assert Path("cards/pipeline/README-step-000008.md").exists() == kept
        shutil.rmtree("cards")


def test_the_report_of_a_stopped_run_says_how_it_goes_on() -> None:
    pytest.importorskip("matplotlib")
    for run in RUNS:
        program("report", run, "-o", f"{run}.html")
        page = Path(f"{run}.html").read_text(encoding="utf-8")
        command = EXPECTED["lines"][run].split()[0]
        assert f"latentflow {command} --config {run}/config.yaml -o {run}" in page


def test_the_cache_is_used() -> None:
    """It is used today. What is promised is only that a run goes on with any cache: encoding anew is no error."""
    before = shards("cache")
    start("run-text")
    check_figures("run-text")
    first = json.loads(Path("run-text", "environment.jsonl").read_text(encoding="utf-8").splitlines()[0])
    if importlib.metadata.version("diffusers") != first["diffusers"]:
        pytest.skip(
            "the autoencoder's config, which is part of a key, may be another in this version of diffusers"
        )
    assert shards("cache") == before


def test_a_run_goes_on_without_the_cache() -> None:
    shutil.rmtree("cache")
    start("run-text")
    check_figures("run-text")
    assert shards("cache")


# ---------------------------------------------------------------- a folder of latents


def latents_description() -> dict[str, Any]:
    """Return latents.json without its notes, which are sentences for people."""
    values: dict[str, Any] = json.loads(Path("latents/latents.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "notes"}


def test_a_folder_of_latents_is_complete_and_trained_from() -> None:
    before = shards("latents")
    description = latents_description()
    start("latents")
    assert shards("latents") == before and latents_description() == description
    assert "ready to train" in program("check", "latents")
    shutil.rmtree("images")
    # The generator of then: runs that are begun now have another.
    program(*EXPECTED["lines"]["run-latents"].split(), "--random-numbers", "mersenne-twister")
    check_figures("run-latents")
