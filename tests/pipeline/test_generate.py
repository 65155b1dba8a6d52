"""The program `latentflow generate`, run in this process on tiny checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import UserError
from latentflow.flow import SOLVERS
from latentflow.inference import opening
from latentflow.pipeline import LatentFlowPipeline

from .conftest import pixels, tiny_dit, tiny_vae

Generate = Callable[..., list[Path]]


@pytest.fixture
def generate(program: Generate) -> Generate:
    return partial(program, "generate")


def test_one_prompt_is_one_image(generate: Generate, dit_folder: Path) -> None:
    assert generate("red apple", "-o", "apple.png", "--checkpoint", dit_folder) == [Path("apple.png")]
    assert pixels(Path("apple.png")).shape == (8, 8, 3)


def test_a_file_that_exists_is_kept(generate: Generate, dit_folder: Path) -> None:
    arguments = ("red apple", "-o", "a.png", "--checkpoint", dit_folder)
    Path("a.png").write_text("mine")
    assert generate(*arguments) == [Path("a-1.png")]
    assert generate(*arguments) == [Path("a-2.png")]
    assert Path("a.png").read_text() == "mine"
    assert generate(*arguments, "--overwrite") == [Path("a.png")]
    assert np.array_equal(pixels(Path("a.png")), pixels(Path("a-1.png")))


def test_each_image_has_its_own_seed(generate: Generate, dit_folder: Path) -> None:
    common = ("--checkpoint", dit_folder, "-o", "a.png")
    several = generate("red apple", "green tree", "-n", 2, "--seed", 5, *common)
    assert several == [Path(f"a-{i}.png") for i in (1, 2, 3, 4)]
    alone = generate("green tree", "--seed", 7, *common)
    assert np.abs(pixels(several[2]) - pixels(alone[0])).max() <= 1
    assert np.abs(pixels(several[2]) - pixels(several[3])).max() > 1


def test_grid(generate: Generate, class_folder: Path) -> None:
    singles = generate("--class", "hat", "2", "-n", 3, "--checkpoint", class_folder)
    [sheet] = generate(
        "--class", "hat", "2", "-n", 3, "--grid", "--checkpoint", class_folder, "-o", "grid.png"
    )
    expected = np.concatenate([np.concatenate([pixels(p) for p in singles[i : i + 3]], 1) for i in (0, 3)], 0)
    assert np.array_equal(pixels(sheet), expected)  # a row of three for each class


def test_size_and_scale(generate: Generate, dit_folder: Path) -> None:
    arguments = ("hat", "--width", 12, "--height", 8, "--scale", 4, "--checkpoint", dit_folder)
    assert Image.open(generate(*arguments)[0]).size == (48, 32)


def test_a_run_folder_will_do(generate: Generate, dit_folder: Path) -> None:
    assert dit_folder.name == "pipeline"
    assert generate("hat", "--checkpoint", dit_folder.parent) == [Path("out.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hat", "--checkpoint", "CLASSES"],
            "takes no prompt such as 'hat'\nIt takes --class NAME: apple, hat",
        ),
        (["--class", "ht", "--checkpoint", "CLASSES"], "did you mean 'hat'"),
        (["--checkpoint", "CLASSES"], "a class is needed\nIt takes --class"),
        (["--class", "hat", "--checkpoint", "CAPTIONS"], "takes no --class\nIt takes a prompt"),
        (["hat", "--class", "hat", "--checkpoint", "CAPTIONS"], "a prompt and --class are both given"),
        (["hat", "--checkpoint", "nowhere/at/all"], "no folder"),
        (["hat", "--width", "9", "--checkpoint", "CAPTIONS"], "width 9 is not a multiple of 2"),
    ],
)
def test_what_it_refuses(
    generate: Generate, dit_folder: Path, class_folder: Path, arguments: list[str], message: str
) -> None:
    folders = {"CAPTIONS": str(dit_folder), "CLASSES": str(class_folder)}
    with pytest.raises(UserError, match=message):
        generate(*[folders.get(argument, argument) for argument in arguments])
    assert not list(Path().iterdir())


def test_an_unconditional_checkpoint_takes_no_prompt(generate: Generate, tmp_path: Path) -> None:
    LatentFlowPipeline(tiny_vae(), tiny_dit()).save_pretrained("plain")
    assert len(generate("-n", 17, "--checkpoint", "plain")) == 17  # in two batches
    with pytest.raises(UserError, match="takes no prompt such as 'hat'\nIt is unconditional: leave it out"):
        generate("hat", "--checkpoint", "plain")


def test_the_help_names_every_solver(generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate("--help")
    text = re.sub(r"[\s│]", "", capsys.readouterr().out)  # a name may be broken over two lines
    assert [name for name in SOLVERS if name not in text] == []


def test_without_the_shipped_checkpoint_it_says_what_to_do(
    load_program: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "SHIPPED", tmp_path / "emoji-64")
    with pytest.raises(UserError, match=r"emoji-64\nGive --checkpoint DIR, or train one"):
        load_program("generate").main(["red apple"])
