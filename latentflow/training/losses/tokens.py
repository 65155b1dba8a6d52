"""The losses of networks that learn an autoencoder's codes: as tokens, or in the space of their embeddings."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config import TokenConfig
from ...flow import PathSample
from ...flow.discrete import OBJECTIVES, Codebook, MixturePath
from ...flow.discrete.codebook import nearest
from ...models import Condition
from .conditioned import ConditionedLoss, weighted_mean
from .flow import FlowLoss


class TokenLoss(ConditionedLoss):
    """The loss of a network from tokens to logits, and of the text encoder that is trained along.

    Beside what `ConditionedLoss` needs, a batch holds ``latents`` (B, h, w), whole numbers: the tokens of the images.

    Args:
        network: called ``network(xt, t, condition)``, returns logits (B, h, w, V).
        config: what it learns.
        path: of the tokens, ``config.path(V)``.
        seed, condition_dropout, text_encoder, random_numbers: see `ConditionedLoss`.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TokenConfig,
        path: MixturePath,
        seed: int,
        condition_dropout: float = 0.1,
        text_encoder: PreTrainedModel | None = None,
        *,
        random_numbers: str = "philox",
    ) -> None:
        super().__init__(network, seed, condition_dropout, text_encoder, random_numbers=random_numbers)
        self.path, self.weighting = path, config.weighting()
        self.objective = OBJECTIVES[config.token_objective]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return ``loss``; ``per_sample`` (B,), the errors without the samples' weights; and their times ``t`` (B,)."""
        random = self.random(batch)  # a row depends on the seed and its id alone
        t, drop = random.uniform(), self.dropped(random)
        x1 = batch["latents"].long()
        sample = self.path.sample(x1, t, random.uniforms(x1.shape[1:]))
        logits = self.network(sample.xt, t.float(), self.condition(batch, drop))
        weight = None if self.weighting is None else self.weighting(self.path, t)
        error = self.objective(logits, sample, path=self.path, weight=weight)
        return {"loss": weighted_mean(error, batch), "per_sample": error.detach(), "t": t}


class CodeLoss(FlowLoss):
    """The loss of a network that predicts codes: cross-entropy at a point of an ordinary path.

    Purrception, Matisan et al. 2025 (arXiv:2510.01478). ``latents`` of a batch (B, E, h, w) are embeddings of codes.

    Args:
        codes: of the autoencoder.
    """

    def __init__(self, *arguments: Any, codes: Codebook, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("codes", codes.embeddings, persistent=False)  # the autoencoder has them

    def output(self, sample: PathSample, condition: Condition) -> Tensor:
        """Return logits of the codes, (B, V, h, w)."""
        noisy = self.path.scale_input(sample.xt, sample.t)
        logits: Tensor = self.network(noisy, sample.t, condition, all_channels=True)
        return logits

    def error(
        self, output: Tensor, sample: PathSample, weight: Tensor | None, batch: dict[str, Any]
    ) -> Tensor:
        assert isinstance(self.codes, Tensor)
        tokens = nearest(sample.x1, self.codes)
        return F.cross_entropy(output.float(), tokens, reduction="none").flatten(1).mean(1)
