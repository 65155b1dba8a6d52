"""The tables of paths and of samplers: name -> class, name -> sampler with its default settings."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import make
from .kappas import KAPPAS
from .metric import MetricPath
from .orders import confidence, halton, random_order
from .paths import DiscretePath, MixturePath
from .samplers import Sampler, euler, exact, jumps, tau_leaping
from .sources import SOURCES

PATHS: dict[str, type[DiscretePath]] = {"mixture": MixturePath, "metric": MetricPath}

SAMPLERS: dict[str, Sampler] = {
    "exact": jumps(exact),
    "euler": jumps(euler),
    "tau-leaping": jumps(tau_leaping),
    "random": random_order(),
    "halton": halton(),
    "confidence": confidence(),
}


def mixture_path(vocabulary: int, source: str, kappa: str, kappa_options: Mapping[str, float]) -> MixturePath:
    """Return the mixture path of a source of ``SOURCES`` and a schedule of ``KAPPAS``.

    Raises:
        UserError: an unknown name or option (the nearest is named); fewer than 2 tokens.
    """
    return MixturePath(
        vocabulary, make(KAPPAS, kappa, "kappa", **kappa_options), make(SOURCES, source, "token source")
    )
