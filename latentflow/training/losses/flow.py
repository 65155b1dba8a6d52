"""The flow-matching loss: what one training step of a velocity network minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...autoencoder import Autoencoder, masked_condition, masked_source
from ...config import FlowConfig, LatentVariableConfig
from ...data import pixels_to_images
from ...data.masks import DEFAULT_SHAPES, OWN, check_shapes, random_masks
from ...flow import PathSample, TimeDensity, UniformTimes, loss_factor
from ...models import Condition
from ...utils.progress import progress_bar
from ..loop.data_order import SampleUse, Stream, seeded
from ..loop.loader import TrainingData, by_group, groups_of, load_batch, to_device
from ..loop.random_numbers import SampleRandom, sent
from .conditioned import ConditionedLoss, weighted_mean
from .control import ControlImages
from .latent_variable import LatentVariable

_VALIDATION_TIMES = 4  # noises and times per validation image


class FlowLoss(ConditionedLoss):
    """The loss of a velocity network, and of the text encoder that is trained along.

    Beside what `ConditionedLoss` needs, a batch holds ``latents`` (B, C, h, w), perhaps their ``latents_std`` of the
    same shape, and perhaps ``noise``, shaped like the latents, that they are paired with.

    Args:
        network: called ``network(xt, t, condition)``.
        config: what it learns.
        seed, text_encoder, masking, control, random_numbers: see `ConditionedLoss`.
        samples: samples that the whole run uses, of which ``config.time_uniform_from`` is a share.
        samples_per_step: samples of one step, over all processes.
        latent_variable: that of a network that takes one.

    Attributes:
        density: batch -> the density of its training times.
    """

    def __init__(
        self,
        network: nn.Module,
        config: FlowConfig,
        seed: int,
        text_encoder: PreTrainedModel | None = None,
        masking: Masking | None = None,
        *,
        control: ControlImages | None = None,
        samples: int | None = None,
        samples_per_step: int = 1,
        random_numbers: str = "philox",
        latent_variable: LatentVariable | None = None,
    ) -> None:
        super().__init__(
            network,
            seed,
            config.condition_dropout,
            text_encoder,
            masking,
            control=control,
            random_numbers=random_numbers,
        )
        self.config = config
        self.samples, self.samples_per_step = samples, samples_per_step
        self.latent_variable = latent_variable or LatentVariable(
            LatentVariableConfig(), samples, samples_per_step
        )
        self.choices = choices = config.choices()
        self.path, self.coupling = choices.path, choices.coupling
        self.density: Callable[[dict[str, Any]], Density] = lambda batch: choices.density
        if config.time_uniform_from < 1.0:
            if samples is None:
                raise ValueError("time_uniform_from is a share of the run: give the samples of the run")
            self.density = LateUniform(choices.density, config.time_uniform_from * samples)
        self.objective: Callable[..., Tensor] = partial(
            choices.objective,
            path=choices.path,
            prediction=config.prediction,
            direction_weight=config.direction_weight,
        )
        if config.contrastive_weight:
            self.objective = Contrastive(self.objective, config.contrastive_weight)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``loss``; ``per_sample`` (B,), the errors without the samples' weights; and their times ``t`` (B,)."""
        random = self.random(batch)  # a row depends on the seed and its id alone
        density, u = self.density(batch), random.uniform()
        t, drop = density.quantile(u), self.dropped(random)
        x0 = self.noise(batch, random)
        x1 = self.latents(batch, random)  # a sample of the autoencoder's posterior
        condition = self.condition(batch, drop)  # class, caption, sizes, what a mask leaves of the image
        x0 = self.pair(x0, x1, condition, batch)  # the coupling
        sample = self.path.sample(x0, x1, t.to(x1.dtype))
        condition, rate = self.latent_variable.infer(self.network, condition, sample, random)
        output = self.output(sample, condition)
        error = self.error(output, sample, self.weight(t, u, density), batch)
        return self.total(error, rate, batch) | {"per_sample": error.detach(), "t": t}

    def output(self, sample: PathSample, condition: Condition) -> Tensor:
        """Return what the network makes of a sample."""
        found: Tensor = self.network(self.path.scale_input(sample.xt, sample.t), sample.t, condition)
        return found

    def total(self, error: Tensor, rate: Tensor | None, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``loss`` of errors (B,) and of what latent variables tell (B,), if any, whose mean is ``kl``."""
        if rate is None:
            return {"loss": weighted_mean(error, batch)}
        cost = self.latent_variable.cost(rate, batch["sample_ids"])
        return {"loss": weighted_mean(error + cost, batch), "kl": rate.detach().mean()}

    def watch(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Return lines about what the figures of a step say, see `LatentVariable.watch`."""
        done = step * self.samples_per_step
        return self.latent_variable.watch(done, values["kl"]) if "kl" in values else []

    def error(
        self, output: Tensor, sample: PathSample, weight: Tensor | None, batch: dict[str, Any]
    ) -> Tensor:
        """Return the errors (B,) of the network's output; ``weight`` (B,) are factors on them."""
        return self.objective(output, sample, weight=weight)

    def noise(self, batch: dict[str, Any], random: SampleRandom) -> Tensor:
        """Draw x0; that of the batch's pairs where it holds them."""
        return batch["noise"] if "noise" in batch else random.normal(batch["latents"].shape[1:])

    def latents(self, batch: dict[str, Any], random: SampleRandom) -> Tensor:
        """Draw x1, samples of the autoencoder's posterior where it has one."""
        x1: Tensor = batch["latents"]
        return x1 + batch["latents_std"] * random.normal(x1.shape[1:]) if "latents_std" in batch else x1

    def pair(self, x0: Tensor, x1: Tensor, condition: Condition, batch: dict[str, Any]) -> Tensor:
        """Return the source rows that belong to x1, by the coupling; noise of the batch is paired as it is."""
        x0 = self.source(x0, condition)
        if "noise" in batch:
            return x0
        generator = seeded(self.seed, Stream.COUPLING, batch["sample_ids"][0])
        compared = self.compared_by(condition)
        # These are of one kind: they have no class. Empty captions are alike anyway.
        if compared is not None and compared.ndim == 1 and "unlabelled" in batch:
            compared = compared.masked_fill(batch["unlabelled"], -1)
        return self.coupling(x0, x1, compared, generator)

    def compared_by(self, condition: Any) -> Tensor | None:
        """Return what a condition-aware coupling compares rows by: labels (B,), or captions as mean tokens (B, D)."""
        given: Condition = condition
        if given.class_labels is not None or given.text is None:
            return given.class_labels
        text, mask = given.text.detach().float(), given.text_mask
        if mask is None:
            return text.mean(1)
        kept = mask[..., None].to(text)
        return (text * kept).sum(1) / kept.sum(1).clamp_min(1.0)

    def channels(self, condition: Any) -> Tensor | None:
        """Return what a mask leaves of each image, (B, C', h, w); None: no image is masked."""
        found: Tensor | None = condition.channels
        return found

    def source(self, noise: Tensor, condition: Any) -> Tensor:
        """Return where the flow starts: the noise, or with the coupling data-dependent the kept part beside it."""
        channels = self.channels(condition)
        if self.config.coupling != "data-dependent" or channels is None:
            return noise
        kept, known = channels.split([channels.shape[1] - noise.shape[1], noise.shape[1]], 1)
        return masked_source(noise, known, 1.0 - kept.amin(1, keepdim=True))

    def weight(self, t: Tensor, u: Tensor, density: Density) -> Tensor | None:
        """Return factors (B,) on the squared errors at the times t = density.quantile(u); None for the plain loss."""
        if self.choices.weighting is None:
            return None
        return loss_factor(self.choices.weighting, self.path, self.config.prediction, t, density.slope(u))


class Density(Protocol):
    """A density of training times, as `TimeDensity`."""

    def quantile(self, u: Tensor) -> Tensor:
        """Return the times (B,) of uniform numbers u."""

    def slope(self, u: Tensor) -> Tensor:
        """Return dt/du (B,)."""


class LateUniform(nn.Module):
    """A density of the training times that is uniform from some sample of the run on; in validation it never is."""

    def __init__(self, density: TimeDensity, first: float) -> None:
        super().__init__()
        self._density, self._first = density, first

    def forward(self, batch: dict[str, Any]) -> Density:
        """Return the density of the samples of a batch, each by its own id."""
        late = torch.tensor([self.training and number >= self._first for number in batch["sample_ids"]])
        late = sent(late, batch["latents"].device)
        return _Mixed(late, UniformTimes(shift=self._density.shift), self._density)


class _Mixed(NamedTuple):
    late: Tensor  # (B,) bool: the rows whose times are uniform
    uniform: TimeDensity
    usual: TimeDensity

    def quantile(self, u: Tensor) -> Tensor:
        return torch.where(self.late, self.uniform.quantile(u), self.usual.quantile(u))

    def slope(self, u: Tensor) -> Tensor:
        return torch.where(self.late, self.uniform.slope(u), self.usual.slope(u))


class Contrastive(nn.Module):
    """An objective with the contrastive term (Delta-FM); see `flow_matching_loss`.

    Validation has none: its rows are several noises of one image, and no row is another's negative. Nor has one row.
    """

    def __init__(self, objective: Callable[..., Tensor], weight: float) -> None:
        super().__init__()
        self._objective, self._weight = objective, weight

    def forward(self, output: Tensor, sample: PathSample, **options: Any) -> Tensor:
        weight = self._weight if self.training and len(output) > 1 else 0.0
        return self._objective(output, sample, contrastive_weight=weight, **options)


@torch.no_grad()
def validation_loss(
    loss: ConditionedLoss, data: TrainingData, device: torch.device, batch_size: int = 64
) -> float:
    """Return the mean loss over held-out samples at fixed noises and fixed times, conditions in place.

    The training loss is noise from one t to the next; this one moves only when the network does.
    """
    uses = [
        SampleUse(index, index * _VALIDATION_TIMES + k)
        for index in range(len(data))
        for k in range(_VALIDATION_TIMES)
    ]
    total = 0.0
    starts = range(0, len(uses), batch_size)
    for start in progress_bar(starts, desc="validating", delay=3, leave=False):
        for part in by_group(uses[start : start + batch_size], groups_of(data)):
            batch = load_batch(data, part)
            total += float(loss(to_device(batch, device))["per_sample"].double().sum())
    return total / len(uses)


class Masking:
    """Draw a mask for every sample and hide what is under it.

    The mask is a pure function of the seed and the sample's id.

    Args:
        vae: the frozen autoencoder.
        shapes: share of each of ``MASK_SHAPES``; "data" is the image's own mask, where it has one.
        seed: of the run.
        condition: (images, masks) -> what the network is given of them; default: `masked_condition`.
    """

    def __init__(
        self,
        vae: Autoencoder,
        shapes: Mapping[str, float],
        seed: int,
        condition: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check_shapes(shapes, more=[OWN])
        self._vae, self._seed = vae, seed
        self._condition = partial(masked_condition, vae) if condition is None else condition
        self._own = shapes.get(OWN, 0.0) / sum(shapes.values())
        drawn = {name: share for name, share in shapes.items() if name != OWN and share > 0}
        self._shapes = drawn or dict(DEFAULT_SHAPES)

    def __deepcopy__(self, memo: object) -> Masking:
        return self  # a sharded copy of the network shares the autoencoder, which is frozen

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Return `masked_condition` (B, f^2 + C, h, w): which pixels are kept, and the latents with holes in grey.

        The batch holds ``pixels`` (B, 3, H, W) uint8, ``sample_ids``, and perhaps ``masks`` (B, 1, H, W) with
        ``has_mask`` (B,).
        """
        pixels = batch["pixels"]
        self._vae.to(pixels.device)
        generators = [
            np.random.default_rng([self._seed, Stream.MASKS, number]) for number in batch["sample_ids"]
        ]
        own = torch.tensor([rng.uniform() < self._own for rng in generators])
        masks = random_masks(self._shapes, (pixels.shape[2], pixels.shape[3]), generators)
        masks = sent(masks, pixels.device)
        if "masks" in batch:
            rows = sent(own, pixels.device) & batch["has_mask"]
            masks = torch.where(rows[:, None, None, None], (batch["masks"] > 127).to(masks), masks)
        return self._condition(pixels_to_images(pixels), masks)
