"""The guide on fine-tuning pretrained models, held to what the program prints and counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from latentflow.config import RunConfig
from latentflow.training.fine_tune import pretrained_settings
from latentflow.training.loop import distributed

from ..families.tiny import checkpoint
from ..test_documentation import ROOT, python_blocks
from .command import call

PAGE = ROOT / "docs" / "guide" / "fine-tune-pretrained.md"
NAME = "stabilityai/stable-diffusion-3.5-medium"
FIRST = ("dog", "-o", "runs/dog", "--init-from", NAME, "--caption", "a photo of sks dog")


@pytest.fixture
def memory_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fine_tune_memory

    return fine_tune_memory


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `dog`, 20 images, where commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    for number in range(20):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "dog" / f"{number}.png")
    yield tmp_path


def text_blocks() -> list[list[str]]:
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block.splitlines() for block in blocks]


@pytest.mark.slow
def test_the_plan_is_the_one_that_is_printed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "has_fast_bfloat16", lambda device: True)
    files = json.loads((ROOT / "tests/training/configs/sd35-medium.json").read_text(encoding="utf-8"))
    for file, content in files.items():
        if file != "sources":
            (here / NAME / file).parent.mkdir(parents=True, exist_ok=True)
            (here / NAME / file).write_text(json.dumps(content), encoding="utf-8")
    printed = call(here / "cache", *FIRST, "--dry-run").splitlines()
    printed = [re.sub(r"bf16 on \w+", "bf16 on cuda", line) for line in printed]
    assert printed[-len(text_blocks()[0]) :] == text_blocks()[0]
    assert not (here / "runs").exists()


def test_the_first_run_and_its_python(here: Path) -> None:
    checkpoint("StableDiffusion3Pipeline").save_pretrained(here / NAME)
    tiny = ("--resolution", 16, "--lora-rank", 4, "--max-train-steps", 2)
    printed = [without_numbers(line) for line in call(here / "cache", *FIRST, *tiny).splitlines()]
    for line in text_blocks()[1]:
        assert without_numbers(line) in printed, line
    names: dict[str, object] = {}
    for block in python_blocks(PAGE):
        exec(compile(block, PAGE.name, "exec"), names)
    assert isinstance(names["image"], Image.Image)
    # Refused with the plan, before anything is encoded.
    wrong = call(here / "cache", *FIRST, "--resolution", 16, "--lora-rank", 64, "--dry-run", expect=2)
    assert "--lora-rank 64 is above what the layer" in wrong and "adapter:" not in wrong


def without_numbers(line: str) -> str:
    return re.sub(r"\d[\d.]*(e-\d+)?", "N", line).removeprefix("WARNING: ")


def test_steps_by_the_number_of_images() -> None:
    page = PAGE.read_text(encoding="utf-8")
    loop = RunConfig.__dataclass_fields__["loop"].default
    adapter = RunConfig.__dataclass_fields__["adapter"].default
    for images, steps, uses in [(20, "2,000", "100"), (196, "4,300", "22"), (4900, "12,600", "2.6")]:
        found = pretrained_settings._fitted(loop, (), images, 1e-4, adapter, 1.0).max_train_steps
        assert found == pytest.approx(float(steps.replace(",", "")), rel=0.01) and steps in page
        assert found / images == pytest.approx(float(uses), rel=0.02) and uses in page


@pytest.mark.parametrize("name", ["sd35-medium", pytest.param("flux2-klein-4b", marks=pytest.mark.slow)])
def test_rows_of_the_table_of_memory(name: str, memory_table: ModuleType, tmp_path: Path) -> None:
    [line] = memory_table.rows(name, tmp_path, (512,), full=False)
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_operations_of_a_step(memory_table: ModuleType, tmp_path: Path) -> None:
    """A step with checkpointing is three passes over the linear layers of all tokens, and attention on top."""
    flops = memory_table.operations("sd35-medium", tmp_path, 512)
    assert f"| SD 3.5 medium | {flops / 1e12:.0f} |" in PAGE.read_text(encoding="utf-8")
    width, tokens, text, blocks, double = 1536, 1024, 333, 24, 13
    layers = (
        blocks * 12 * width**2 * tokens + (blocks - 1) * 12 * width**2 * text + double * 4 * width**2 * tokens
    )
    attention = (
        4 * width * (blocks * (tokens + text) ** 2 + double * tokens**2)
    )  # its backward pass is 2.5 of these
    assert flops == pytest.approx(3 * 2 * layers + 4.5 * attention, rel=0.05)


@pytest.mark.slow
def test_the_tables(memory_table: ModuleType, tmp_path: Path) -> None:
    made = [line for name in memory_table.MODELS for line in memory_table.rows(name, tmp_path)]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    made += [memory_table.time_row(name, tmp_path) for name in memory_table.MODELS]
    starts = tuple(f"| {model}{end}" for model in memory_table.MODELS.values() for end in (", ", " | "))
    assert made == [line for line in page if line.startswith(starts)]
