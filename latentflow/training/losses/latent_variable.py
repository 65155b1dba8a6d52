"""A latent variable in a loss: drawn from its encoder, at the cost of what it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...config import LatentVariableConfig
from ...flow import PathSample
from ...models import Condition
from ..loop.random_numbers import SampleRandom, sent

#: nats below which a latent variable tells nothing
COLLAPSED = 0.05
_EARLIEST = 0.1  # share of a run before which nothing is said of it


class LatentVariable:
    """z of q(z | ...) for a network that takes one, and beta KL(q || N(0, I)), beta rising from 0 in a run's beginning.

    Samaddar et al. 2025 (arXiv:2505.04486), eq. 10; Guo & Schwing 2025 (arXiv:2502.09616), eq. 10.

    Args:
        config: beta, and the steps in which it rises.
        samples: of the whole run; None: not known, and nothing is said of a collapse.
        samples_per_step: over all processes.
        learnt: beta does not rise in a run that begins with a latent variable that has learnt under it.
    """

    def __init__(
        self,
        config: LatentVariableConfig,
        samples: int | None = None,
        samples_per_step: int = 1,
        *,
        learnt: bool = False,
    ) -> None:
        self._beta, self._samples = config.latent_variable_beta, samples or 0
        # In steps, not a share of the run: beta does not fall where a run goes on for longer than it was meant to.
        self._rising = 0 if learnt else config.latent_variable_warmup_steps * samples_per_step
        self._warned = False

    def infer(
        self, network: Any, condition: Condition, sample: PathSample, random: SampleRandom
    ) -> tuple[Condition, Tensor | None]:
        """Return the condition with z, and what z tells, (B,) nats; as it is, and None, of a network without."""
        encoder = getattr(network, "z_encoder", None)
        if encoder is None:
            return condition, None
        posterior = encoder(sample.x1, sample.x0, sample.xt, sample.t)
        z = posterior.sample(random.normal(posterior.mean.shape[1:]))
        return replace(condition, z=z), posterior.rate()

    def prior(self, network: Any, condition: Condition, random: SampleRandom) -> Condition:
        """Return the condition with z of N(0, I), as images are generated; as it is of a network without."""
        encoder = getattr(network, "z_encoder", None)
        return condition if encoder is None else replace(condition, z=random.normal((encoder.dim,)))

    def cost(self, rate: Tensor, sample_ids: list[int]) -> Tensor:
        """Return beta times ``rate`` (B,) of samples of a run."""
        if not self._rising:
            return self._beta * rate
        risen = torch.tensor([min(number / self._rising, 1.0) for number in sample_ids])
        return self._beta * sent(risen, rate.device) * rate

    def watch(self, sample_id: int, rate: float) -> list[str]:
        """Return a warning, once, where z tells nothing although the run is far enough."""
        far = self._samples and sample_id >= max(self._rising, _EARLIEST * self._samples)
        collapsed = bool(far) and self._beta > 0 and rate < COLLAPSED
        said, self._warned = self._warned, collapsed
        if not collapsed or said:
            return []
        return [
            f"WARNING: the latent variable tells nothing (posterior collapse: KL {rate:.2g} nats): the network draws "
            f"as without it. Begin a run with a lower beta: --latent-variable-beta {self._beta / 10:g}"
        ]
