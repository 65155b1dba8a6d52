"""Drawing the features within a `DiT` towards better ones: its own average's, or those of a vision model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import AlignmentConfig
from ...errors import UserError
from ...models import DiT
from ...models.embeddings import linear
from ...models.routing import Route
from ..loop.data_order import SampleRandom
from .vision import VisionEncoder

#: (t (B,), blocks) -> (B, N, D): what the averaged network has behind so many blocks, for the batch at other times.
Teacher = Callable[[Tensor, int], Tensor]

# Behind which share of the blocks features are drawn, and those of the average are taken: blocks 8 and 20 of 28, 4
# and 8 of 12 in both papers' tables and code.
_EARLY, _LATE = 0.3, 0.7


class Alignment(nn.Module):
    """A projection head that is trained along, and what its results shall be like.

    Attributes:
        block: behind how many blocks the features are taken.
        patch_size: side of a token, in latent pixels.
        weight: of the loss.
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
        """(B, N, F), without gradient, for the batch at times t (B,), whose N tokens are a ``grid`` (h, w)."""
        raise NotImplementedError

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """(B, N, F) twice -> (B, N)."""
        raise NotImplementedError

    def forward(self, features: Tensor, target: Tensor, route: Route | None) -> Tensor:
        """(B,): how far the features (B, N or K, D) of tokens, those that pass on a ``route``, are from ``target``."""
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
        self._encoder = VisionEncoder(config.alignment_encoder)
        super().__init__(config, network, 2, self._encoder.width)

    def target(
        self,
        batch: Mapping[str, Any],
        t: Tensor,
        grid: tuple[int, int],
        random: SampleRandom,
        teacher: Teacher,
    ) -> Tensor:
        return self._encoder(batch["pixels"], grid)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        return 1.0 - torch.cosine_similarity(projected, target, dim=2)


ALIGNMENTS: dict[str, Callable[[AlignmentConfig, DiT], Alignment]] = {
    "self": SelfAlignment,
    "encoder": EncoderAlignment,
}


def make_alignment(config: AlignmentConfig, network: nn.Module) -> Alignment | None:
    """The alignment that the config names, None if none.

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


def _blocks(share: float, depth: int) -> int:
    return max(1, round(share * depth))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
