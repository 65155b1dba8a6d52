"""Damaged checkpoints: no image of weights that do not fit, no code executed, every failure a sentence."""

from __future__ import annotations

import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentflow.autoencoder import load_autoencoder
from latentflow.errors import UserError
from latentflow.inference.sample import read_capabilities
from latentflow.models import load_text_encoder
from latentflow.pipeline import LatentFlowPipeline
from latentflow.training.fine_tune.base import open_base

from .adapters import make_adapter
from .conftest import quiet
from .damage import ADAPTER, PLANTED, REFUSED, SAME, SOUND, Damage, all_damages, damaged_copy

Draw = Callable[[Path], Any]


def opened(folder: Path) -> Any:
    """Open the pipeline of a checkpoint; the page and the flags read what it takes first."""
    read_capabilities(str(folder))
    return quiet(LatentFlowPipeline.from_pretrained(folder))


def image_of(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=1, generator=generator, output_type="np").images


def draw(folder: Path) -> Any:
    return image_of(opened(folder))


ADAPTED: dict[str, Callable[[Any, Path], None]] = {
    "merged": lambda pipe, folder: pipe.merge_lora_weights(folder, subfolder="fast"),
    "loaded": lambda pipe, folder: pipe.load_lora_weights(folder, subfolder="fast"),
}


def draw_adapted(way: str, pipes: dict[str, Any], sound: Path) -> Draw:
    """Draw with an adapter; a pipeline that has refused one is used for the next, as it was before."""

    def drawn(folder: Path) -> Any:
        pipe = pipes[way] if way in pipes else pipes.setdefault(way, opened(sound))
        ADAPTED[way](pipe, folder)
        del pipes[way]
        return image_of(pipe)

    return drawn


def outcome_of(
    damage: Damage, checkpoint: Path, folder: Path, controls: dict[str, Any], pipes: dict[str, Any]
) -> list[str]:
    """What became of one damage, one line for each way to open it: outcome, and what was said."""
    damaged_copy(checkpoint, damage, folder)
    ways: dict[str, Draw] = {"drawn": draw}
    if damage.file == ADAPTER:
        ways = {way: draw_adapted(way, pipes, checkpoint) for way in ADAPTED}
    elif damage.file.startswith("vae"):
        ways["load_autoencoder"] = load_autoencoder
    elif damage.file.startswith(("text_encoder", "tokenizer")) and damage.name[:9] != "key added":
        ways["load_text_encoder"] = load_text_encoder  # of larger models it is one part
    elif damage.file.startswith("transformer"):
        ways["open_base"] = lambda one: open_base(str(one))
    said = []
    for way, opened in ways.items():
        try:
            image = opened(folder)
        except UserError as error:
            lines = str(error).splitlines()
            fine = len(lines) <= 4 and "trust_remote_code" not in str(error)
            outcome = REFUSED if fine else f"no sentence: {error}"
        except Exception as error:
            outcome = "traceback: " + "".join(traceback.format_exception(error)[-4:])
        else:
            same = way not in controls or np.array_equal(image, controls[way])
            outcome = SAME if same and damage.outcome != REFUSED else "drawn"
        allowed = {REFUSED: {REFUSED}, SAME: {SAME}, SOUND: {REFUSED, SAME, "drawn"}}[damage.outcome]
        said.append(outcome if outcome in allowed else f"{damage.file}: {damage.name}: {way}: {outcome}")
    shutil.rmtree(folder)
    return said


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is written where code is executed; a module that does so can be imported."""
    file = tmp_path / "executed"
    (tmp_path / f"{PLANTED}.py").write_text(f"open({str(file)!r}, 'w')\nclass DiT: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    assert PLANTED not in sys.modules and not file.exists()


def planted(checkpoint: Path, trace: Path, to: Path) -> Path:
    """A copy of a checkpoint with code beside its files."""
    shutil.copytree(checkpoint, to)
    for folder in ("", "transformer", "vae", "text_encoder", "tokenizer"):
        shutil.copy(trace.parent / f"{PLANTED}.py", to / folder)
    return to


def check_all(checkpoint: Path, trace: Path, places: tuple[int, ...], *, brief: bool) -> Counter[str]:
    """Try all damages of a checkpoint; the undamaged one draws to the byte what it drew before."""
    source = planted(checkpoint, trace, trace.parent / "source")
    pipes = {}
    ways = {"drawn": draw, **{way: draw_adapted(way, pipes, source) for way in ADAPTED}}
    controls = {way: drawn(source) for way, drawn in ways.items()}
    assert not np.array_equal(controls["drawn"], controls["merged"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Counter[str] = Counter()
    for number, damage in enumerate(all_damages(source, trace, places, brief=brief)):
        found.update(outcome_of(damage, source, trace.parent / f"damaged-{number}", controls, pipes))
    wrong = [one for one in found if one not in (REFUSED, SAME, "drawn")]
    assert not wrong, f"{len(wrong)} of {found.total()}:\n" + "\n".join(wrong)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 2**20
    )  # KiB: less than 1 GiB was taken
    assert {"merged", "loaded"} == pipes.keys()  # those that have refused the last of all
    for way, drawn in ways.items():
        assert np.array_equal(drawn(source), controls[way])
    return found


def test_every_damage_of_a_tiny_checkpoint_is_a_sentence(dit_folder: Path, trace: Path) -> None:
    checkpoint = trace.parent / "tiny"
    shutil.copytree(dit_folder, checkpoint)
    make_adapter(dit_folder, checkpoint / "fast")
    found = check_all(checkpoint, trace, (0,), brief=True)
    assert found[REFUSED] > 200 and found[SAME] >= 6


@pytest.mark.slow
def test_every_damage_of_the_shipped_checkpoint_is_a_sentence(
    repository: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check_all(repository / "checkpoints" / "emoji-64", trace, (0, 17, -1), brief=False)
    with capsys.disabled():
        print(f"\n{found.total()} openings of damaged checkpoints: {dict(found)}")
    assert found[REFUSED] > 300
