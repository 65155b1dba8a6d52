"""The tables of paths and of samplers: name -> class, name -> sampler with its default settings."""

from __future__ import annotations

from .metric import MetricPath
from .orders import confidence, halton, random_order
from .paths import DiscretePath, MixturePath
from .samplers import Sampler, euler, exact, jumps, tau_leaping

PATHS: dict[str, type[DiscretePath]] = {"mixture": MixturePath, "metric": MetricPath}

SAMPLERS: dict[str, Sampler] = {
    "exact": jumps(exact),
    "euler": jumps(euler),
    "tau-leaping": jumps(tau_leaping),
    "random": random_order(),
    "halton": halton(),
    "confidence": confidence(),
}
