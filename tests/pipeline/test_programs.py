"""What the four drawing programs share: flags that cannot work, words that nobody taught, files that cannot be
written."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import RunError, UserError
from latentflow.inference.images import save_images, whole_file
from latentflow.inference.sample import conditions
from latentflow.models.text import UnknownWords
from latentflow.pipeline.base import FlowPipeline

#: program -> arguments with which it draws 8 x 8 pixels
PROGRAMS = {
    "generate": ["red apple"],
    "inpaint": ["a.png", "mask.png", "red apple"],
    "edit": ["a.png", "red apple", "--from", "blue hat"],
    "interpolate": ["red apple", "blue hat", "--frames", "2"],
}
Run = Callable[..., None]


@pytest.fixture
def run(
    load_program: Callable[[str], Any], dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a program in a folder with an image and a mask."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save("a.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("mask.png")

    def main(name: str, *arguments: object) -> None:
        common = ["--device", "cpu", "--steps", "1", "--checkpoint", str(dit_folder)]
        load_program(name).main([*PROGRAMS[name], *common, *map(str, arguments)])

    return main


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(FlowPipeline, "sample", follow)
    monkeypatch.setattr(FlowPipeline, "encode_images", follow)


FLAGS: list[tuple[list[str], str]] = [
    (["--seed", str(2**70)], f"--seed is {2**70}\nGive a whole number from 0 to 18446744073709551615"),
    (["--seed", "-1"], "--seed is -1\nGive a whole number from 0 to"),
    (["-n", "1000000000"], "images of .* pixels need .* of memory"),
    (["-n", "1" + "0" * 400], "images of .* pixels need .* of memory"),
    (["-n", "0"], "-n must be at least 1"),
    (["-n", "-3"], "-n must be at least 1"),
    (["--scale", "100000000"], "pixels need .*TiB of memory at least, more than the .* of this machine"),
    (["--scale", "0"], "--scale must be at least 1"),
    (["--steps", "1000000000"], "num_inference_steps is 1000000000\nUse a whole number from 1 to 100000"),
    (["--steps", "-4"], "--steps must be at least 1"),
    (["--guidance", "nan"], "--guidance is nan\nGive a finite number"),
    (["--guidance", "inf"], "--guidance is inf\nGive a finite number"),
    (["--device", "gpu"], "--device gpu cannot be used: .*device type.*\nauto takes "),
    (["--device", "meta"], "--device meta cannot be used: it holds no numbers\nauto takes "),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used: .*\nauto takes "),
    (["-o", "b.pgn"], "no image format '.pgn'"),
    (["-o", "b.psd"], "no image format '.psd'"),  # Pillow only reads it
    (["-o", "a.png/b.png"], "-o a.png/b.png cannot be written: a.png is no folder"),
    (["-o", "/proc/self/none/b.png"], "-o /proc/self/none/b.png cannot be written: "),
    (["-o", f"{'x' * 300}.png"], "cannot be written: File name too long"),
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_cannot_work_is_said_before_anything_is_drawn(name: str, run: Run, undrawn: None) -> None:
    before = sorted(Path().iterdir())
    for flags, message in FLAGS:
        with pytest.raises(UserError, match=message) as caught:
            run(name, *flags)
        assert len(str(caught.value)) < 600
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["generate", "inpaint", "edit"])
def test_a_seed_that_only_the_last_image_lacks(name: str, run: Run, undrawn: None) -> None:
    with pytest.raises(
        UserError, match=r"--seed is 18446744073709551615\nGive a whole number from 0 to \d+614"
    ):
        run(name, "--seed", 2**64 - 1, "-n", 2)


def test_the_largest_seed_draws(run: Run) -> None:
    run("generate", "--seed", 2**64 - 2, "-n", 2)
    assert Path("out-2.png").is_file()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("generate", ["blorp apple", "zorgon", "apple"], "'blorp', 'zorgon'"),
        ("generate", ["red apple", "--negative", "blorp"], "'blorp'"),
        ("inpaint", ["a.png", "mask.png", "zorgon"], "'zorgon'"),
        ("edit", ["a.png", "zorgon", "--from", "blorp"], "'zorgon', 'blorp'"),
        ("interpolate", ["zorgon", "blorp", "--frames", "2"], "'zorgon', 'blorp'"),
    ],
)
def test_words_that_nobody_taught_are_named_once(
    name: str,
    arguments: list[str],
    words: str,
    run: Run,
    load_program: Callable[[str], Any],
    dit_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--device", "cpu", "--steps", "1", "--checkpoint", str(dit_folder)]
    many = ["-n", "18"] if name == "generate" else []  # two batches
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_program(name).main([*arguments, *many, *common])
    messages = [line for line in capsys.readouterr().err.splitlines() if "vocabulary" in line]
    assert [line.partition(": ")[2].partition(": ")[2] for line in messages] == [f"{words}."]
    assert not [warning for warning in caught if issubclass(warning.category, UnknownWords)]


def test_a_negative_prompt_beside_a_class_is_refused() -> None:
    pipe = SimpleNamespace(
        takes_text=False, takes_classes=True, labels={"hat": 0}, class_ids=lambda names: [0]
    )
    assert conditions(pipe, classes=["hat"]) == [{"class_labels": 0}]
    with pytest.raises(UserError, match="a negative prompt without a prompt"):
        conditions(pipe, classes=["hat"], negative="blue")


def test_words_that_are_known_are_not_spoken_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in PROGRAMS:
        run(name)
    assert "vocabulary" not in capsys.readouterr().err


def test_a_misspelt_word_and_forgotten_quotes_are_noticed(
    run: Run, dit_folder: Path, load_program: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*prompts: str) -> str:
        flags = ["--device", "cpu", "--steps", "1", "--checkpoint", str(dit_folder)]
        load_program("generate").main([*prompts, *flags])
        return capsys.readouterr().err

    assert "cannot draw: 'aple' (did you mean 'apple'?), 'zorgon'." in said("aple zorgon")
    assert 'If they are one prompt, put it in quotes: "red apple"' in said("red", "apple")
    assert "quotes" not in said("red apple", "apple") + said("apple")


# ------------------------------------------------------------------ files, whole or not at all


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than ``size`` bytes: writes fail as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_disk_that_is_full_is_named_and_nothing_half_written_remains(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, "-o", "kept/out.png")
    kept = {path: path.read_bytes() for path in Path("kept").iterdir()}
    write = Image.Image.save

    def written(image: Image.Image, file: Any, **options: Any) -> None:
        with largest_file(100):  # no longer than this: the streams of the tests are files too
            write(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", written)
    with pytest.raises(RunError, match=r"kept/out.*\.png cannot be written: File too large") as caught:
        run(name, "-o", "kept/out.png", "--overwrite", "--scale", 9)
    assert "-o" in caught.value.fix
    assert {path: path.read_bytes() for path in Path("kept").iterdir()} == kept


def test_what_was_written_before_the_disk_was_full_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.new("RGB", (8, 8)), Image.fromarray(noise), Image.new("RGB", (8, 8))]
    with largest_file(1000), pytest.raises(RunError, match=r"b-2\.png cannot be written: File too large"):
        save_images(images, str(tmp_path / "b.png"))
    assert capsys.readouterr().out.split() == [str(tmp_path / "b-1.png")]
    assert names(tmp_path) == ["b-1.png"]


@pytest.mark.parametrize(("suffix", "side"), [("webp", 17000), ("jpg", 66000)])
def test_a_format_that_takes_no_such_size_is_named(suffix: str, side: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"b.{suffix}.*cannot be written"):
        save_images([Image.new("RGB", (side, 1))], str(tmp_path / f"b.{suffix}"))
    assert not names(tmp_path)


def test_a_link_keeps_leading_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_text("old")
    (tmp_path / "a.png").symlink_to(tmp_path / "real" / "a.png")
    save_images([Image.new("RGB", (8, 8))], str(tmp_path / "a.png"), overwrite=True)
    assert (tmp_path / "a.png").is_symlink()
    assert Image.open(tmp_path / "real" / "a.png").size == (8, 8)
    assert names(tmp_path / "real") == ["a.png"]


def test_a_defect_while_writing_keeps_its_traceback_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text(str(1 / 0))
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not names(tmp_path)
