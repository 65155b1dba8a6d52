"""The command as a user runs it, on a dozen small images, without its imports; and what a run leaves."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentflow import LatentFlowPipeline
from latentflow.cli import run
from latentflow.data.sources.shapes import train_source

from .forking import run_ranks

ROOT = Path(__file__).parents[2]

# The smallest run that still has every part: an autoencoder, a text encoder, validation, previews and checkpoints.
TINY = shlex.split(
    "--resolution 16 --validation 0.2 --autoencoder-widths 8 16 --encoder-layers 0 1 --decoder-layers 0 1 "
    "--latent-channels 4 --autoencoder-steps 2 --autoencoder-batch-size 4 --network-preset tiny --width 16 --depth 1 "
    "--heads 1 --text-width 16 --text-depth 1 --text-heads 1 --train-batch-size 4 --lr-warmup-steps 2 "
    "--learning-rate 0.002 --log-steps 1"
)


def shapes_folder(root: Path) -> Path:
    """Fill a folder with a dozen shapes of 16 pixels, each with its caption in a text file beside it."""
    for number, example in enumerate(train_source().examples[:240:20]):
        example.open().resize((16, 16)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(str(example.text))
    return root


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"LATENTFLOW_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(cache: Path, *arguments: object, expect: int = 0, file: str = "flow") -> str:
    """Run ``train/FILE.py`` in this process, as the command line does, and return what it printed."""
    spec = importlib.util.spec_from_file_location("train_flow", ROOT / "train" / f"{file}.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    said = io.StringIO()
    argv = ["latentflow train", *map(str, arguments)]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setenv("LATENTFLOW_CACHE", str(cache))
        patch.setattr(sys, "argv", argv)
        patch.setitem(sys.modules, "train_flow", program)
        spec.loader.exec_module(program)
        torch.set_num_threads(1)  # on any machine: sums in another order would round differently
        try:
            run(program.main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            torch.set_num_threads(threads)
    assert code == expect, said.getvalue()
    for words in ("Traceback", "could not preview", "could not validate"):  # what training can do without
        assert words not in said.getvalue(), said.getvalue()
    return said.getvalue()


def whole_and_stopped(root: Path, *arguments: object) -> None:
    """Make a run of four steps, ``whole``, and the same stopped half way and resumed, ``stopped``."""
    call(root / "cache", *arguments, "--max-train-steps", 4, "-o", root / "whole")
    call(root / "cache", *arguments, "--max-train-steps", 2, "-o", root / "stopped")
    call(root / "cache", *arguments, "--max-train-steps", 4, "-o", root / "stopped", "--allow-changes")


def call_on_two(cache: Path, *arguments: object) -> None:
    """Run the command on two forked processes."""
    run_ranks(2, lambda rank: call(cache, *arguments))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by file and name."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = last.glob("*.safetensors")
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def same_state(one: Path, other: Path) -> bool:
    """Compare the newest checkpoints of two runs bit for bit."""
    first, second = state(one), state(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def opened(folder: Path, kind: Any = LatentFlowPipeline) -> Any:
    """A pipeline without a progress bar."""
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any, **settings: Any) -> torch.Tensor:
    """Latents from a fixed seed, in two steps unless the settings say otherwise."""
    defaults = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 2,
        "output_type": "latent",
    }
    images: torch.Tensor = pipe(**defaults | settings).images
    return images


def save_images(folder: Path, *names: str, size: tuple[int, int] = (16, 16)) -> Path:
    """Write an image of another colour under each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (20 * number % 256, 9, number)).save(folder / name)
    return folder


def paste(cache: Path, line: str, *more: object) -> str:
    """Run a line that was printed for the user, ``latentflow train ...`` or ``latentflow generate ...``."""
    word, command, *arguments = shlex.split(line)
    assert word == "latentflow", line
    files = {"train": "flow", **{name: f"../pipelines/{name}" for name in ("generate", "inpaint", "edit")}}
    return call(cache, *arguments, *more, file=files.get(command, command))
