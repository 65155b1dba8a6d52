"""Draws the images of docs/reference/design-space.md from the tables themselves.

    python benchmarks/design_space.py [--output docs]

design-space-choices.png: every path, density of t and weighting. design-space-equivalences.png: DDIM is Euler, one
trajectory on every path, and velocity MSE is weighted noise MSE, each as it comes out of the code. Needs matplotlib
(the extra `bench`).
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from latentflow.flow import (
    PATHS,
    TIME_DENSITIES,
    WEIGHTINGS,
    CondOT,
    TimeDensity,
    VariancePreserving,
    convert,
    flow_matching_loss,
    integrate,
    loss_factor,
    time_grid,
)
from latentflow.flow import Path as FlowPath

MEANS, STD = torch.tensor([-1.2, 0.9], dtype=torch.float64), 0.25  # two modes in one dimension


def exact_velocity(path: FlowPath, x: Tensor, t: Tensor) -> Tensor:
    """E[dx_t/dt | x_t = x] where the data are the two modes; x is (N, 1)."""
    c = path.at(t, x)
    variance = (c.alpha * STD) ** 2 + c.sigma**2
    residual = x - c.alpha * MEANS  # (N, 2)
    share = torch.softmax(-0.5 * residual**2 / variance, dim=1)
    data = (share * (MEANS + c.alpha * STD**2 * residual / variance)).sum(1, keepdim=True)
    noise = (share * c.sigma * residual / variance).sum(1, keepdim=True)
    return c.d_alpha * data + c.d_sigma * noise


def draw_paths(weights: Axes, log_snrs: Axes) -> None:
    """alpha rises, sigma falls; VE's sigma is drawn relative to its maximum."""
    t = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)
    for color, (name, make_path) in zip(plt.cm.tab10.colors, PATHS.items(), strict=False):  # type: ignore[attr-defined]
        path = make_path()
        scale = path.sigma(t).max()
        label = name if scale <= 1.0 else f"{name} (sigma / {scale:.0f})"
        weights.plot(t, path.alpha(t), color=color, label=label)
        weights.plot(t, path.sigma(t) / scale.clamp(min=1.0), color=color, linestyle="--")
        log_snrs.plot(t, path.log_snr(t), color=color)
    weights.set(title="paths: alpha (line), sigma (dashed)", xlabel="t (0 noise, 1 data)")
    weights.legend(fontsize=7)
    log_snrs.set(title="log-SNR of the paths", xlabel="t", ylim=(-15, 15))


def draw_densities(axes: Axes) -> None:
    u = torch.linspace(1e-4, 1.0 - 1e-4, 2001, dtype=torch.float64)
    for name, make_density in TIME_DENSITIES.items():
        density: TimeDensity = make_density()
        axes.plot(density.quantile(u), 1.0 / density.slope(u), label=name)
    axes.set(title="densities of the training times", xlabel="t", ylim=(0, 3))
    axes.legend(fontsize=7)


def draw_weightings(axes: Axes) -> None:
    log_snr = torch.linspace(-12.0, 12.0, 401, dtype=torch.float64)
    for name, make_weighting in WEIGHTINGS.items():
        weight = make_weighting()(log_snr)
        axes.plot(log_snr, weight / weight[log_snr.abs().argmin()], label=name)
    axes.set(title="weightings of the noise MSE, relative to log-SNR 0", xlabel="log-SNR", yscale="log")
    axes.set_ylim(1e-3, 1e3)
    axes.legend(fontsize=7)


def draw_ddim(axes: Axes) -> None:
    """Lines: Euler on the straight path. Rings: DDIM, written with the predicted data and noise."""
    path, times = CondOT(), time_grid(12)
    start = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None]
    euler, ddim = [start], [start]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return exact_velocity(path, x, t)

    integrate(velocity, start, times, "euler", callback=lambda i, t, x: euler.append(x))
    for t, t_next in pairwise(times):
        x, v = ddim[-1], velocity(ddim[-1], t)
        data = convert(v, x, t, path, "velocity", "data")
        noise = convert(v, x, t, path, "velocity", "noise")
        ddim.append(path.alpha(t_next) * data + path.sigma(t_next) * noise)
    gap = float((torch.stack(euler) - torch.stack(ddim)).abs().max())
    axes.plot(times, torch.cat(euler, 1).T, color="tab:blue")
    axes.plot(times, torch.cat(ddim, 1).T, "o", color="black", fillstyle="none", markersize=5)
    axes.set(title=f"DDIM (rings) is Euler (lines): largest gap {gap:.0e}", xlabel="t", ylabel="x")


def draw_schedule_invariance(axes: Axes) -> None:
    """Lines: the flow of the straight path. Dots: that of the VP path, at equal log-SNR and rescaled."""
    straight, other = CondOT(), VariancePreserving()
    times = torch.linspace(0.02, 0.99, 40, dtype=torch.float64)
    other_times = other.inverse_log_snr(straight.log_snr(times))
    scale = (straight.alpha(times) + straight.sigma(times)) / (
        other.alpha(other_times) + other.sigma(other_times)
    )
    start = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None]
    here, there = [start], [start / scale[0]]

    def record(into: list[Tensor]):  # type: ignore[no-untyped-def]
        return lambda i, t, x: into.append(x)

    integrate(lambda x, t: exact_velocity(straight, x, t), start, times, "rk4", callback=record(here))
    integrate(lambda x, t: exact_velocity(other, x, t), there[0], other_times, "rk4", callback=record(there))
    lines, dots = torch.cat(here, 1), torch.cat(there, 1) * scale
    axes.plot(times, lines.T, color="tab:blue")
    axes.plot(times[::3], dots[:, ::3].T, ".", color="black")
    gap = float((lines - dots).abs().max())
    axes.set(
        title=f"VP flow, rescaled (dots), is the straight flow (lines): gap {gap:.0e}", xlabel="t", ylabel="x"
    )


def draw_weighting_equivalence(axes: Axes) -> None:
    """Lines: a weighted velocity MSE at each t. Dots: the same weighting on the noise MSE, of the same network."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(4096, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    for name, color in (("flow-matching", "tab:blue"), ("sigmoid", "tab:green"), ("min-snr", "tab:red")):
        weighting = WEIGHTINGS[name]()
        for prediction, style in (("velocity", "-"), ("noise", "o")):
            losses = []
            for one in t:
                path = CondOT()
                sample = path.sample(x0, x1, one)
                velocity = torch.tanh(sample.xt)  # any network will do
                output = convert(velocity, sample.xt, one, path, "velocity", prediction)
                weight = loss_factor(weighting, path, prediction, one).expand(len(x0))
                losses.append(
                    flow_matching_loss(output, sample, path=path, prediction=prediction, weight=weight).mean()
                )
            label = name if prediction == "velocity" else None
            axes.plot(t, torch.stack(losses), style, color=color, markersize=3, label=label)
    axes.set(title="weighted velocity MSE (lines) is weighted noise MSE (dots)", xlabel="t", yscale="log")
    axes.legend(fontsize=7)


def main() -> None:
    """Draw both figures."""
    plt.rcParams["axes.titlesize"] = 10
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "reference"
    )
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_paths(axes[0, 0], axes[0, 1])
    draw_densities(axes[1, 0])
    draw_weightings(axes[1, 1])
    figure.savefig(output / "design-space-choices.png", dpi=90)

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    draw_ddim(axes[0])
    draw_schedule_invariance(axes[1])
    draw_weighting_equivalence(axes[2])
    figure.savefig(output / "design-space-equivalences.png", dpi=90)
    print(output / "design-space-choices.png", output / "design-space-equivalences.png", sep="\n")


if __name__ == "__main__":
    main()
