"""Samplers at equal numbers of velocity evaluations (NFE), on a 16-d mixture whose exact velocity is known; or those of
a checkpoint, against a fine reference.

    python benchmarks/samplers.py [--output docs/measurements/samplers.md] \\
        [--plot docs/measurements/samplers.png] [--seed 0]
    python benchmarks/samplers.py --checkpoint checkpoints/emoji-64 --data EMOJI/train --guidance 4 \\
        [-n 64] [--seed 20000] [--samplers heun:20 usual:16 tuned:8] [--ends FILE] [--images [--most-real 600]]

Five Gaussians with random means of norm 3 to 4 and standard deviations of 0.3 to 1 per dimension. The error is the root
mean square difference, over 256 samples, to where a Dormand-Prince solver with tolerance 1e-9 ends from the same noise.
Every deterministic solver with a fixed number of evaluations a step takes the same kind of grid: per path, even steps
in t, and even steps in the angle arctan(alpha / sigma). Prints a table in Markdown for each.

Of a checkpoint: each noise has a caption or class of DATA, drawn by its seed; the reference is RK4 with 50 steps (200
evaluations), which --ends keeps for another run. A sampler is "usual" (as images are drawn by default), "tuned", or a
solver with the number of its steps, on an even grid, or on a sine grid: exponential-adams/sine:16. With --images they
are decoded, and compared with those of DATA in the learned features.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from latentflow.flow import SOLVERS, CondOT, Path, VariancePreserving, Velocity, integrate, time_grid
from latentflow.utils.libraries import install_command

DIMENSIONS, COMPONENTS, SAMPLES = 16, 5, 256
EVALUATIONS = (5, 10, 20, 40, 80)
PATHS: dict[str, Path] = {"CondOT": CondOT(), "VariancePreserving": VariancePreserving()}
SAMPLERS = [name for name, solver in SOLVERS.items() if not solver.stochastic and solver.evaluations]
ABOUT = """Written by `benchmarks/samplers.py --seed {seed}`. Root mean square error of the end of a trajectory, 256
samples of a mixture of five Gaussians in 16 dimensions whose exact velocity is known, at equal numbers of velocity
evaluations (NFE); in brackets how many times it is below Euler's. A solver with two evaluations a step takes half the
steps. Which sampler wins depends on the velocity's shape and on the grid: these are four of many."""


def mixture_velocity(path: Path, generator: torch.Generator) -> Velocity:
    """The exact velocity alpha' E[x1 | x] + sigma' E[x0 | x] of a mixture of diagonal Gaussians."""
    means = torch.randn(COMPONENTS, DIMENSIONS, generator=generator, dtype=torch.float64)
    means *= torch.linspace(3.0, 4.0, COMPONENTS)[:, None] / means.norm(dim=1, keepdim=True)
    stds = 0.3 + 0.7 * torch.rand(COMPONENTS, DIMENSIONS, generator=generator, dtype=torch.float64)
    log_weights = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64).log()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c = path.at(t, x)
        variance = c.alpha**2 * stds**2 + c.sigma**2  # (K, D)
        residual = x[:, None] - c.alpha * means  # (B, K, D)
        logits = log_weights - 0.5 * (variance.log() + residual**2 / variance).sum(-1)
        share = torch.softmax(logits, dim=-1)[..., None]
        data = (share * (means + c.alpha * stds**2 * residual / variance)).sum(1)
        noise = (share * c.sigma * residual / variance).sum(1)
        return c.d_alpha * data + c.d_sigma * noise

    return velocity


def even_in_t(path: Path, steps: int) -> Tensor:
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


def even_in_angle(path: Path, steps: int) -> Tensor:
    angle = torch.linspace(0.0, math.pi / 2, steps + 1, dtype=torch.float64)
    times = path.inverse_log_snr(2.0 * angle.tan().clamp(1e-30, 1e30).log())
    times[0], times[-1] = 0.0, 1.0
    return times


GRIDS = {"even steps in t": even_in_t, "even steps in arctan(alpha / sigma)": even_in_angle}


def errors(path: Path, grid: str, seed: int) -> dict[str, dict[int, float]]:
    """Sampler -> NFE -> endpoint error, where the NFE is a multiple of the sampler's evaluations a step."""
    generator = torch.Generator().manual_seed(seed)
    velocity = mixture_velocity(path, generator)
    noise = path.start(torch.randn(SAMPLES, DIMENSIONS, generator=generator, dtype=torch.float64))
    exact = integrate(velocity, noise, [0.0, 1.0], "dopri5", rtol=1e-9, atol=1e-9)

    def error(name: str, steps: int) -> float:
        end = integrate(velocity, noise, GRIDS[grid](path, steps), name, path=path)
        return (end - exact).square().mean().sqrt().item()

    per_step = {name: SOLVERS[name].evaluations or 1 for name in SAMPLERS}
    return {
        name: {n: error(name, n // per_step[name]) for n in EVALUATIONS if n % per_step[name] == 0}
        for name in SAMPLERS
    }


def table(result: dict[str, dict[int, float]]) -> str:
    """Error, and in brackets how many times below Euler's."""
    lines = ["| sampler | " + " | ".join(f"NFE {n}" for n in EVALUATIONS) + " |"]
    lines.append("|---" * (len(EVALUATIONS) + 1) + "|")
    for name, row in result.items():
        cells = [
            f"{row[n]:.2g} ({result['euler'][n] / row[n]:.1f}x)" if n in row else "" for n in EVALUATIONS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[int, float]]], file: File) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib: {install_command('matplotlib')}") from error
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True)
    for axis, (title, result) in zip(axes.flat, results.items(), strict=True):
        for name, row in result.items():
            axis.loglog(list(row), list(row.values()), marker="o", markersize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.supxlabel("velocity evaluations")
    figure.supylabel("endpoint error (RMS)")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


# ---------------------------------------------------------------- a checkpoint

REFERENCE_STEPS, BATCH = 50, 32


@torch.no_grad()
def of_checkpoint(args: argparse.Namespace) -> str:
    """Return a table of samplers of a checkpoint: the error of the latents, and figures of the images."""
    from latentflow.evaluation.data import load_image_sets, open_source, run_settings
    from latentflow.inference.sample import generators
    from latentflow.inference.tuning import condition_rows
    from latentflow.pipeline import LatentFlowPipeline

    pipe = LatentFlowPipeline.from_pretrained(args.checkpoint)
    model, settings = pipe.model, run_settings(args.checkpoint, args.data)
    source = open_source(args.data, settings)
    texts = list(source.captions()) if model.takes_text else list(model.classes)
    conditions = [random.Random(args.seed + i).choice(texts) for i in range(args.n)]
    height, width = model.native_size
    starts = [range(i, min(i + BATCH, args.n)) for i in range(0, args.n, BATCH)]
    noises = [
        model.noise(len(rows), height, width, generators(args.seed + rows[0], len(rows))) for rows in starts
    ]
    bound = [
        model.velocity(condition_rows(model, [conditions[i] for i in rows], len(rows)), args.guidance)
        for rows in starts
    ]

    def ends(times: Any, solver: Any) -> Tensor:
        return torch.cat([integrate(v, x, times, solver) for v, x in zip(bound, noises, strict=True)])

    if args.ends and args.ends.exists():
        exact = torch.load(args.ends, weights_only=True)
    else:
        exact = ends(time_grid(REFERENCE_STEPS), "rk4")
        if args.ends:
            torch.save(exact, args.ends)
    drawn, lines = {"reference": exact}, ["| sampler | evaluations | mean | median |", "|---|---|---|---|"]
    for text in args.samplers:
        name, _, steps = text.partition(":")
        times, solver, evaluations = sampler(pipe, name, int(steps), args.guidance)
        drawn[text] = ends(times, solver)
        error = (drawn[text] - exact).flatten(1).square().mean(1).sqrt()
        lines.append(f"| {name} | {evaluations} | {error.mean():.4f} | {error.median():.4f} |")
        print(lines[-1], flush=True)
    if args.images:
        train, _ = load_image_sets(model, source, None, settings)
        lines += ["", *image_figures(model, drawn, conditions, train, args.most_real)]
    return "\n".join(lines)


def sampler(pipe: Any, name: str, steps: int, guidance: float) -> tuple[Any, Any, int]:
    """Return the times, the solver and the evaluations of a sampler."""
    from latentflow.pipeline.tuned import required

    model = pipe.model
    size = model.native_size
    if name == "usual":
        return model.usual_grid(steps, *size), model.usual_solver, steps
    if name == "tuned":
        numbers = required(model, steps, guidance, *size).numbers
        return numbers.times, numbers.solver(), steps
    solver, _, kind = name.partition("/")
    return time_grid(steps, kind=kind or "uniform"), solver, steps * (SOLVERS[solver].evaluations or 1)


def image_figures(model: Any, drawn: dict[str, Tensor], asked: list[str], train: Any, most: int) -> list[str]:
    """Return a table: images whose nearest training images have the caption that was asked for, and their distance to
    the nearest of those."""
    from latentflow import metrics

    space, order = "efficientnet-lite0", list(range(len(train.captions)))
    random.Random(0).shuffle(order)
    wanted = set(asked) if model.takes_text else set()
    order.sort(key=lambda i: train.captions[i] not in wanted)  # what is asked for is among them
    real = train.rows(order[:most])
    reference, labels = metrics.features(real.images, space), real.captions
    of_classes = not model.takes_text
    what = "5 nearest: class" if of_classes else "top-1"
    lines = [f"| sampler | {what} | median distance to the asked | moved |", "|---|---|---|---|"]
    own = None
    for name, latents in drawn.items():
        images = torch.cat([model.decode(part) for part in latents.split(BATCH)])
        rows = metrics.features(images, space)
        own = rows if own is None else own
        found = (
            sum(a == b for a, b in zip(metrics.neighbour_labels(rows, reference, labels), asked, strict=True))
            if of_classes
            else metrics.retrieve_rows(rows, asked, reference, labels, tops=(1,)).hits[1]
        )
        away = torch.cdist(rows.double(), reference.double())
        same = torch.tensor([[label == one for label in labels] for one in asked])
        near = away.masked_fill(~same, math.inf).amin(1)
        near = near[near.isfinite()]  # captions that were held out
        moved = (rows - own).norm(dim=1).median()
        lines.append(f"| {name} | {found / len(asked):.3f} | {near.median():.3f} | {moved:.3f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=File, help="also write the tables to this Markdown file")
    parser.add_argument("--plot", type=File, help="draw error against NFE into this PNG (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="pipeline folder; the other flags are of it")
    parser.add_argument("--data", help="its data")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("-n", type=int, default=64, help="noises")
    parser.add_argument("--samplers", nargs="+", default=["heun:20", "usual:16"], metavar="NAME:STEPS")
    parser.add_argument("--ends", type=File, help="keep the ends of the reference in this file (.pt)")
    parser.add_argument(
        "--images", action="store_true", help="also figures of the images, in learned features"
    )
    parser.add_argument(
        "--most-real", type=int, default=10_000, help="images of DATA that they are compared with"
    )
    args = parser.parse_args()
    if args.checkpoint:
        print(of_checkpoint(args))
        return
    results = {
        f"{name}, {grid}": errors(path, grid, args.seed) for name, path in PATHS.items() for grid in GRIDS
    }
    text = "\n\n".join(f"## {title}\n\n{table(result)}" for title, result in results.items())
    print(text)
    if args.plot:
        plot(results, args.plot)
    if args.output:
        image = f"![endpoint error against evaluations]({args.plot.name})\n\n" if args.plot else ""
        page = f"# Samplers at equal cost\n\n{ABOUT.format(seed=args.seed)}\n\n{image}{text}\n"
        written = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
        page += "".join(written.partition("\n## Checkpoints")[1:])  # by hand, of runs with --checkpoint
        args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
