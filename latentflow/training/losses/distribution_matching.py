"""The losses of distribution matching (`latentflow distill --method distribution-matching`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config import FlowConfig
from ...errors import UserError
from ...flow import CondOT, distribution_matching_target, flow_matching_loss
from ...models import Condition
from ..loop.distributed import uncached_autocast
from ..loop.random_numbers import SampleRandom
from .average_velocity import VelocityTeacher
from .conditioned import weighted_mean
from .flow import FlowLoss

_PATH = CondOT()


@dataclasses.dataclass(frozen=True)
class Generated:
    """The data that the generator made in a step, for the fake network to learn.

    Attributes:
        noise: draws noise of the shape of ``data``, as the flow starts from it.
    """

    data: Tensor
    condition: Condition
    random: SampleRandom
    noise: Callable[[], Tensor]


class GeneratorLoss(FlowLoss):
    """The loss of the generator of DMD2 (Yin et al. 2024, arXiv:2405.14867), without its discriminator.

    It goes to the data in one step from the noise, or from a time of a grid that it has reached by itself before,
    as it is sampled (their "backward simulation", sec. 4.5): a data set is needed for its conditions only. It is
    trained once in so many steps, the fake network (`FakeLoss`) in each (their sec. 4.2).

    Args:
        teacher: the network whose distribution is matched.
        step_counts: numbers of steps in which it is sampled; each is trained as often.
        every: of so many steps it is trained in the last.
    """

    def __init__(
        self,
        network: Any,
        config: FlowConfig,
        seed: int,
        *arguments: Any,
        teacher: VelocityTeacher,
        step_counts: Sequence[int],
        every: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(network, config, seed, *arguments, **options)
        if not network.config.get("interval_conditioning"):
            raise UserError(
                "distribution matching needs a network that takes the end of an interval", "Use a DiT."
            )
        self._teacher, self._counts, self._every = teacher, tuple(step_counts), every
        fake = copy.deepcopy(network)
        self._fake = (fake,)  # in a tuple: it has a loss of its own
        self.generated: Generated | None = None

    @property
    def fake(self) -> nn.Module:
        """The network that knows what the generator makes; at first it knows what the teacher makes."""
        fake: nn.Module = self._fake[0]
        return fake

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``loss``, ``matching``, ``per_sample`` and ``t``; nothing in steps that it sits out."""
        x1, sample_ids = batch["latents"], batch["sample_ids"]
        random = self.random(batch)
        condition = self.condition(batch, self.dropped(random))
        condition = self.latent_variable.prior(self.network, condition, random)

        def noise() -> Tensor:
            return self.source(random.normal(x1.shape[1:]), condition)

        x, r = self._start(noise, condition, random)
        trained = not self.training or (sample_ids[0] // self.samples_per_step + 1) % self._every == 0
        data = self._data(x, r, condition) if trained else self._data_without_graph(x, r, condition)
        self.generated = Generated(data.detach(), condition, random, noise)
        if not trained:
            return {}
        t = self.choices.density.quantile(random.uniform()).to(data.dtype)
        sample = _PATH.sample(noise(), data.detach(), t)
        teacher = self._teacher(sample.xt, t, condition)
        with torch.no_grad(), uncached_autocast(x.device):
            fake = self.fake(sample.xt, t, condition)
        target = distribution_matching_target(data.detach(), sample.xt, t, teacher, fake)
        error = (data.float() - target).square().flatten(1).mean(1) / 2
        loss = weighted_mean(error, batch)
        return {"loss": loss, "matching": loss.detach(), "per_sample": error.detach(), "t": t.detach()}

    def _start(
        self, noise: Callable[[], Tensor], condition: Condition, random: SampleRandom
    ) -> tuple[Tensor, Tensor]:
        """Draw where a step begins, (B, ...) and (B,): in the noise, or later on a grid, reached by the generator."""
        choice = random.uniform()
        counts = torch.tensor(self._counts, device=choice.device)[(choice * len(self._counts)).long()]
        place = (random.uniform() * counts).floor().clamp(max=counts - 1)
        x = noise()
        now = torch.zeros_like(choice)
        for step in range(max(self._counts) - 1):
            fresh = noise()  # drawn in any case: a row's numbers must not depend on its company
            goes = place > step
            if not bool(goes.any()):
                continue
            then = (step + 1) / counts
            data = self._data_without_graph(x, now.to(x.dtype), condition)
            further = _PATH.sample(fresh, data, then.to(x.dtype).clamp(max=1.0)).xt
            x = torch.where(goes.view(-1, 1, 1, 1), further, x)
            now = torch.where(goes, then, now)
        return x, now.to(x.dtype)

    def _data(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        average: Tensor = self.network(x, r, condition, end=torch.ones_like(r))
        return x + (1.0 - r).view(-1, 1, 1, 1) * average

    def _data_without_graph(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad(), uncached_autocast(x.device):
            return self._data(x, r, condition).to(x.dtype)


class FakeLoss(nn.Module):
    """Flow matching of what the generator has just made; called after it in each step."""

    def __init__(self, generator: GeneratorLoss) -> None:
        super().__init__()
        self.network = generator.fake
        self._generator = (generator,)  # in a tuple: not a submodule

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        generated = self._generator[0].generated
        assert generated is not None
        t = generated.random.uniform().to(generated.data.dtype)
        sample = _PATH.sample(generated.noise(), generated.data, t)
        loss = flow_matching_loss(self.network(sample.xt, t, generated.condition), sample).mean()
        return {"loss": loss, "fake": loss.detach()}
