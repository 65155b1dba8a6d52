"""A categorical posterior over the codes of a codebook, followed in the space of its embeddings.

Purrception, Matisan et al. 2025 (arXiv:2510.01478): the network sees x_t = alpha(t) x1 + sigma(t) x0 on an ordinary
``latentflow.flow.Path``, for x1 the embeddings of tokens, and returns logits of the codes. It is trained by
cross-entropy, and the mean embedding under its posterior is a prediction of the data, E[x1 | x_t]: with ``as_velocity``
a velocity on every path, and so for every solver, guidance and inpainting method. On the straight path that is
(mean - x) / (1 - t).

    data = codebook.data_prediction(network, temperature=0.9)
    x = integrate(as_velocity(data, path, "data"), path.start(noise), times, "heun", path=path)
    tokens = codebook.nearest(x)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ..tensors import Velocity, compute_dtype, with_time_rows
from .categorical import Logits, parts
from .objectives import weighted_mean
from .simulate import Posterior, as_logits


def nearest(latents: Tensor, embeddings: Tensor) -> Tensor:
    """Return the numbers (B, ...) int64 of those of ``embeddings`` (V, E) that are nearest to latents (B, E, ...)."""
    rows = latents.movedim(1, -1)
    flat, e = rows.reshape(-1, rows.shape[-1]).float(), embeddings.to(latents.device).float()
    # Around their centre: by products of matrices, distances far from the origin lose the digits that tell codes apart.
    centre = e.mean(0)
    flat, e = flat - centre, e - centre
    found = [torch.cdist(flat[part], e).argmin(1) for part in parts(len(flat), len(e))]
    return torch.cat(found).reshape(rows.shape[:-1])


@dataclass(frozen=True, eq=False)
class Codebook:
    """The embeddings (V, E) of a vocabulary, and what leads from tokens (B, ...) to latents (B, E, ...) and back.

    Raises:
        UserError: fewer than two embeddings, or not (V, E), or not finite.
    """

    embeddings: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) < 2:
            raise UserError(
                f"the codebook has shape {tuple(self.embeddings.shape)}", "Pass (tokens, channels)."
            )
        if not bool(self.embeddings.isfinite().all()):
            raise UserError(
                "the codebook is not all finite",
                "Its tokenizer is damaged, or its training failed: copy its folder again, or train another.",
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens (B, ...): (B, E, ...)."""
        return self.embeddings.to(tokens.device)[tokens].movedim(-1, 1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the token whose embedding is nearest to each of the latents (B, E, ...): (B, ...) int64."""
        if latents.shape[1] != self.embeddings.shape[1]:
            raise UserError(
                f"latents of {latents.shape[1]} channels, but the codebook has {self.embeddings.shape[1]}",
                "They belong to different tokenizers.",
            )
        return nearest(latents, self.embeddings)

    def mean(self, logits: Tensor | Logits, temperature: float = 1.0) -> Tensor:
        """Return the mean embedding under softmax(logits / temperature), (B, ..., V) -> (B, E, ...); differentiable.

        Raises:
            UserError: logits of another vocabulary; temperature is not positive and finite.
        """
        if not (math.isfinite(temperature) and temperature > 0.0):
            raise UserError(
                f"temperature {temperature}", "Use a positive, finite number; 1 is the posterior."
            )
        given = as_logits(logits)
        shape = given.conditional.shape
        self._check(shape[-1])
        count = shape[:-1].numel()
        dtype = compute_dtype(given.conditional)
        e = self.embeddings.to(given.conditional.device, dtype)
        index = torch.arange(count, device=e.device)
        rows = [given.probabilities(index[part], temperature) @ e for part in parts(count, shape[-1])]
        return torch.cat(rows).reshape(*shape[:-1], -1).movedim(-1, 1)

    def data_prediction(self, network: Posterior, temperature: float = 1.0) -> Velocity:
        """Return (x, t) -> the mean embedding under the network's posterior: "data" for ``as_velocity``.

        Args:
            network: (x, t) -> logits (B, ..., V), for x (B, E, ...).
            temperature: divides the logits; below 1 likely codes count more.

        Raises:
            UserError: on a call, as ``mean``.
        """
        follow = with_time_rows(network)  # type: ignore[arg-type]
        return lambda x, t: self.mean(follow(x, t), temperature).to(x.dtype)

    def loss(self, logits: Tensor, tokens: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """-log p(tokens | x_t), averaged over positions: its minimum is the posterior, on every path.

        Args:
            logits: (B, ..., V).
            tokens: (B, ...) those whose embeddings are x1.
            weight: (B,) factors; default: 1.

        Returns:
            (B,), float32 or better.

        Raises:
            UserError: logits of another vocabulary.
            ValueError: shapes do not fit.
        """
        self._check(logits.shape[-1])
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}: "
                "pass logits with the vocabulary as the last dimension"
            )
        wide = logits.to(compute_dtype(logits))
        loss = wide.logsumexp(-1) - wide.gather(-1, tokens[..., None])[..., 0]
        return weighted_mean(loss, torch.ones(()) if weight is None else weight)

    def _check(self, vocabulary: int) -> None:
        if vocabulary != len(self.embeddings):
            raise UserError(
                f"logits over {vocabulary} tokens, but the codebook has {len(self.embeddings)} codes",
                "The network belongs to another tokenizer, or its logits are not in the last dimension.",
            )
