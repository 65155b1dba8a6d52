"""`benchmarks/gpu.py` runs from end to end at toy sizes on a CPU, and says what failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu

from latentflow.training.estimate import network_cost


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *map(str, arguments)])
    gpu.main()


def test_every_section_runs_at_toy_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 255 - 20 * number, 128)).save(images / f"{number}.png")
    rows = [f"{number}.png,colour {'abcdefghijkl'[number]}" for number in range(12)]
    (images / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    run(monkeypatch, "-o", tmp_path / "out", "--data", images, "--skip", "tests")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [*found] == ["machine", "train-B", "train-XL", "sample", "learn"]
    assert not [part["error"] for part in found.values() if "error" in part]
    for name in ("train-B", "train-XL"):
        speeds = found[name]["images_per_second"]
        assert len({len(values) for values in speeds.values()}) == 1 and len(speeds) == 3
        assert all(value > 0 for values in speeds.values() for value in values)
        assert 0 < found[name]["share_of_matrix_rate"]["fit"] < 1
    steps = [step for step, _ in found["learn"]["validation_loss"]]
    assert steps[-1] == found["learn"]["steps"] and len(steps) >= 2
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert sum(line.startswith("| DiT-") for line in lines) == 4  # two trainings, two numbers of images


def test_a_section_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu, "train", fail)
    run(monkeypatch, "-o", tmp_path / "out", "--skip", "learn", "tests")
    found = json.loads((tmp_path / "out.json").read_text())
    assert "too large" in found["train-B"]["error"] and "error" not in found["sample"]
    assert "train-XL failed: OutOfMemoryError: too large" in (tmp_path / "out.md").read_text()


def test_a_bare_loop_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = gpu.Bare.turn

    def fail(self: gpu.Bare, steps: int, batch: int) -> float:
        if not isinstance(self.network, gpu.DiT):
            raise RuntimeError("does not compile")
        return turn(self, steps, batch)

    monkeypatch.setattr(gpu.Bare, "turn", fail)
    run(monkeypatch, "-o", tmp_path / "out", "--skip", "train-XL", "sample", "learn", "tests")
    speeds = json.loads((tmp_path / "out.json").read_text())["train-B"]["images_per_second"]
    assert [*speeds] == ["fit", "bare loop, our network"] and all(speeds.values())
    assert "| failed |" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(("preset", "published"), [("B", 23.01), ("XL", 118.64)])
def test_operations_are_those_of_the_paper(preset: str, published: float) -> None:
    """Forward, in multiply-adds (arXiv:2212.09748, table 4); a backward pass takes twice that."""
    with torch.device("meta"):
        network = gpu.our_network(preset, {})
    assert network_cost(network, 32, 0).flops / 6e9 == pytest.approx(published, rel=0.03)


@pytest.mark.slow
def test_the_tests_for_gpus_are_counted(tmp_path: Path) -> None:
    found: dict[str, object] = {}
    bench = gpu.Bench(torch.device("cpu"), gpu.TINY, None, tmp_path / "out", {})
    gpu.tests(bench, 300, found)
    assert found["passed"] == 0 and not found["failed"] and int(str(found["skipped"])) >= 10
