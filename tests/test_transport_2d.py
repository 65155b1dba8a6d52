"""The 2-D benchmark: its metrics against closed forms, its parts, and one tiny run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError

pytest.importorskip("ot")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import transport_2d
from two_dimensional import distributions, methods, metrics, network


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_w2_of_a_shift_and_of_a_stretch(generator: torch.Generator) -> None:
    x = torch.randn(50, 2, generator=generator)
    shift = torch.tensor([3.0, -4.0])
    assert metrics.wasserstein2_squared(
        x, x[torch.randperm(50, generator=generator)] + shift
    ) == pytest.approx(25.0)
    stretched = metrics.wasserstein2_squared(x, 3.0 * x)  # the gradient of a convex function is optimal
    assert stretched == pytest.approx(float((2.0 * x).square().sum(1).mean()), rel=1e-5)


def test_energy_of_a_constant_and_of_a_linear_field(generator: torch.Generator) -> None:
    x0 = torch.randn(20, 2, generator=generator)
    x1, energy = metrics.euler(lambda x, t: torch.full_like(x, 2.0), x0, steps=7)
    torch.testing.assert_close(x1, x0 + 2.0)
    torch.testing.assert_close(energy, torch.full((20,), 8.0))
    x1, energy = metrics.euler(lambda x, t: x, x0, steps=4)
    torch.testing.assert_close(x1, 1.25**4 * x0)
    growth = sum(0.25 * 1.25 ** (2 * k) for k in range(4))
    torch.testing.assert_close(energy, growth * x0.square().sum(1))
    assert metrics.normalized_path_energy(3.0, 2.0) == metrics.normalized_path_energy(1.0, 2.0) == 0.5


def test_modes_are_told_apart(generator: torch.Generator) -> None:
    modes = distributions.MODES
    sample = modes.repeat_interleave(30, 0) + 0.1 * torch.randn(240, 2, generator=generator)
    shift = torch.tensor([0.3, 0.4])
    assert metrics.mode_metrics(sample + shift, sample) == pytest.approx((0.5, 0.0), abs=1e-5)
    # Half of the last mode's points moved to the first: no distance within modes, 1/16 of the mass is wrong.
    uneven = torch.cat([sample[:-15], sample[:15]])
    within, wrong = metrics.mode_metrics(uneven, uneven)
    assert (within, wrong) == pytest.approx((0.0, 1 / 16), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "mean", "second"),
    [
        ("normal", (0.0, 0.0), (1.0, 1.0)),
        ("eight_gaussians", (0.0, 0.0), (12.5 + 0.1**0.5, 12.5 + 0.1**0.5)),
        # 3 (0.5 + 0.1) - 1 and 3 (0.25 + 0.1) - 1; the variances 9 (3/4 + 0.2^2/12) and
        # 9 (E[(sin - 1/4)^2] + 0.2^2/12) with E[(sin - 1/4)^2] = 1/2 - 1/pi + 1/16.
        (
            "moons",
            (0.8, 0.05),
            (0.64 + 9 * (0.75 + 0.04 / 12), 0.0025 + 9 * (0.5625 - 1 / torch.pi + 0.04 / 12)),
        ),
        # 2.25 (1/2 + 0.05^2) and 2.25 (E[(1 - cos)^2] + 0.05^2), E over an angle uniform on [0, 3 pi / 2].
        ("s_curve", (0.0, 0.0), (2.25 * 0.5025, 2.25 * (1.5 + 4 / (3 * torch.pi) + 0.0025))),
    ],
)
def test_moments_of_the_distributions(
    name: str, mean: tuple[float, float], second: tuple[float, float], generator: torch.Generator
) -> None:
    x = getattr(distributions, name)(20_000, generator)
    for half in x.chunk(2):  # also the first half alone: the points come in no order
        for moment, exact in ((half, mean), (half.square(), second)):
            tolerance = 4.5 * moment.std(0) / len(half) ** 0.5
            assert bool(((moment.mean(0) - torch.tensor(exact)).abs() < tolerance).all())


def test_replicates_share_nothing(generator: torch.Generator) -> None:
    """Each is the perceptron that nn.Linear would make, and its gradient its own."""
    ensemble = network.Ensemble(3, generator)
    x, t = torch.randn(12, 2, generator=generator), torch.rand(12, generator=generator)
    out = ensemble(x, t)
    h = torch.cat([x, t[:, None]], 1)[4:8]  # the second replicate
    for layer, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        h = (torch.selu(h) if layer else h) @ weight[1] + bias[1]
    torch.testing.assert_close(out[4:8], h)
    out[4:8].sum().backward()
    for parameter in ensemble.parameters():
        grad = parameter.grad
        assert grad is not None
        assert bool((grad[[0, 2]] == 0).all())
        assert bool((grad[1] != 0).any())


def test_pairing_stays_within_its_minibatch(generator: torch.Generator) -> None:
    pool = methods.draw_pool(distributions.TASKS["moons-8gaussians"], (2, 3, 16), generator)
    paired = methods.pair(pool, methods.PAIRINGS["ot"](), generator, lambda: None)
    assert torch.equal(paired.x1, pool.x1)
    assert torch.equal(paired.x0.sort(dim=2).values, pool.x0.sort(dim=2).values)

    def cost(pairs: network.Pool) -> Tensor:
        return (pairs.x0 - pairs.x1).square().sum((2, 3))

    assert bool((cost(paired) < cost(pool)).all())


def test_names_on_the_command_line_are_those_of_the_tables() -> None:
    from typing import get_args

    assert get_args(transport_2d.TaskName) == tuple(distributions.TASKS)
    assert get_args(transport_2d.MethodName) == tuple(methods.METHODS)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        transport_2d.main(["--help"])
    assert stop.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_a_tiny_run_and_its_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scaled(output: str) -> list[str]:
        scale = ["--quick", "--steps", "3", "--batches", "2", "--w2-points", "50"]
        return [*scale, "--output", str(tmp_path / output)]

    line = scaled("out")
    chosen = ["--tasks", "normal-moons", "--methods", "ot-cfm", "sf2m", "2-rf"]
    transport_2d.main([*line, *chosen])
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert all(title in table for title in ("N → moons", "OT-CFM", "[SF]²M", "2-rectified flow", "Floor"))
    weights = {file: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(weights) == 4  # with the first flow of the rectified one

    times = {file: file.stat().st_mtime_ns for file in weights}
    transport_2d.main([*line, *chosen])
    assert {file: file.stat().st_mtime_ns for file in weights} == times  # nothing is trained twice
    with pytest.raises(UserError, match="another scale"):
        transport_2d.main([*line, "--seeds", "3"])

    transport_2d.main([*scaled("again"), "--tasks", "normal-moons", "--methods", "2-rf"])
    name = "normal-moons--2-rf.safetensors"  # the same seed gives the same weights, whatever else is run
    assert (tmp_path / "again" / name).read_bytes() == weights[tmp_path / "out" / name]
