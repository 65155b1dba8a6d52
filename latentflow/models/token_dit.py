"""`TokenDiT`, a transformer from tokens to logits: the posterior network of discrete flows."""

# mypy: disable-error-code=no-any-return

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import ModelMixin  # diffusers' loader looks for this name in this module
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from ..errors import UserError
from ..flow.discrete.paths import check_tokens
from ..utils.components import Checked
from .dit import DiT
from .inputs import Condition, linear


class TokenEmbedding(nn.Embedding):
    """Embeddings (S, E) of tokens, and logits from features: both are calls, so that hooks bring offloaded weights."""

    def forward(self, input: Tensor, logits: int = 0) -> Tensor:
        """Return the embeddings (..., E) of tokens (...); or of features (..., E) so many logits, over sqrt(E)."""
        if not logits:
            return super().forward(input)
        return input @ self.weight[:logits].mT.to(input.dtype) * self.embedding_dim**-0.5


class TokenDiT(Checked, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Posterior network of tokens: their embeddings are the latent of a `DiT`, whose output is read as logits.

    Logits are 0 at first: every token is as likely as any other.

    Args:
        vocabulary: V, tokens of the data.
        states: what a position may hold: V, or V + 1 with masks (`DiscretePath.states`); None = V + 1.
        embedding_width: E, channels of a token's embedding.
        tied: logits are products with the embeddings themselves, over sqrt(E); else a layer of their own.
        transformer: arguments of the `DiT` but its channels, as `dit_config` returns them.

    Raises:
        UserError: the configuration contradicts itself, or names something unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DiTBlock"]
    _group_offload_block_modules: ClassVar[list[str]] = ["dit"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocabulary: int = 1024,
        states: int | None = None,
        embedding_width: int = 64,
        tied: bool = True,
        transformer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        states = vocabulary + 1 if states is None else states
        if vocabulary < 2 or states not in (vocabulary, vocabulary + 1) or embedding_width < 1:
            raise UserError(
                f"{vocabulary} tokens, {states} states and embeddings of {embedding_width} channels",
                "There are at least 2 tokens, as many states or one more (the mask), and at least 1 channel.",
            )
        given = {**(transformer or {})}
        if fixed := {"in_channels", "out_channels"} & given.keys():
            raise UserError(
                f"the transformer of tokens is given {' and '.join(sorted(fixed))}",
                "Leave them out: both are embedding_width.",
            )
        self.embedding = TokenEmbedding(states, embedding_width)
        self.dit = DiT(in_channels=embedding_width, **{"patch_size": 1, **given})
        if self.dit.patch_size != 1:
            raise UserError(
                f"patch_size {self.dit.patch_size} with tokens", "Use 1: each has logits of its own."
            )
        self.head = None if tied else linear(embedding_width, vocabulary)

    def forward(self, x: Tensor, t: Tensor | float, cond: Condition | None = None) -> Tensor:
        """Return the logits of each position's token in the data.

        Args:
            x: (B, h, w) int64, tokens at time ``t``; masks are V.
            t: in [0, 1], 0 = noise, 1 = data; a scalar or (B,).
            cond: None = every row is the learned null.

        Returns:
            (B, h, w, V).

        Raises:
            UserError: x holds no tokens of this network.
            ValueError: shapes that do not fit, or a condition that the network was not built for.
        """
        check_tokens(x, self.embedding.num_embeddings, "x")
        if x.ndim != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}: this network takes tokens (B, h, w)")
        features = self.dit(self.embedding(x).movedim(-1, 1), t, cond).movedim(1, -1)
        if self.head is not None:
            return self.head(features)
        return self.embedding(features, self.config["vocabulary"])


def settings_of(network: Any) -> dict[str, Any]:
    """Return the settings of a network; of a `TokenDiT` those of its transformer beside its own."""
    config = dict(getattr(network, "config", {}))
    return {**(config.get("transformer") or {}), **config}
