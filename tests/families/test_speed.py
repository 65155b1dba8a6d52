"""Our pipelines over a pretrained model against its own pipeline: the same image, and as fast."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from pretrained_memory import flux2, sd3, without_memory
from pretrained_speed import measure
from torch import nn

from latentflow.families.stored_weights import parameter_count, stored_bytes


def test_the_benchmark_compares_the_same_image() -> None:
    """In bfloat16: our state between the steps is float32, the stock pipeline's is not."""
    found = measure("tiny", side=64, steps=4, rounds=2)
    assert len(found["ratios"]) == 2
    assert found["difference"] < 0.1


@pytest.mark.gpu
def test_a_network_of_4b_is_as_fast_as_in_its_own_pipeline() -> None:
    """FLUX.2 klein's shape at 1024 pixels in 4 steps: at most 2 % slower, and within 5 % of the memory."""
    found = measure("4b", side=1024, steps=4, rounds=10)
    print(found["seconds"], found["peaks"])
    assert statistics.median(found["ratios"]) <= 1.02
    assert found["peaks"]["ours"] <= 1.05 * found["peaks"]["stock"]


def test_memory_is_counted() -> None:
    """Parameters as the authors publish them, in billions; a linear layer in nf4 takes 4.5 bits for each."""
    assert parameter_count(without_memory(lambda: flux2(5, 20, 24, 7680))) / 1e9 == pytest.approx(
        4.0, abs=0.2
    )
    network = without_memory(lambda: sd3(38, 0, 192))
    every = parameter_count(network)
    linear = sum(part.weight.numel() for part in network.modules() if isinstance(part, nn.Linear))
    assert every / 1e9 == pytest.approx(8.1, abs=0.1)
    assert stored_bytes(network, "bfloat16") == 2 * every
    assert stored_bytes(network, "nf4") - 2 * (every - linear) == pytest.approx(4.5 / 8 * linear, rel=1e-6)
