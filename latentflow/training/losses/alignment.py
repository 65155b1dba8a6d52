"""Extras of a `DiT` in training: token routing, and alignment of its features to its own average's or a vision
model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import AlignmentConfig, RoutingConfig
from ...errors import UserError
from ...flow import PathSample
from ...models import Condition, DiT
from ...models.inputs import linear
from ...models.routing import Route
from ...models.vision import load_vision_network
from ..loop.distributed import uncached_autocast
from ..loop.random_numbers import SampleRandom
from .flow import FlowLoss


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


#: (t (B,), blocks) -> (B, N, D): features of the averaged network behind so many blocks, for the batch at other times.
Teacher = Callable[[Tensor, int], Tensor]

# The shares of the blocks behind which features are drawn, and those of the average are taken: blocks 8 and 20 of 28,
# 4 and 8 of 12 in both papers' tables and code.
_EARLY, _LATE = 0.3, 0.7


class Alignment(nn.Module):
    """A projection head that is trained along, and the features that its output should be like.

    Attributes:
        block: number of blocks before the features.
        patch_size: side of a token, in latent pixels.
        weight: factor on the distance in the loss.
        needs_average: `target` calls the teacher.
        needs_pixels: `target` looks at ``pixels`` (B, 3, H, W) uint8 of the batch.
    """

    usual_weight: ClassVar[float]
    needs_average: ClassVar[bool] = False
    needs_pixels: ClassVar[bool] = False

    def __init__(self, config: AlignmentConfig, network: DiT, hidden: int, width: int) -> None:
        super().__init__()
        self.patch_size = network.patch_size
        depth, given = len(network.blocks), config.alignment_block
        self.block = given if given is not None else _blocks(_EARLY, depth)
        if not 1 <= self.block <= depth:
            raise UserError(f"--alignment-block {self.block} of {depth} blocks", f"Use 1 to {depth}.")
        self.weight = self.usual_weight if config.alignment_weight is None else config.alignment_weight
        own = network.x_embedder.proj.out_channels
        self.head = _mlp(own, *[2 * own] * hidden, width)

    def target(
        self,
        batch: Mapping[str, Any],
        t: Tensor,
        grid: tuple[int, int],
        random: SampleRandom,
        teacher: Teacher,
    ) -> Tensor:
        """Return features (B, N, F), without gradient, for the batch at t (B,); its tokens are a ``grid`` (h, w)."""
        raise NotImplementedError

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """Return the distance (B, N) of features (B, N, F), token by token."""
        raise NotImplementedError

    def forward(self, features: Tensor, target: Tensor, route: Route | None) -> Tensor:
        """Return the distances (B,) from ``target`` of features (B, N or K, D) of tokens that pass on a ``route``."""
        if route is not None and route.spares(self.block):
            target = route.of(target)
        return self.distance(self.head(features).float(), target.float()).mean(dim=1)


class SelfAlignment(Alignment):
    """SRA: Jiang et al. 2025 (arXiv:2505.02831), eq. 5, with the settings of its experiments.

    Features of an early block at time t are to become, through a head, those that the weight average has behind a
    later block for the same noise and data nearer to the data, at t + U(0, 0.2). As the paper's code has it, the
    distance is a smooth L1 that turns straight at 0.05.
    """

    usual_weight = 0.2
    needs_average = True
    _FURTHER = 0.2
    _TURN = 0.05

    def __init__(self, config: AlignmentConfig, network: DiT) -> None:
        super().__init__(config, network, 1, network.x_embedder.proj.out_channels)
        self._late = max(self.block, _blocks(_LATE, len(network.blocks)))

    def target(
        self,
        batch: Mapping[str, Any],
        t: Tensor,
        grid: tuple[int, int],
        random: SampleRandom,
        teacher: Teacher,
    ) -> Tensor:
        return teacher((t + self._FURTHER * random.uniform()).clamp(max=1.0), self._late)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(projected, target, beta=self._TURN, reduction="none").mean(dim=2)


class EncoderAlignment(Alignment):
    """REPA: Yu et al. 2024 (arXiv:2410.06940), eq. 8: the cosine to a vision model's features of the clean image.

    The paper's loss is minus the cosine; this is 1 minus it.
    """

    usual_weight = 0.5
    needs_pixels = True

    def __init__(self, config: AlignmentConfig, network: DiT) -> None:
        assert config.alignment_encoder is not None
        self._encoder = load_vision_network(config.alignment_encoder)
        super().__init__(config, network, 2, self._encoder.width)

    def target(
        self,
        batch: Mapping[str, Any],
        t: Tensor,
        grid: tuple[int, int],
        random: SampleRandom,
        teacher: Teacher,
    ) -> Tensor:
        if "features" in batch:  # found before
            return batch["features"]  # type: ignore[no-any-return]
        return self._encoder.patches(batch["pixels"].float() / 255, grid)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        return 1.0 - torch.cosine_similarity(projected, target, dim=2)


ALIGNMENTS: dict[str, Callable[[AlignmentConfig, DiT], Alignment]] = {
    "self": SelfAlignment,
    "encoder": EncoderAlignment,
}


def make_alignment(config: AlignmentConfig, network: nn.Module) -> Alignment | None:
    """Return the alignment that the config names, None if none.

    Raises:
        UserError: the network is no DiT or has no such block, or the encoder cannot be loaded.
    """
    if config.alignment is None:
        return None
    if not isinstance(network, DiT):
        raise UserError(
            f"--alignment {config.alignment} needs the tokens of a DiT, this network is a {type(network).__name__}",
            "Leave it out, or use --network dit.",
        )
    return ALIGNMENTS[config.alignment](config, network)


class AlignedFlowLoss(FlowLoss):
    """`FlowLoss` of a `DiT` some of whose tokens skip blocks, or whose features are aligned, or both.

    The distance of the features is logged as ``alignment``. In validation it is `FlowLoss`.
    """

    def __init__(
        self,
        *arguments: Any,
        routing: Routing | None = None,
        alignment: Alignment | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.routing, self.alignment = routing, alignment
        if alignment is not None:
            self.needs_pixels |= alignment.needs_pixels
            self.learns_from_average = alignment.needs_average

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        random = self.random(batch)
        density, u = self.density(batch), random.uniform()
        t, drop = density.quantile(u), self.dropped(random)
        x0, x1 = self.noise(batch, random), self.latents(batch, random)
        condition = self.condition(batch, drop)
        x0 = self.pair(x0, x1, condition, batch)
        sample = self.path.sample(x0, x1, t.to(x1.dtype))
        condition, rate = self.latent_variable.infer(self.network, condition, sample, random)
        output, distance = self.predict(batch, sample, condition, random)
        error = self.objective(output, sample, weight=self.weight(t, u, density))
        return self.with_distance(error, distance, rate, batch) | {"per_sample": error.detach(), "t": t}

    def predict(
        self,
        batch: dict[str, Any],
        sample: PathSample,
        condition: Condition,
        random: SampleRandom,
        **end: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction at ``sample``, and the distances (B,) of its features from their target, if any."""
        given = self.path.scale_input(sample.xt, sample.t), sample.t, condition
        if not self.training or (self.routing is None and self.alignment is None):
            return self.network(*given, **end), None
        route = None
        if self.routing is not None:
            route = self.routing(sample.xt.shape, random, batch["sample_ids"][0])
        if self.alignment is None:
            return self.network(*given, route=route, **end), None
        side = self.alignment.patch_size
        grid = sample.xt.shape[2] // side, sample.xt.shape[3] // side
        averaged = partial(self.averaged_features, batch, sample, condition)
        target = self.alignment.target(batch, sample.t, grid, random, averaged)
        output, features = self.network(*given, route=route, features=self.alignment.block, **end)
        return output, self.alignment(features, target, route)

    def averaged_features(
        self, batch: dict[str, Any], sample: PathSample, condition: Condition, t: Tensor, blocks: int
    ) -> Tensor:
        """Return features of the averaged network, and text encoder, for the same pairs and conditions at t (B,)."""
        average = nullcontext() if self.average is None else self.average.applied()
        with torch.no_grad(), uncached_autocast(t.device), average:
            kept = {name: getattr(condition, name) for name in ("channels", "control", "layout", "z")}
            averaged = replace(self.prompts(batch, condition.drop), **kept)
            t = t.to(sample.xt.dtype)
            xt = self.path.scale_input(self.path.sample(sample.x0, sample.x1, t).xt, t)
            features: Tensor = self.network(xt, t, averaged, features=blocks, only_features=True).features
            return features

    def with_distance(
        self, error: Tensor, distance: Tensor | None, rate: Tensor | None, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return `total` and, with an alignment, of distances (B,) as well, whose mean is ``alignment``."""
        if distance is None or self.alignment is None:
            return self.total(error, rate, batch)
        total = self.total(error + self.alignment.weight * distance, rate, batch)
        return total | {"alignment": distance.detach().mean()}


def _blocks(share: float, depth: int) -> int:
    return max(1, round(share * depth))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
