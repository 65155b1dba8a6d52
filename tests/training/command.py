"""The real command, as a user runs it, on a dozen small pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The smallest run that still has every part: an autoencoder, a text encoder, validation, previews and checkpoints.
TINY = (
    "--resolution 16 --validation 0.2 --autoencoder-widths 8 16 --encoder-layers 0 1 --decoder-layers 0 1 "
    "--latent-channels 4 --autoencoder-steps 2 --autoencoder-batch-size 4 --network-preset tiny --width 16 --depth 1 "
    "--heads 1 --text-width 16 --text-depth 1 --text-heads 1 --train-batch-size 4 --lr-warmup-steps 2 "
    "--learning-rate 0.002 --log-steps 1"
).split()


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"LATENTFLOW_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(cache: Path, *arguments: object, expect: int = 0) -> str:
    """Run `train/flow.py` as a user does; its output, both streams."""
    command = [sys.executable, str(ROOT / "train" / "flow.py"), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout
    return done.stdout
