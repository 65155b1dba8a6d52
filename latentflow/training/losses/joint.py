"""The losses of an autoencoder and a flow that learn together, each on what the other makes of the same images.

What shapes the latents is one of two terms through the network, whose weights it leaves alone:

- ``rate``, the information in the latents: the KL divergence of a noised latent from the flow's distribution. With the
  least noise of the flow equal to that of the latents it is a weighted flow loss (Unified Latents, arXiv:2602.17270,
  deterministic encoder); with a posterior of the encoder less its entropy (LSGM, arXiv:2106.05931, theorem 1).
- ``encoder_alignment``, the distance of the network's features from a vision model's (REPA-E, arXiv:2504.10483).

The network itself learns by the usual flow loss, in LSGM by the rate itself, the cross entropy of the latents. No
gradient of it reaches the encoder: with it latents collapse to a point, which is easiest to predict.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...autoencoder import Autoencoder, denormalise, latent_channels, normalise
from ...autoencoder.latents import normalised_posterior
from ...config import AutoencoderConfig, JointConfig
from ...errors import UserError
from ...flow import Path, flow_matching_loss, loss_factor
from ...flow.weightings import Likelihood
from ..loop.distributed import process_state
from ..loop.random_numbers import SampleRandom
from .alignment import AlignedFlowLoss
from .autoencoder import AutoencoderLoss, frozen
from .conditioned import weighted_mean

log = logging.getLogger(__name__)

#: an encoder has collapsed when the spread of its latents is below this share of its first
COLLAPSED = 0.1
_CHECK_EVERY = 50  # steps
_EPS, _MOMENTUM = 1e-4, 0.1  # of the batch norm, as in REPA-E


@dataclass(frozen=True)
class RateTimes:
    """Times at which a rate is estimated: the density of their log-SNR is even from 0 to ``last``, and falls as
    e^lambda below, as the integral of the rate does."""

    path: Path
    last: float

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times (B,) of uniform numbers u."""
        place = (1 + self.last) * u
        return self.path.inverse_log_snr(torch.where(place < 1, place.log(), place - 1))

    def slope(self, u: Tensor) -> Tensor:
        """Return dt/du (B,)."""
        of_log_snr = (1 + self.last) / ((1 + self.last) * u).clamp(max=1)
        return of_log_snr / self.path.d_log_snr(self.quantile(u))


class JointFlowLoss(AlignedFlowLoss):
    """`AlignedFlowLoss` of the latents that the autoencoder's step has just made; a batch holds ``images``.

    In validation the images are encoded. The loss is also logged as ``flow``.
    """

    _autoencoder: tuple[JointAutoencoderLoss]

    def learn_from(self, autoencoder: JointAutoencoderLoss) -> None:
        """Take the latents from this loss, which is called before this one in each step; of LSGM the times as well."""
        self._autoencoder = (autoencoder,)  # in a tuple: not a submodule
        if autoencoder.joint.joint == "lsgm":
            times = RateTimes(self.path, autoencoder.joint.log_snr)
            self.density = lambda batch: times
            self.choices = self.choices._replace(weighting=Likelihood())
        self._features: dict[str, Tensor] = {}  # of the vision model, for the images of the step

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        result = super().forward(batch | self._autoencoder[0].as_latents(batch) | self._features)
        return result | {"flow": result["loss"].detach()}

    def rate(self, latents: Tensor, batch: dict[str, Any], random: SampleRandom, last: float) -> Tensor:
        """Return the information (B,) in nats of latents (B, C, h, w) with noise of a log-SNR of ``last``.

        It is the KL divergence of the noised latent from the flow's distribution, or more: 1/2 int E |noise - predicted
        noise|^2 d lambda from -infinity to ``last``, estimated at one log-SNR (Kingma et al. 2021, arXiv:2107.00630,
        section 4).
        """
        times, u = RateTimes(self.path, last), random.uniform()
        t = times.quantile(u)
        factor = loss_factor(Likelihood(), self.path, self.config.prediction, t, times.slope(u))
        x0 = random.normal(latents.shape[1:])
        sample = self.path.sample(x0, latents, t.to(latents.dtype))
        output = self.network(self.path.scale_input(sample.xt, sample.t), sample.t, self.condition(batch))
        error = flow_matching_loss(
            output, sample, path=self.path, prediction=self.config.prediction, weight=factor
        )
        return error * latents[0].numel()

    def encoder_alignment(self, latents: Tensor, batch: dict[str, Any], random: SampleRandom) -> Tensor:
        """Return the distances (B,) of the network's features at noised latents from the vision model's."""
        assert self.alignment is not None
        t, x0 = self.density(batch).quantile(random.uniform()), random.normal(latents.shape[1:])
        sample = self.path.sample(x0, latents, t.to(latents.dtype))
        side, block = self.alignment.patch_size, self.alignment.block
        grid = latents.shape[2] // side, latents.shape[3] // side
        target = self.alignment.target(batch, t, grid, random, _no_teacher)
        self._features = {"features": target}
        found = self.network(
            self.path.scale_input(sample.xt, sample.t),
            sample.t,
            self.condition(batch),
            features=block,
            only_features=True,
        )
        distances: Tensor = self.alignment(found.features, target, None)
        return distances


class JointAutoencoderLoss(AutoencoderLoss):
    """`AutoencoderLoss`, and what shapes the latents for the flow: ``rate`` or ``encoder_alignment``.

    Args:
        vae: with statistics in its config, which normalise its latents; in the mode alignment a batch norm does, and
            `keep_statistics` copies its own there.
        config: the autoencoder's settings; ``autoencoder_batch_size`` is that of the run.
        joint: which term, and its weight.
        flow: the flow's loss.
        seed: of the run.
        discriminator, random_numbers: see `AutoencoderLoss`.

    Attributes:
        joint: which term, and its weight.
        spread: standard deviation of the raw latents over the images, the mean over their elements: a moving average.
        first_spread: that of the first batch.
    """

    spread: Tensor
    first_spread: Tensor

    def __init__(
        self,
        vae: Autoencoder,
        config: AutoencoderConfig,
        joint: JointConfig,
        flow: JointFlowLoss,
        seed: int,
        discriminator: nn.Module | None = None,
        random_numbers: str = "philox",
    ) -> None:
        # Another key than the flow's, which draws other numbers for the same samples.
        super().__init__(vae, config, seed ^ 0x4A4F494E, discriminator, random_numbers)
        self.joint, self._flow = joint, (flow,)  # in a tuple: not a submodule
        self.norm: nn.BatchNorm2d | None = None
        if joint.joint == "alignment":
            self.norm = nn.BatchNorm2d(latent_channels(vae), _EPS, _MOMENTUM, affine=False)
        self._encoded: tuple[Tensor, Tensor | None, SampleRandom]  # of the step: latents, their deviation
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("first_spread", torch.zeros(()))
        flow.learn_from(self)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        result = super().forward(batch)
        latents, std, random = self._encoded
        self._latents = latents.detach()
        weighted, values = self.shaping(latents, std, batch | self.as_latents(batch), random)
        return result | values | {"loss": result["loss"] + weighted, "latent_std": self.spread.clone()}

    def shaping(
        self, latents: Tensor, std: Tensor | None, batch: dict[str, Any], random: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted term that shapes the latents, and it by its name, a scalar.

        Args:
            latents: (B, C, h, w), normalised. std: of their posterior; None: deterministic.
        """
        flow = self._flow[0]
        with frozen(flow):
            if self.norm is not None:
                distance = weighted_mean(flow.encoder_alignment(latents, batch, random), batch)
                return self.joint.weight * distance, {"encoder_alignment": distance.detach()}
            rate = flow.rate(latents, batch, random, self.joint.log_snr)
        if std is not None:  # the entropy that the posterior has beyond that of the noise alone
            rate = rate - 0.5 * (std / self._noise).square().log1p().flatten(1).sum(1)
        information = weighted_mean(rate, batch) / batch["images"][0].numel()
        return self.joint.weight * information, {"rate": information.detach()}

    def as_latents(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``latents`` for a batch, those of the step or, in validation, of its images; ``pixels`` if needed."""
        images = batch["images"]
        seen = {"pixels": (images + 1) * 127.5} if self._flow[0].needs_pixels else {}
        if self.training:
            return seen | {"latents": self._latents}
        mean, std = normalised_posterior(self.vae, images)
        return seen | {"latents": mean} | ({} if std is None else {"latents_std": std})

    def keep_statistics(self) -> None:
        """Write the statistics of the batch norm, if any, into the autoencoder's config."""
        if self.norm is not None:
            mean, variance = self.norm.running_mean, self.norm.running_var
            assert mean is not None and variance is not None
            set_statistics(self.vae, mean, variance)

    @property
    def collapsed(self) -> bool:
        """Return whether the raw latents of all images have become nearly the same."""
        return self._collapse() is not None

    def refuse_collapse(self) -> None:
        """Refuse to go on with an encoder that has collapsed.

        Raises:
            UserError: it has.
        """
        if error := self._collapse():
            raise UserError(f"{error.what}: it is not exported", error.fix)

    def finish_step(self, skip: Tensor) -> None:
        """Look from time to time whether the encoder has collapsed, and say it."""
        super().finish_step(skip)
        due = (self._step_now + 1) % _CHECK_EVERY == 0 and process_state().is_main_process
        if due and (error := self._collapse()):
            log.warning("WARNING: step %d: %s. %s", self._step_now + 1, error.what, error.fix)

    @property
    def _noise(self) -> float:
        """The noise of normalised latents: sigma / alpha at the log-SNR where the flow's noise levels end."""
        return math.exp(-0.5 * self.joint.log_snr)

    def _collapse(self) -> UserError | None:
        return collapse(self.spread, self.first_spread, self.joint)

    def _encode(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor | None]:
        """Return what the decoder learns from, raw; and the KL divergence to N(0, I) where it is a loss (alignment)."""
        encoded = self.vae.encode(images)
        posterior = getattr(encoded, "latent_dist", None)
        raw = encoded.latent if posterior is None else posterior.mean
        if self.training and len(raw) > 1:
            self._watch(raw.detach().float())
        std = None
        if posterior is not None:
            raw, std = raw + posterior.std * random.normal(raw.shape[1:]), posterior.std
        if self.norm is not None:
            self._encoded = self.norm(raw.float()), None, random
            return raw, None if posterior is None else posterior.kl().mean()
        latents = normalise(self.vae, raw.float())
        if std is not None:
            std = normalise(self.vae, std.float()) - normalise(self.vae, torch.zeros_like(std).float())
        self._encoded = latents, std, random
        return denormalise(self.vae, latents + self._noise * random.normal(latents.shape[1:])), None

    @torch.no_grad()
    def _watch(self, raw: Tensor) -> None:
        now = raw.var(0).mean().sqrt()
        begun = self.first_spread > 0
        self.first_spread.copy_(torch.where(begun, self.first_spread, now))
        self.spread.copy_(torch.where(begun, self.spread.lerp(now, 0.1), now))


def collapse(spread: Tensor, first_spread: Tensor, joint: JointConfig) -> UserError | None:
    """Return the error that an encoder has collapsed, see `JointAutoencoderLoss`; None where it has not."""
    if not bool(spread < COLLAPSED * first_spread):
        return None
    return UserError(
        f"the encoder has collapsed: the standard deviation of its latents is {float(spread):.2g}, at first it was "
        f"{float(first_spread):.2g}",
        f"Begin a run with a lower --joint-weight, such as {joint.weight / 10:g}, or a lower --learning-rate.",
    )


def set_statistics(vae: Autoencoder, mean: Tensor, variance: Tensor) -> None:
    """Write the statistics (C,) of a batch norm of raw latents into the autoencoder's config."""
    deviation = (variance + _EPS).sqrt()
    vae.register_to_config(
        latents_mean=mean.tolist(), latents_std=deviation.tolist(), scaling_factor=1.0, shift_factor=None
    )


def _no_teacher(t: Tensor, blocks: int) -> Tensor:
    raise NotImplementedError("features of the average are no target of an encoder")
