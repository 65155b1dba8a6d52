"""Text encoders are out of memory while a pretrained network trains; too little memory, and plans without weights."""

from __future__ import annotations

import gc
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from latentflow.training import train_pretrained
from latentflow.training.losses.pretrained import PretrainedLoss

from ..families.tiny import checkpoint
from .command import call
from .forking import run_ranks
from .pretrained import QUICK, base_flags, photos

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME = "FluxPipeline-dev"
WIDTH = 199_999  # of the encoder's feed-forward layers: nothing else has a side of this length
STEPS = 22


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A tiny model with a text encoder more than ten times as large as its network; and the encoder's bytes."""
    pipe = deepcopy(checkpoint(NAME))
    config = {**pipe.transformer.config, "num_attention_heads": 8, "attention_head_dim": 32}
    network = type(pipe.transformer).from_config({**config, "axes_dims_rope": (8, 12, 12)})
    settings = {**pipe.text_encoder_2.config.to_dict(), "num_layers": 9, "d_ff": WIDTH}
    encoder = T5EncoderModel(T5Config.from_dict(settings))
    pipe.register_modules(transformer=network.eval(), text_encoder_2=encoder.eval())
    folder = tmp_path_factory.mktemp("large") / "base"
    pipe.save_pretrained(folder)
    sizes = [sum(one.nbytes for one in part.parameters()) for part in (network, encoder)]
    assert sizes[1] > 10 * sizes[0]
    return folder, sizes[1]


def measure(
    large: tuple[Path, int], run: Path, data: Path, cache: Path, keep: bool = False
) -> list[tuple[int, int]]:
    """Train in a process of its own; return its resident bytes in steps 2 to 20, the encoder's live tensors in some.

    Args:
        keep: hold the encoders, as a run does that forgets to drop them.
    """
    found: list[tuple[int, int]] = []
    forward = PretrainedLoss.forward
    forgotten = []

    def measured(loss: PretrainedLoss, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if loss.training:
            used, alive = psutil.Process().memory_info().rss, -1
            if len(found) % 9 == 1:  # it looks at a million objects; those on the meta device have no memory
                tensors = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
                alive = sum(WIDTH in one.shape and not one.is_meta for one in tensors)
            found.append((used, alive))
        return forward(loss, batch)

    def train(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PretrainedLoss, "forward", measured)
            if keep:
                patch.setattr(train_pretrained, "drop", forgotten.append)
            flags = [*base_flags(NAME, large[0]), *QUICK, "--lora-rank", 2, "--max-train-steps", STEPS]
            call(cache, data, "-o", run, *flags)
        run.with_suffix(".json").write_text(json.dumps(found))

    run_ranks(1, train)
    steps: list[tuple[int, int]] = json.loads(run.with_suffix(".json").read_text())
    assert len(steps) == STEPS
    return steps[1:20]


def test_text_encoders_are_gone_while_the_network_trains(large: tuple[Path, int], tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 16, 4)
    encoding = measure(large, tmp_path / "encoding", data, tmp_path / "cache")
    cached = measure(large, tmp_path / "cached", data, tmp_path / "cache")
    assert [alive for _, alive in encoding[::9]] == [0, 0, 0]
    for (used, _), (other, _) in zip(encoding, cached, strict=True):
        assert abs(used - other) <= 0.1 * other
    # The same measure finds encoders that are kept.
    kept = measure(large, tmp_path / "kept", data, tmp_path / "other", keep=True)
    assert kept[0][1] == 18 and kept[0][0] - cached[0][0] > 0.1 * cached[0][0]
