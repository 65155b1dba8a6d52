"""Codes of a `VQModel` in training: averages of the latents that take them, and dead ones started again.

The averages are those of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1), the restarts from latents
of the batch those of Jukebox (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1).
"""

from __future__ import annotations

import logging

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from ...autoencoder import codebook_use, count_tokens
from ...flow.discrete.codebook import nearest
from ..loop.data_order import Stream, seeded
from ..loop.distributed import process_state

log = logging.getLogger(__name__)

#: decay of the averages, once it has risen: they are those of a hundred steps
DECAY = 0.99
#: a code with less than this share of an even use is dead
DEAD = 0.03
#: a codebook with a perplexity below this share of its size has collapsed
COLLAPSED = 0.05
_CHECK_EVERY = 200  # steps


class CodebookLoss(nn.Module):
    """The quantisation of latents, and what the codes learn from it at the end of a step.

    Gradients of the codes' latents go to the encoder's as they are (straight through). A step's latents are collected
    sample by sample, so that neither its parts nor a second try nor the number of processes change what is learnt.

    Args:
        embedding: the codebook, which gradients leave alone.
        fixed: count how often codes are used, and leave them as they are (finite scalar quantisation).
        seed: of the latents from which dead codes start again.

    Attributes:
        uses: (V,) moving average of how many latents of a step take a code.
        counts: (V,) the same, but that a code which starts again is given the mean (learned codes only).
        sums: (V, E) moving average of the sum of these latents: a code is ``sums / counts`` (learned codes only).
        steps: that were learnt from.
    """

    uses: Tensor
    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(self, embedding: nn.Embedding, *, fixed: bool, seed: int) -> None:
        super().__init__()
        embedding.requires_grad_(False)
        self._embedding = (embedding,)  # in a tuple: the autoencoder's, and no second name in checkpoints
        self._fixed, self._seed = fixed, seed
        size, width = embedding.num_embeddings, embedding.embedding_dim
        self.register_buffer("uses", torch.zeros(size))
        self.register_buffer("counts", None if fixed else torch.zeros(size))
        self.register_buffer("sums", None if fixed else torch.zeros(size, width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._seen: dict[int, Tensor] = {}  # sample -> its latents (positions, E)
        self._warned = False

    def forward(self, latents: Tensor, sample_ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantise latents (B, E, h, w); return them, and the commitment and the use of the codes (scalars)."""
        latents = latents.float()
        with torch.no_grad():
            weight = self._embedding[0].weight.float()
            tokens = nearest(latents, weight)
            quantised = weight[tokens].movedim(-1, 1)
        if self.training:
            rows = latents.detach().flatten(2).mT
            self._seen |= dict(zip(sample_ids, rows, strict=True))
        uses = self.uses.lerp(self._counted(tokens), 1 - self._decay())
        commitment = (latents - quantised).square().mean()
        return latents + (quantised - latents).detach(), {
            "commitment": commitment,
            **codebook_use(uses, DEAD),
        }

    @torch.no_grad()
    def finish_step(self, skip: Tensor, step: int) -> None:
        """Learn from the latents since the last call; every process must call it.

        Args:
            skip: bool scalar; leave everything as it is.
            step: of the run, 0-based.
        """
        if not self._seen:
            return
        weight = self._embedding[0].weight
        latents = self._collected(weight.device)
        tokens = nearest(latents, weight)
        decay = self._decay()
        taken = self._counted(tokens)
        if not self._fixed:
            counts = self.counts.lerp(taken, 1 - decay)
            sums = self.sums.lerp(torch.zeros_like(self.sums).index_add_(0, tokens, latents), 1 - decay)
            counts, sums = self._restarted(counts, sums, latents, step)
            codes = torch.where(counts[:, None] > 0, sums / counts[:, None], weight)
            weight.copy_(torch.where(skip, weight, codes))
            self.counts.copy_(torch.where(skip, self.counts, counts))
            self.sums.copy_(torch.where(skip, self.sums, sums))
        self.uses.copy_(torch.where(skip, self.uses, self.uses.lerp(taken, 1 - decay)))
        self.steps.add_((~skip).long())
        if (step + 1) % _CHECK_EVERY == 0:
            self._warn(step + 1)

    def _counted(self, tokens: Tensor) -> Tensor:
        return count_tokens(tokens, len(self.uses)).float()

    def _decay(self) -> Tensor:
        """Return the averages' decay in this step: it rises, so that the start does not rule them."""
        return ((1 + self.steps) / (10 + self.steps)).clamp_max(DECAY)

    def _collected(self, device: torch.device) -> Tensor:
        """Return the step's latents (N, E) of all processes, in the order of their samples."""
        ids = sorted(self._seen)
        rows = torch.stack([self._seen[sample_id] for sample_id in ids])  # (B, positions, E)
        self._seen = {}
        if process_state().num_processes > 1:
            order = gather(torch.tensor(ids, device=device)).argsort()
            rows = gather(rows.contiguous())[order]
        return rows.flatten(0, 1)

    def _restarted(self, counts: Tensor, sums: Tensor, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return averages in which dead codes are latents of the batch, each another one, with the mean of the counts.

        Those for which there are not enough latents wait for the next step.
        """
        mean = counts.mean()
        dead = counts < DEAD * mean
        place = dead.cumsum(0) - 1
        order = torch.randperm(len(latents), generator=seeded(self._seed, Stream.CODEBOOK, step)).to(
            place.device
        )
        fresh = latents[order[place.clamp(0, len(latents) - 1)]]
        restart = dead & (place < len(latents))
        return torch.where(restart, mean, counts), torch.where(restart[:, None], mean * fresh, sums)

    def _warn(self, step: int) -> None:
        """Say, once, that the codebook has collapsed."""
        use = {name: float(value) for name, value in codebook_use(self.uses, DEAD).items()}
        size = len(self.uses)
        collapsed = use["perplexity"] < max(COLLAPSED * size, 1.5)
        if collapsed and not self._warned and process_state().is_main_process:
            log.warning(
                "the codebook has collapsed: at step %d %d of its %d codes are used (perplexity %.1f). Begin a run "
                "with a lower --autoencoder-learning-rate, or with fewer codes (%s)",
                *(step, round(use["codebook_used"] * size), size, use["perplexity"]),
                "--fsq-levels" if self._fixed else f"--codebook-size {max(2, size // 4)}",
            )
        self._warned = collapsed
