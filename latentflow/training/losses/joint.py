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

from ...autoencoder import Autoencoder, denormalise
from ...autoencoder.latents import posterior
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
    """Times at which a rate is estimated: the density of their log-SNR is even from 0 to ``last``, a scalar, and falls
    as e^lambda below, as the integral of the rate does."""

    path: Path
    last: Tensor

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times (B,) of uniform numbers u."""
        place = self._mass.to(u) * u
        return self.path.inverse_log_snr(torch.where(place < 1, place.log(), place - 1))

    def slope(self, u: Tensor) -> Tensor:
        """Return dt/du (B,)."""
        mass = self._mass.to(u)
        return mass / (mass * u).clamp(max=1) / self.path.d_log_snr(self.quantile(u))

    @property
    def _mass(self) -> Tensor:
        return self.last.clamp(max=0).exp() + self.last.clamp(min=0)


class ChannelNorm(nn.BatchNorm2d):
    """A batch norm of raw latents without weights, as in REPA-E."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, _EPS, _MOMENTUM, affine=False)

    @property
    def deviation(self) -> Tensor:
        """Return what latents are divided by when images are generated, (1, C, 1, 1)."""
        return (self.running_var + _EPS).sqrt().view(1, -1, 1, 1)


class SpreadNorm(nn.Module):
    """Latents as the network sees them: without the mean of each channel, over one deviation for all of them.

    What shapes the latents also decides their spread, which may be far from the one for which the noise levels of a
    flow and its samplers are made. So the network gets them in other units, by moving averages, which are constants to
    the gradient: with its noise in the same units the rate is the same.

    Args:
        units: (C,) deviations of the raw latents of each channel in which ``spread`` is measured.

    Attributes:
        running_mean: (C,) of the raw latents.
        running_var: (C,) ``units`` times ``spread``, squared.
    """

    units: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, units: Tensor) -> None:
        super().__init__()
        self.register_buffer("units", units.clone(), persistent=False)
        self.register_buffer("running_mean", torch.zeros_like(units))
        self.register_buffer("running_var", torch.zeros_like(units))

    def forward(self, raw: Tensor) -> Tensor:
        if self.training:
            self._measure(raw.detach())
        return (raw - self.running_mean.view(1, -1, 1, 1)) / self.deviation

    @property
    def deviation(self) -> Tensor:
        """Return what latents are divided by, (1, C, 1, 1)."""
        return (self.running_var + _EPS).sqrt().view(1, -1, 1, 1)

    @property
    def spread(self) -> Tensor:
        """Return the deviation of all elements in ``units``, a scalar."""
        return ((self.running_var + _EPS) / self.units.square()).mean().sqrt()

    @torch.no_grad()
    def _measure(self, raw: Tensor) -> None:
        begun = self.running_var > 0
        mean = raw.mean((0, 2, 3))
        mean = torch.where(begun, self.running_mean.lerp(mean, _MOMENTUM), mean)
        apart = (raw - mean.view(1, -1, 1, 1)) / self.units.view(1, -1, 1, 1)
        variance = apart.square().mean() * self.units.square()
        self.running_mean.copy_(mean)
        self.running_var.copy_(torch.where(begun, self.running_var.lerp(variance, _MOMENTUM), variance))


class JointFlowLoss(AlignedFlowLoss):
    """`AlignedFlowLoss` of the latents that the autoencoder's step has just made; a batch holds ``images``.

    In validation the images are encoded. The loss is also logged as ``flow``.
    """

    _autoencoder: tuple[JointAutoencoderLoss]

    def learn_from(self, autoencoder: JointAutoencoderLoss) -> None:
        """Take the latents from this loss, which is called before this one in each step; of LSGM the times as well."""
        self._autoencoder = (autoencoder,)  # in a tuple: not a submodule
        if autoencoder.joint.joint == "lsgm":
            self.density = lambda batch: RateTimes(self.path, autoencoder.last)
            self.choices = self.choices._replace(weighting=Likelihood())
        self._features: dict[str, Tensor] = {}  # of the vision model, for the images of the step

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        result = super().forward(batch | self._autoencoder[0].as_latents(batch) | self._features)
        return result | {"flow": result["loss"].detach()}

    def rate(self, latents: Tensor, batch: dict[str, Any], random: SampleRandom, last: Tensor) -> Tensor:
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
        vae: with statistics in its config, the units of the noise of its latents. The network sees these through a
            `SpreadNorm`, in the mode alignment a batch norm, whose statistics `keep_statistics` writes there.
        config: the autoencoder's settings; ``autoencoder_batch_size`` is that of the run.
        joint: which term, and its weight.
        flow: the flow's loss.
        seed: of the run.
        discriminator, random_numbers: see `AutoencoderLoss`.

    Attributes:
        joint: which term, and its weight.
        norm: of the raw latents.
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
        channels = int(vae.config["latent_channels"])  # both classes have it
        raw = denormalise(vae, torch.stack([torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)]))
        self.norm: ChannelNorm | SpreadNorm = SpreadNorm((raw[1] - raw[0]).flatten())
        if joint.joint == "alignment":
            self.norm = ChannelNorm(channels)
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
            latents: (B, C, h, w), of `norm`. std: of their posterior; None: deterministic.
        """
        flow = self._flow[0]
        with frozen(flow):
            if isinstance(self.norm, ChannelNorm):
                distance = weighted_mean(flow.encoder_alignment(latents, batch, random), batch)
                return self.joint.weight * distance, {"encoder_alignment": distance.detach()}
            rate = flow.rate(latents, batch, random, self.last)
        if std is not None:  # the entropy that the posterior has beyond that of the noise alone
            rate = rate - 0.5 * (std * self.norm.spread / self._noise).square().log1p().flatten(1).sum(1)
        information = weighted_mean(rate, batch) / batch["images"][0].numel()
        return self.joint.weight * information, {"rate": information.detach()}

    def as_latents(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``latents`` for a batch, those of the step or, in validation, of its images; ``pixels`` if needed."""
        images = batch["images"]
        seen = {"pixels": (images + 1) * 127.5} if self._flow[0].needs_pixels else {}
        if self.training:
            return seen | {"latents": self._latents}
        mean, std = posterior(self.vae, images)
        seen |= {} if std is None else {"latents_std": std / self.norm.deviation}
        return seen | {"latents": self.norm(mean)}

    def keep_statistics(self) -> None:
        """Write the statistics of the latents into the autoencoder's config."""
        set_statistics(self.vae, self.norm.running_mean, self.norm.running_var)

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
    def last(self) -> Tensor:
        """Return the log-SNR at which the flow's noise levels end: that of the latents in the network's units."""
        assert isinstance(self.norm, SpreadNorm)
        return self.joint.log_snr + 2 * self.norm.spread.log()

    @property
    def _noise(self) -> float:
        """The noise of the latents, in the units of their spread."""
        return math.exp(-0.5 * self.joint.log_snr)

    def _collapse(self) -> UserError | None:
        return collapse(self.spread, self.first_spread, self.joint)

    def _encode(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor | None]:
        """Return what the decoder learns from, raw; and the KL divergence to N(0, I) where it is a loss (alignment)."""
        encoded = self.vae.encode(images)
        drawn_from = getattr(encoded, "latent_dist", None)
        raw = encoded.latent if drawn_from is None else drawn_from.mean
        if self.training and len(raw) > 1:
            self._watch(raw.detach().float())
        std = None
        if drawn_from is not None:
            raw, std = raw + drawn_from.std * random.normal(raw.shape[1:]), drawn_from.std
        latents = self.norm(raw.float())
        if isinstance(self.norm, ChannelNorm):
            self._encoded = latents, None, random
            return raw, None if drawn_from is None else drawn_from.kl().mean()
        self._encoded = latents, None if std is None else std.float() / self.norm.deviation, random
        noise = self._noise * self.norm.units.view(1, -1, 1, 1) * random.normal(raw.shape[1:])
        return raw.float() + noise, None

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
    """Write the statistics (C,) of raw latents into the autoencoder's config."""
    deviation = (variance + _EPS).sqrt()
    vae.register_to_config(
        latents_mean=mean.tolist(), latents_std=deviation.tolist(), scaling_factor=1.0, shift_factor=None
    )


def _no_teacher(t: Tensor, blocks: int) -> Tensor:
    raise NotImplementedError("features of the average are no target of an encoder")
