"""Speed of the couplings beside torchcfm's samplers of minibatch plans, turn by turn on the same batches.

    python benchmarks/coupling_speed.py [--rounds 15] [--threads 1] [--batches 256]

1. Exact optimal transport: milliseconds to pair a batch (median, range), of latentflow's "ot" and of torchcfm's
   OTPlanSampler("exact"), and how many different source rows each uses.
2. Entropic plans: milliseconds and the largest relative error of the marginals, of sinkhorn_plan here, of POT's
   log-domain Sinkhorn, and of the plan that torchcfm draws from.

Without torchcfm or POT their columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from latentflow.flow import OptimalTransport, sinkhorn_plan
from latentflow.flow.transport import squared_distances
from latentflow.utils.libraries import install_command

WIDTHS = (2, 16, 4096)
REGULARIZATIONS = (5e-2, 1e-2, 1e-3)  # of the mean cost


def batch(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal source; eight Gaussians on a circle in the first two coordinates, and normal in the others."""
    x0, x1 = (torch.randn(rows, width, generator=generator) for _ in range(2))
    angle = torch.randint(8, (rows,), generator=generator) * math.pi / 4
    x1[:, :2] = 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * x1[:, :2]
    return x0, x1


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - start), result


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):8.2f} ({min(times):.2f}-{max(times):.2f})" if times else f"{'-':>8}"


def exact(rows: int, rounds: int, with_torchcfm: bool) -> None:
    """Prints the first table."""
    print(
        f"\nexact optimal transport, batch {rows}: ms a batch, median (range) of {rounds}; different source rows used"
    )
    print(f"{'width':>6}  {'latentflow':<26} {'torchcfm':<26} {'ratio':>6}  rows used")
    generator, ours = torch.Generator().manual_seed(0), OptimalTransport()
    if with_torchcfm:
        from torchcfm.optimal_transport import OTPlanSampler

        theirs = OTPlanSampler(method="exact")
    for width in WIDTHS:
        times: tuple[list[float], list[float]] = ([], [])
        used: tuple[list[int], list[int]] = ([], [])
        for turn in range(rounds + 1):
            x0, x1 = batch(rows, width, generator)
            calls = [lambda x0=x0, x1=x1: ours(x0, x1)]
            if with_torchcfm:
                calls.append(lambda x0=x0, x1=x1: theirs.sample_plan(x0, x1)[0])
            order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
            for index in order:
                spent, paired = timed(calls[index])
                if turn:  # the first is a warm-up
                    times[index].append(spent)
                    used[index].append(len(paired.unique(dim=0)))
        ratio = (
            f"{statistics.median(times[0]) / statistics.median(times[1]):6.2f}" if times[1] else f"{'-':>6}"
        )
        counts = ", ".join(f"{statistics.median(u):.0f}" for u in used if u)
        print(f"{width:>6}  {spread(times[0]):<26} {spread(times[1]):<26} {ratio}  {counts}", flush=True)


def entropic(rows: int, with_pot: bool, with_torchcfm: bool) -> None:
    """Prints the second table."""
    print(f"\nentropic plans, batch {rows}: ms, and largest relative error of row and column sums")
    print(f"{'width':>6} {'of mean':>8}  {'latentflow':<20} {'POT sinkhorn_log':<20} torchcfm")
    generator = torch.Generator().manual_seed(0)
    for width in WIDTHS:
        x0, x1 = batch(rows, width, generator)
        cost = squared_distances(x0, x1)
        for relative in REGULARIZATIONS:
            regularization = relative * float(cost.mean())
            calls = [lambda cost=cost, r=regularization: sinkhorn_plan(cost.float(), r)]
            if with_pot:
                import ot

                calls.append(lambda cost=cost, r=regularization: ot.bregman.sinkhorn_log([], [], cost, r))
            if with_torchcfm:
                from torchcfm.optimal_transport import OTPlanSampler

                sampler = OTPlanSampler(method="sinkhorn", reg=regularization)
                calls.append(lambda x0=x0, x1=x1, s=sampler: torch.as_tensor(s.get_map(x0, x1)))
            cells = []
            for call in calls:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    spent, plan = timed(call)
                error = max(float((rows * plan.sum(axis) - 1).abs().max()) for axis in (0, 1))
                cells.append(f"{spent:8.1f} {error:8.1e}")
            print(f"{width:>6} {relative:>8.0e}  " + " ".join(f"{cell:<20}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="batches per width")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: torch's own")
    parser.add_argument("--batches", type=int, nargs="+", default=[256], help="rows of a batch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with_torchcfm, with_pot = (importlib.util.find_spec(name) is not None for name in ("torchcfm", "ot"))
    if not with_torchcfm:
        print(f"torchcfm is not installed: its columns stay empty ({install_command('torchcfm')})")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for rows in arguments.batches:
        exact(rows, arguments.rounds, with_torchcfm)
        entropic(rows, with_pot, with_torchcfm)


if __name__ == "__main__":
    main()
