"""Fine-tunes of pretrained models in less memory: a base in 8 bits, weights spread over processes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ..families.tiny import TINY
from .command import call, call_on_two, losses, same_state
from .forking import run_ranks
from .pretrained import QUICK, adapter, base_flags, photos, validated

pytestmark = pytest.mark.usefixtures("no_memorisation")
NAME = "Flux2KleinPipeline"
LORA = shlex.split("--lora-rank 2 --learning-rate 1e-3 --checkpointing-steps 2 --lr-warmup-steps 2")


@pytest.fixture(scope="module")
def line(pretrained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    data = photos(tmp_path_factory.mktemp("data"), TINY[NAME].side)
    return [data, *base_flags(NAME, pretrained(NAME)), *QUICK]


def test_beside_a_base_in_int8_an_adapter_learns_and_opens_on_the_base_itself(
    line: list[Any], pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    """And a run that was stopped goes on bit for bit."""
    eight = [*line, *LORA, "--quantize", "int8", "--learning-rate", "3e-3"]
    some = ["--validation", 0.25, "--validation-steps", 4, "--max-train-steps"]
    said = call(cache, *eight, *some, 12, "-o", tmp_path / "whole")
    assert "gradient checkpointing: on, as a step would keep a copy of each int8 weight in 16 bits" in said
    for steps in (4, 12):
        call(cache, *eight, *some, steps, "-o", tmp_path / "part")
    assert same_state(tmp_path / "whole", tmp_path / "part")
    found = validated(tmp_path / "whole")
    assert found[12] < found[8] < found[4]

    stock: Any = diffusers.Flux2KleinPipeline.from_pretrained(pretrained(NAME))
    weights = {name: weight.clone() for name, weight in stock.transformer.state_dict().items()}
    stock.load_lora_weights(tmp_path / "whole" / "adapter")
    stock.fuse_lora()
    stock.unload_lora_weights()
    changed = {
        name
        for name, weight in stock.transformer.state_dict().items()
        if not torch.equal(weight, weights[name])
    }
    layers = {key.removeprefix("transformer.").partition(".lora_")[0] for key in adapter(tmp_path / "whole")}
    assert changed == {f"{layer}.weight" for layer in layers}


def test_the_memory_plan_counts_gradient_checkpointing_where_it_is_on_by_itself(
    line: list[Any], cache: Path, tmp_path: Path
) -> None:
    eight = [*line, *LORA, "--quantize", "int8", "-o", tmp_path, "--dry-run"]
    assert "with gradient checkpointing" in call(cache, *eight)
    assert "without gradient checkpointing" in call(cache, *eight, "--no-gradient-checkpointing")
    assert not any(tmp_path.iterdir())


def test_a_network_without_gradient_checkpointing_is_named(
    pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    name = "LuminaPipeline"
    data = photos(tmp_path / "data", TINY[name].side)
    line = [data, *base_flags(name, pretrained(name)), *QUICK, "-o", tmp_path / "run"]
    said = call(cache, *line, "--gradient-checkpointing", expect=2)
    assert "--gradient-checkpointing: LuminaNextDiT2DModel has none" in said


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-rank 2 --mixed-precision bf16 --gradient-checkpointing",
        pytest.param("--lora-rank 2 --lora-dora", marks=pytest.mark.slow),
        pytest.param("", marks=pytest.mark.slow),
    ],
    ids=["adapter", "DoRA", "all weights"],
)
def test_sharded_over_two_processes_it_learns_what_one_learns_and_goes_on(
    flags: str, line: list[Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a base in bfloat16 beside an adapter in float32."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    full = [*line, *LORA[2:], *flags.split(), "--train-batch-size", 1]
    call(cache, *full, "--gradient-accumulation-steps", 2, "--max-train-steps", 4, "-o", tmp_path / "one")
    for steps in (2, 4):
        call_on_two(cache, *full, "--shard", "--max-train-steps", steps, "-o", tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4 and two == pytest.approx(one, abs=1e-4)
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    first, second = (
        load_file(tmp_path / run / file) if not flags else adapter(tmp_path / run) for run in ("one", "two")
    )
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-4)


def test_a_quantised_base_is_not_sharded(
    line: list[Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def refused(rank: int) -> None:
        said = call(cache, *line, *LORA, "--quantize", "int8", "--shard", "-o", tmp_path, expect=2)
        assert "--quantize int8 with --shard: quantised weights cannot be spread over processes" in said

    run_ranks(2, refused)


@pytest.mark.slow  # compiling takes a minute
def test_a_compiled_network_learns_the_same(line: list[Any], cache: Path, tmp_path: Path) -> None:
    for run, flags in (("plain", []), ("compiled", ["--compile"])):
        call(cache, *line, *LORA, "--max-train-steps", 2, "-o", tmp_path / run, *flags)
    plain, compiled = adapter(tmp_path / "plain"), adapter(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], rtol=0, atol=1e-4)
