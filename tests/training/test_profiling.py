"""Where the time of a step goes, and how much of the machine's speed becomes training."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from latentflow.models import DiT
from latentflow.training import fit
from latentflow.training.estimate import sample_flops
from latentflow.training.loop.distributed import matrix_product_rate
from latentflow.training.loop.logging import SECTIONS

from .test_loop import CONFIG, Line, assert_equal_weights, run
from .test_optimizers import Wide


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    fit({"flow": Wide(2**16)}, Line(), dataclasses.replace(CONFIG, profile=True), folder)
    return folder


def test_the_sections_of_a_step_make_up_the_step(profiled: Path) -> None:
    lines = (profiled / "profile" / "table.txt").read_text().splitlines()
    whole = float(re.search(r"a step takes ([\d.]+) ms", lines[0])[1])
    values = {
        match[1]: float(match[2])
        for line in lines[1:]
        if (match := re.match(r"  (\w[\w ]*?) +([\d.]+) ms", line))
    }
    sections = {name: values[name] for name in (*SECTIONS, "everything else")}
    assert sum(sections.values()) == pytest.approx(whole, rel=0.02)
    assert all(value >= 0 for value in sections.values())
    assert sections["forward"] + sections["backward"] > 0.3 * whole
    assert any(line.strip().startswith("aten::") for line in lines)


def test_the_trace_holds_six_steps_for_a_viewer(profiled: Path) -> None:
    events = json.loads((profiled / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for section in ("forward", "backward", "optimizer", "average"):
        assert names.count(section) == 6, section


def test_profiled_steps_learn_the_same(profiled: Path, tmp_path: Path) -> None:
    fit({"flow": Wide(2**16)}, Line(), CONFIG, tmp_path)
    assert_equal_weights(profiled, tmp_path)
    assert not (tmp_path / "profile").exists()


def test_a_sample_costs_six_operations_a_weight_and_token() -> None:
    """Forward 2, backward 4 (Kaplan et al. 2020); attention and what runs once a sample come on top."""
    net = DiT(in_channels=4, width=32, depth=2, heads=2, num_classes=24, sample_size=8)
    block = net.blocks[0]
    per_token = sum(
        layer.weight.numel() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )
    dense = 6 * 64 * 2 * per_token
    attention = 2 * (3 + 0.5) * 2 * 2 * 64 * 64 * 32  # the fused backward pass computes the scores once more
    flops = sample_flops(net, None, Line(), 8)
    assert dense + 0.5 * attention < flops < 1.3 * (dense + attention)


def test_utilisation_is_the_share_of_the_speed_of_matrix_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def noted(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(matrix_product_rate(device, dtype))  # not the same a moment later, on a busy machine
        return measured[-1]

    monkeypatch.setattr("latentflow.training.loop.distributed.matrix_product_rate", noted)
    run(tmp_path, flops=1e6)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] * 1e6 / row["model_flops_utilisation"] for row in rows]
    assert rates == pytest.approx(measured * len(rates), rel=1e-3)  # one measurement for the run
