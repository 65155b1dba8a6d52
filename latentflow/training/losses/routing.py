"""Token routing: some tokens of a training sample skip the middle blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...errors import UserError
from ...models import DiT
from ...models.routing import Route
from ..loop.data_order import SampleRandom


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Token routing (TREAD, arXiv:2501.04765): cheaper steps; validation and the result never route.

    Raises:
        UserError: a share outside its bounds.
    """

    route_share: float = 0.0
    """Share of the tokens that skips the middle blocks in training (TREAD, dit); 0.5 is usual. 0: none."""
    route_blocks: tuple[int, int] = (1, -1)
    """The blocks that they skip: all but so many at the beginning, up to this one; a negative number counts from the
    end, as in Python. 1 -1: all but the first and the last."""
    route_until: float = 0.9
    """Share of the run after which all tokens take all blocks, to fit the network to how it will be used."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.route_share < 1.0:
            raise UserError(f"route_share {self.route_share}", "Use 0 to below 1; 0.5 is usual.")
        if not 0.0 <= self.route_until <= 1.0:
            raise UserError(f"route_until {self.route_until}", "Use a share of the run, 0 to 1.")


class Routing:
    """Draw the route of a batch; the tokens that skip depend on the seed and the sample's id only.

    Args:
        config: with a share above 0.
        network: whose tokens are routed.
        samples: samples of a whole run, and of one of its steps: they say when routing ends.

    Raises:
        UserError: the network is no DiT, or has no such blocks.
    """

    def __init__(self, config: RoutingConfig, network: nn.Module, samples: tuple[int, int]) -> None:
        if not isinstance(network, DiT):
            raise UserError(
                f"--route-share needs the tokens of a DiT, this network is a {type(network).__name__}",
                "Leave it out, or use --network dit.",
            )
        depth = len(network.blocks)
        first, last = (block + depth if block < 0 else block for block in config.route_blocks)
        if not 0 <= first < last <= depth:
            raise UserError(
                f"--route-blocks {' '.join(map(str, config.route_blocks))} of {depth} blocks leaves none to skip",
                f"Give two numbers with 0 <= first < last <= {depth}; negative ones count from the end.",
            )
        self.first, self.last, self._share = first, last, config.route_share
        self._patch = network.patch_size
        run, step = samples
        self._until = config.route_until * run // step * step

    def __call__(self, shape: tuple[int, ...], random: SampleRandom, sample_id: int) -> Route | None:
        """Draw the route for latents of ``shape`` (B, C, H, W); None when routing is over at this sample."""
        if sample_id >= self._until:
            return None
        tokens = (shape[-2] // self._patch) * (shape[-1] // self._patch)
        kept = max(1, tokens - round(self._share * tokens))
        order = random.normal((tokens,)).argsort(dim=1)
        return Route(order[:, :kept].sort(dim=1).values, self.first, self.last)
