"""Settings of a latent variable of the velocity network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class LatentVariableConfig:
    """A latent variable: several answers at one point, and variations of an image (docs/guide/train.md).

    Raises:
        UserError: a setting is out of bounds.
    """

    latent_variable: Literal["image", "path"] | None = None
    """Give the network a latent variable, and train its encoder along. image: a code of the image (Latent-CFM,
    arXiv:2505.04486), by which `generate --like IMAGE` draws variations. path: one of noise, image and time
    (variational rectified flow, arXiv:2502.09616), for straighter paths. Default: as --init-from has it, else none."""
    latent_variable_dim: int | None = None
    """Numbers in the latent variable. Default: 16."""
    latent_variable_beta: float = 1e-3
    """Weight of its KL divergence from a standard normal distribution, in nats, beside the mean squared error of an
    element of the latents. Less lets it tell more; but what it tells must be likely under its prior, from which it is
    drawn when images are generated."""
    latent_variable_warmup_steps: int = 500
    """Steps in which that weight rises from 0; none where --init-from has a latent variable, which has learnt under
    it."""

    def __post_init__(self) -> None:
        if self.latent_variable_dim is not None and not 1 <= self.latent_variable_dim <= 4096:
            raise UserError(
                f"--latent-variable-dim is {self.latent_variable_dim}", "Use 1 to 4096; 16 is usual."
            )
        if not 0.0 <= self.latent_variable_beta < math.inf:
            raise UserError(
                f"--latent-variable-beta is {self.latent_variable_beta}",
                "It must be finite, and not negative.",
            )
        if self.latent_variable_warmup_steps < 0:
            raise UserError(
                f"--latent-variable-warmup-steps is {self.latent_variable_warmup_steps}",
                "Use a number of steps, or 0.",
            )

    def network(self, known: tuple[str | None, int | None] = (None, None)) -> dict[str, Any]:
        """Return the network's settings.

        Args:
            known: kind and dimension of the checkpoint's, which cannot change.

        Raises:
            UserError: another kind or dimension is asked for; or settings are given, and there is none.
        """
        kind, dim = self.latent_variable, self.latent_variable_dim
        if kind is None and known[0] is None and self != LatentVariableConfig():
            raise UserError(
                "settings of a latent variable, and neither --latent-variable nor a checkpoint that has one",
                "Add --latent-variable image or path, or leave them out.",
            )
        if known[0] is None:
            return {"latent_variable": kind, "latent_variable_dim": None if kind is None else dim or 16}
        for name, asked, has in (("", kind, known[0]), ("-dim", dim, known[1])):
            if asked not in (None, has):
                raise UserError(
                    f"--latent-variable{name} {asked}, and that of the checkpoint is {has}", "Leave it out."
                )
        if self.latent_variable_warmup_steps not in (0, LatentVariableConfig.latent_variable_warmup_steps):
            raise UserError(
                f"--latent-variable-warmup-steps {self.latent_variable_warmup_steps}, and the checkpoint has a latent "
                "variable, which has learnt under its full weight",
                "Leave it out.",
            )
        return {"latent_variable": known[0], "latent_variable_dim": known[1]}
