"""The command as a user runs it, on a dozen small images, without its imports."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from latentflow.cli import run

ROOT = Path(__file__).parents[2]

# The smallest run that still has every part: an autoencoder, a text encoder, validation, previews and checkpoints.
TINY = [
    "--resolution",
    "16",
    "--validation",
    "0.2",
    "--autoencoder-widths",
    "8",
    "16",
    "--encoder-layers",
    "0",
    "1",
    "--decoder-layers",
    "0",
    "1",
    "--latent-channels",
    "4",
    "--autoencoder-steps",
    "2",
    "--autoencoder-batch-size",
    "4",
    "--network-preset",
    "tiny",
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "1",
    "--text-width",
    "16",
    "--text-depth",
    "1",
    "--text-heads",
    "1",
    "--train-batch-size",
    "4",
    "--lr-warmup-steps",
    "2",
    "--learning-rate",
    "0.002",
    "--log-steps",
    "1",
]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"LATENTFLOW_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(cache: Path, *arguments: object, expect: int = 0, file: str = "flow") -> str:
    """Run ``train/FILE.py`` in this process: its `main` under the command line's error handling; what it said."""
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
