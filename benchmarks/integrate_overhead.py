"""What `integrate` adds to a bare Python loop with the same arithmetic, turn by turn.

    python benchmarks/integrate_overhead.py [--rounds 100] [--steps 50] [--threads 1 2]

Euler's method on a (64, 4, 32, 32) float32 tensor, with velocities that cost next to nothing. The bare loop is
`x = x + h * velocity(x, t)`; the lean one writes it as `torch.add(x, velocity(x, t), alpha=h)`, which saves a temporary
tensor; neither checks anything. Prints the median over the rounds of the ratio of times, with its quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from latentflow.flow import Velocity, integrate, time_grid

SHAPE = (64, 4, 32, 32)


def bare(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, torch.tensor(t))
    return x


def lean(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    for t, t_next in pairwise(times):
        x = torch.add(x, velocity(x, torch.tensor(t)), alpha=t_next - t)
    return x


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x, constant = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    times = time_grid(args.steps)
    listed = times.tolist()
    velocities: dict[str, Velocity] = {"-x": lambda x, t: -x, "constant": lambda x, t: constant}

    print(
        "| threads | velocity | loop | us a step | integrate / loop: median | quartiles |\n|---|---|---|---|---|---|"
    )
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, velocity in velocities.items():
            for loop in (bare, lean):
                ours, theirs = [], []
                for _ in range(args.rounds):  # in turn, so that a busy moment hits both
                    theirs.append(seconds(lambda v=velocity, f=loop: f(v, x, listed)))
                    ours.append(seconds(lambda v=velocity: integrate(v, x, times, "euler")))
                ratio = torch.tensor(ours) / torch.tensor(theirs)
                low, median, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
                micro = torch.tensor(theirs).median().item() / args.steps * 1e6
                print(
                    f"| {threads} | {name} | {loop.__name__} | {micro:.0f} | {median:.2f} | {low:.2f} to {high:.2f} |"
                )


if __name__ == "__main__":
    main()
