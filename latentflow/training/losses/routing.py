"""Token routing: some tokens of a training sample skip the middle blocks."""

from __future__ import annotations

from torch import nn

from ...config import RoutingConfig
from ...errors import UserError
from ...models import DiT
from ...models.routing import Route
from ..loop.data_order import SampleRandom


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
