"""Measure what a latent variable does in two dimensions and in one: `python benchmarks/latent_variable.py`.

Small perceptrons are trained by the loss of `latentflow train --latent-variable`, without and with a latent variable:
from N(0, 1) to -1 and +1, in one Euler step; from N(0, I) to eight Gaussians and from two moons to them, in four. Plain
flow matching is trained as long, in CPU seconds, as the one with a latent variable. Distances are those of exact
transport (Wasserstein-2), beside that between two real sets of as many points.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from two_dimensional.distributions import MODE_STD, MODES, moons
from two_dimensional.metrics import mode_metrics, wasserstein2_squared

from latentflow.config import FlowConfig, LatentVariableConfig
from latentflow.flow import integrate, time_grid
from latentflow.models import Condition
from latentflow.models.inputs import linear
from latentflow.models.latent_variable import SEEN, Posterior
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_variable import LatentVariable

Draw = Callable[[int, torch.Generator], Tensor]


def hidden_layers(inputs: int, outputs: int) -> nn.Sequential:
    """Make a perceptron of three hidden layers of 64 units."""
    layers: list[nn.Module] = [nn.Linear(inputs, 64)]
    for _ in range(2):
        layers += [nn.SELU(), nn.Linear(64, 64)]
    return nn.Sequential(*layers, nn.SELU(), nn.Linear(64, outputs))


class PointEncoder(nn.Module):
    """q(z | ...) of points (B, C, 1, 1): `LatentEncoder` for data that are no images, as large as the network.

    A convolution of 3 x 3 sees such points through one of its nine weights, between zeros of its padding.
    """

    def __init__(self, kind: str, channels: int, dim: int) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim
        self.layers = hidden_layers(SEEN[kind] * channels + (kind == "path"), 2 * dim)
        with torch.no_grad():  # variances of 1 at first
            last = self.layers[-1]
            last.weight[dim:] = 0.0
            last.bias[dim:] = 0.0

    def forward(
        self, x1: Tensor, x0: Tensor | None = None, xt: Tensor | None = None, t: Tensor | None = None
    ) -> Posterior:
        seen = [x1.flatten(1)]
        if self.kind == "path":
            assert x0 is not None and xt is not None and t is not None
            seen += [x0.flatten(1), xt.flatten(1), t.to(x1).expand(len(x1))[:, None]]
        mean, log_variance = self.layers(torch.cat(seen, 1)).chunk(2, 1)
        return Posterior(mean, log_variance.clamp(-10.0, 10.0))


class Perceptron(nn.Module):
    """(x, t, z) -> what is predicted, for data (B, C, 1, 1): three hidden layers of 64 units.

    Args:
        channels: C.
        kind: of the latent variable; None: there is none.
        dim: Z, its dimension.
    """

    def __init__(self, channels: int, kind: str | None = None, dim: int = 1) -> None:
        super().__init__()
        self.layers = hidden_layers(channels + 1, channels)
        # last, and zero: the others start as they do without
        self.z_encoder = PointEncoder(kind, channels, dim) if kind else None
        self.z_embedder = linear(dim, 64, zero=True) if kind else None

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        h = self.layers[0](torch.cat([x.flatten(1), t.to(x).expand(len(x))[:, None]], 1))
        if self.z_embedder is not None:
            h = h + self.z_embedder(condition.z)
        return self.layers[1:](h).view_as(x)


def fit(
    network: Perceptron,
    target: Draw,
    *,
    steps: int,
    seed: int,
    source: Draw | None = None,
    beta: float = 0.0,
    first_beta: float | None = None,
    exponent: float = 1.0,
    batch: int = 256,
    seconds: float = math.inf,
    rate: float = 5e-3,
) -> float:
    """Train until ``steps`` steps are taken, or so many CPU ``seconds`` are over; return the CPU seconds.

    The rate falls to zero at the end, and the network is left with a moving average of its weights.

    Args:
        first_beta: beta at first, which falls to ``beta`` within two thirds of the run, geometrically.
        exponent: p of the density p t^(p - 1) of the times; 1 is uniform.
    """
    times = {"exponent": exponent}
    config = FlowConfig(time_density="power", time_options=times, condition_dropout=0.0)
    loss = FlowLoss(network, config, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99), fused=True)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    for step in range(steps):
        done = max(step / steps, (time.process_time() - start) / seconds)
        if done >= 1.0:
            break
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * math.cos(math.pi / 2 * done) ** 2
        # It does not rise: while it is high q is wide, and the network learns where one answer ends and another begins,
        # of which it hears little later.
        risen = beta * ((first_beta or beta) / beta) ** max(0.0, 1.0 - 1.5 * done) if beta else 0.0
        latent = LatentVariableConfig(latent_variable_beta=risen, latent_variable_warmup_steps=0)
        loss.latent_variable = LatentVariable(latent)
        batch_of = {
            "latents": target(batch, generator)[:, :, None, None],
            "sample_ids": [*range(step * batch, (step + 1) * batch)],
        }
        if source is not None:
            batch_of["noise"] = source(batch, generator)[:, :, None, None]
        optimizer.zero_grad()
        loss(batch_of)["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [*network.parameters()], 1.0 - min(0.995, (1 + step) / (10 + step)))
    taken = time.process_time() - start
    with torch.no_grad():
        torch._foreach_copy_([*network.parameters()], average)
    return taken


@torch.no_grad()
def sample(network: Perceptron, x0: Tensor, z: Tensor | None, steps: int) -> Tensor:
    """Return the points (B, C) to which ``steps`` Euler steps lead from x0 (B, C) under z (B, Z)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, Condition(z=z))

    return integrate(velocity, x0[:, :, None, None], time_grid(steps), "euler")[:, :, 0, 0]


@torch.no_grad()
def mutual_information(
    encoder: PointEncoder, x0: Tensor, target: Draw, generator: torch.Generator, others: int = 32
) -> float:
    """Estimate I(z; x0) in nats at t = 0, of z that the encoder draws for x0 (N, C) and independent data.

    The densities q(z | x0) and q(z) are means over ``others`` data for each x0, and over all of these pairs; the first
    has the pair that z was drawn for among them, and so errs upwards.
    """
    n = len(x0)
    starts = x0.repeat_interleave(others, 0)[:, :, None, None]
    x1 = target(n * others, generator)[:, :, None, None]
    q = encoder(x1, starts, starts, torch.zeros(n * others))
    pairs = torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp())
    z = pairs.sample().view(n, others, -1)[:, 0]
    density = pairs.log_prob(z[:, None]).sum(-1)  # (N, N * others)
    own = density.view(n, n, others).diagonal(dim1=0, dim2=1).T
    size = math.log(others)
    return float((own.logsumexp(1) - size - (density.logsumexp(1) - size - math.log(n))).mean())


# ---------------------------------------------------------------- the data


def two_points(n: int, generator: torch.Generator) -> Tensor:
    """-1 and +1, n / 2 of each in random order."""
    return (2.0 * torch.randperm(n, generator=generator).remainder(2) - 1.0)[:, None]


def even_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """The 8 Gaussians, n / 8 points of each in random order: their shares do not differ by chance."""
    mode = torch.randperm(n, generator=generator).remainder(8)
    return MODES[mode] + MODE_STD * torch.randn(n, 2, generator=generator)


def w2_to_two_points(x: Tensor) -> float:
    """W2 between points (N, 1) and the law of -1 and +1: transport on a line keeps the order."""
    rows = x.flatten().sort().values
    target = torch.ones_like(rows)
    target[: len(rows) // 2] = -1.0
    return float((rows - target).square().mean().sqrt())


# ---------------------------------------------------------------- the figures


def one_step(seed: int, steps: int, beta: float, first_beta: float | None = None) -> dict[str, float]:
    """From N(0, 1) to -1 and +1 in one Euler step, without and with a latent variable of the path.

    Half of the times are below 0.03: the step sees the velocity at 0 alone, and what z tells there.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    x0, z = torch.randn(100_000, 1, generator=g), torch.randn(100_000, 1, generator=g)
    torch.manual_seed(seed)
    network = Perceptron(1, "path")
    given: dict[str, Any] = {"seed": seed, "batch": 512, "exponent": 0.2}
    seconds = fit(network, two_points, steps=steps, beta=beta, first_beta=first_beta, **given)
    assert network.z_encoder is not None
    information = mutual_information(network.z_encoder, x0[:400], two_points, g)
    x = sample(network, x0, z, 1)
    plain = Perceptron(1)
    fit(plain, two_points, steps=max(steps // 10, 200), **given)
    return {
        "w2": w2_to_two_points(x),
        "plain": w2_to_two_points(sample(plain, x0, None, 1)),
        "information": information,
        "above": float((x > 0).float().mean()),
        "seconds": seconds,
    }


def four_steps(
    seed: int,
    steps: int,
    beta: float,
    kind: str,
    source: Draw | None,
    first_beta: float | None = None,
    points: int = 1000,
) -> dict[str, float]:
    """To the 8 Gaussians in four Euler steps: excess of W2, and W2 within modes, over that of two real sets."""
    g = torch.Generator().manual_seed(1000 + seed)
    x0 = torch.randn(points, 2, generator=g) if source is None else source(points, g)
    real, other = even_gaussians(points, g), even_gaussians(points, g)
    torch.manual_seed(seed)
    network = Perceptron(2, kind, dim=2)
    given: dict[str, Any] = {"seed": seed, "source": source}
    seconds = fit(network, even_gaussians, steps=steps, beta=beta, first_beta=first_beta, **given)
    plain = Perceptron(2)
    fit(plain, even_gaussians, steps=10**6, seconds=seconds, **given)
    encoder = network.z_encoder
    assert encoder is not None
    drawn = {"prior": torch.randn(points, 2, generator=g)}
    if kind == "image":  # of new points, as many of each component
        with torch.no_grad():
            of = encoder(even_gaussians(points, g)[:, :, None, None])
        drawn["component"] = of.sample(torch.randn(points, 2, generator=g))
    made = {name: sample(network, x0, z, 4) for name, z in drawn.items()} | {
        "plain": sample(plain, x0, None, 4)
    }
    floor = wasserstein2_squared(other, real) ** 0.5, mode_metrics(other, real)[0]
    found = {"seconds": seconds, "floor": floor[0]}
    for name, x in made.items():
        within, wrong = mode_metrics(x, real)
        found |= {name: wasserstein2_squared(x, real) ** 0.5 - floor[0], f"{name}_within": within - floor[1]}
        found[f"{name}_wrong"] = wrong
    if kind == "path":
        found["information"] = mutual_information(encoder, x0[:400], even_gaussians, g)
    return found


#: name -> (figures of a seed and steps, beta, steps)
TASKS: dict[str, tuple[Callable[..., dict[str, float]], float, int]] = {
    "two-points": (partial(one_step, first_beta=1.0), 0.002, 20_000),
    "eight-gaussians": (partial(four_steps, kind="image", source=None), 0.3, 1000),
    "moons": (partial(four_steps, kind="path", source=moons), 4.0, 1000),
}


def main() -> None:
    """Train and measure; print the mean and the standard deviation over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*TASKS], help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="in the place of the task's own")
    parser.add_argument("--beta", type=float, help="in the place of the task's own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.tasks:
        measure, beta, steps = TASKS[name]
        beta = beta if given.beta is None else given.beta
        rows: list[dict[str, Any]] = []
        for seed in given.seeds:
            rows.append(measure(seed=seed, steps=given.steps or steps, beta=beta))
            print(json.dumps({"task": name, "seed": seed, "beta": beta, **rows[-1]}), flush=True)
        for figure in rows[0]:
            values = [row[figure] for row in rows]
            spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
            print(f"{name}: {figure} {mean(values):.3f}{spread}")


if __name__ == "__main__":
    main()
