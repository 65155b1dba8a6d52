"""Training a generator by distribution matching (`latentflow distill --method distribution-matching`)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config import FlowConfig
from ...errors import UserError
from ...flow import CondOT, distribution_matching_target, flow_matching_loss
from ...models import Condition
from ..loop.data_order import SampleRandom
from ..loop.distributed import uncached_autocast
from .flow import FlowStage
from .teacher import VelocityTeacher

_PATH = CondOT()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the generator drew in a step, for the fake network to learn."""

    data: Tensor
    condition: Condition
    random: SampleRandom
    source: Any


class GeneratorStage(FlowStage):
    """The generator of DMD2 (Yin et al. 2024, arXiv:2405.14867), without its discriminator.

    It goes to the data in one step from the noise, or from a time of a grid that it has reached by itself before,
    as it is sampled (their "backward simulation", sec. 4.5): a data set is needed for its conditions only. It is
    trained once in so many steps, the fake network (`FakeStage`) in each (their sec. 4.2).

    Args:
        teacher: whose distribution is matched.
        step_counts: numbers of steps in which it is sampled; each is trained as often.
        turns: of steps, in one of which it is trained.
    """

    def __init__(
        self,
        network: Any,
        config: FlowConfig,
        *arguments: Any,
        teacher: VelocityTeacher,
        step_counts: Sequence[int],
        turns: int = 5,
        **more: Any,
    ) -> None:
        super().__init__(network, config, *arguments, **more)
        if not network.config.get("interval_conditioning"):
            raise UserError(
                "distribution matching needs a network that takes the end of an interval", "Use a DiT."
            )
        self._velocities, self._counts = teacher, tuple(step_counts)
        self._turns = turns
        fake = copy.deepcopy(network)
        self._fake = (fake,)  # in a tuple: it has a stage of its own
        self.drawn: Drawn | None = None

    @property
    def fake(self) -> nn.Module:
        """The network that knows what the generator draws; at first it knows what the teacher draws."""
        fake: nn.Module = self._fake[0]
        return fake

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x1, numbers = batch["latents"], batch["numbers"]
        random = SampleRandom(self._seed, numbers, x1.device)
        drop = random.uniform() < (self._config.condition_dropout if self.training else 0.0)
        condition, start = self._told(batch, drop)

        def source() -> Tensor:
            return start(random.normal(x1.shape[1:]))

        x, r = self._simulated(source, condition, random)
        mine = not self.training or self._is_its_turn(numbers)
        data = self._data(x, r, condition) if mine else self._data_without_graph(x, r, condition)
        self.drawn = Drawn(data.detach(), condition, random, source)
        if not mine:
            return {}
        t = self._choices.density.quantile(random.uniform()).to(data.dtype)
        sample = _PATH.sample(source(), data.detach(), t)
        teacher = self._velocities(sample.xt, t, condition)
        with torch.no_grad(), uncached_autocast(x.device):
            fake = self.fake(sample.xt, t, condition)
        target = distribution_matching_target(data.detach(), sample.xt, t, teacher, fake)
        per_sample = (data.float() - target).square().flatten(1).mean(1) / 2
        loss = (per_sample * batch["weights"] if "weights" in batch else per_sample).mean()
        matching = {"matching": loss.detach(), "per_sample": per_sample.detach(), "t": t.detach()}
        return {"loss": loss} | matching

    def _is_its_turn(self, numbers: list[int]) -> bool:
        """The last of so many steps: those in which figures are logged among them."""
        return (numbers[0] // self._samples_per_step + 1) % self._turns == 0

    def _simulated(self, source: Any, condition: Condition, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """(B, ...) and (B,): where a step begins: in the noise, or at a later time of a grid, reached by itself."""
        choice = random.uniform()
        counts = torch.tensor(self._counts, device=choice.device)[(choice * len(self._counts)).long()]
        place = (random.uniform() * counts).floor().clamp(max=counts - 1)
        x = source()
        at = torch.zeros_like(choice)
        for step in range(max(self._counts) - 1):
            noise = source()  # drawn in any case: a row's numbers must not depend on its company
            goes = place > step
            if not bool(goes.any()):
                continue
            ahead = (step + 1) / counts
            data = self._data_without_graph(x, at.to(x.dtype), condition)
            further = _PATH.sample(noise, data, ahead.to(x.dtype).clamp(max=1.0)).xt
            x = torch.where(goes.view(-1, 1, 1, 1), further, x)
            at = torch.where(goes, ahead, at)
        return x, at.to(x.dtype)

    def _data(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        average: Tensor = self.network(x, r, condition, end=torch.ones_like(r))
        return x + (1.0 - r).view(-1, 1, 1, 1) * average

    def _data_without_graph(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad(), uncached_autocast(x.device):
            return self._data(x, r, condition).to(x.dtype)


class FakeStage(nn.Module):
    """Flow matching of what the generator has just drawn; called after it in each step."""

    def __init__(self, generator: GeneratorStage) -> None:
        super().__init__()
        self.network = generator.fake
        self._generator = (generator,)  # in a tuple: not a submodule

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        drawn = self._generator[0].drawn
        assert drawn is not None
        t = drawn.random.uniform().to(drawn.data.dtype)
        sample = _PATH.sample(drawn.source(), drawn.data, t)
        loss = flow_matching_loss(self.network(sample.xt, t, drawn.condition), sample).mean()
        return {"loss": loss, "fake": loss.detach()}
