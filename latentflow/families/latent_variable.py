"""Flow models with a latent variable, which is drawn once for each image, or inferred from an image to vary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import UserError
from .rows import Rows, check_counts, keep

if TYPE_CHECKING:
    from ..models.latent_variable import Posterior
    from .model import FlowModel, Generators


def require_density(model: FlowModel) -> None:
    """Refuse the density of a model with a latent variable, whose velocity is that under one value of it.

    Raises:
        UserError: it has one.
    """
    if model.latent_variable is not None:
        raise UserError(
            "this checkpoint has a latent variable: the density of an image is the mean over all of its values, and no "
            "velocity leads to it",
            "Classify by errors (--method flow-matching), or give a checkpoint without a latent variable.",
        )


class LatentVariableMixin:
    """The part of a `FlowModel` that has a latent variable z, if its network has one. Its rows keep z (B, Z)."""

    @property
    def latent_variable(self) -> str | None:
        """Subject of z: "image" or "path"; None: there is none."""
        encoder = self._z_encoder
        return None if encoder is None else str(encoder.kind)

    @property
    def _z_encoder(self: Any) -> Any:
        return getattr(self.network, "z_encoder", None)

    @staticmethod
    def no_latent_variable() -> UserError:
        """Return the error that there is none."""
        return UserError(
            "like is given, but this checkpoint has no latent variable that could be one of an image",
            "Train one: latentflow train DATA --latent-variable image; or vary images with LatentFlowImg2ImgPipeline.",
        )

    def with_latent_variable(
        self: Any,
        rows: Rows,
        generator: Generators | None = None,
        like: Tensor | None = None,
        *,
        mean: bool = False,
    ) -> Rows:
        """Return the rows with z: drawn from its prior, or of latents that are varied; as they are without a z.

        Args:
            generator: as of `FlowModel.noise`.
            like: latents (P, C, h, w); row b is of image b * P // B.
            mean: take the mean of what z may be given ``like``.

        Raises:
            UserError: an image is to be varied, and there is no z.
        """
        encoder = self._z_encoder
        if encoder is None:
            if like is not None and not mean:
                raise self.no_latent_variable()
            return rows

        def noise(rows: int, *shape: int, by: Generators | None = generator) -> Tensor:
            made: Tensor = randn_tensor((rows, *shape), generator=by, device=self.device, dtype=torch.float32)
            return made

        if like is None:
            return keep(rows, z=noise(len(rows), encoder.dim))
        check_counts(rows, like)
        x1 = like.repeat_interleave(len(rows) // len(like), 0)
        seen = []
        if encoder.kind == "path":  # from any noise: z is to suit that from which the image will be drawn
            fixed = torch.Generator().manual_seed(0)  # a mean is the same for every row, whatever its company
            x0 = noise(1 if mean else len(x1), *x1.shape[1:], by=fixed if mean else generator).expand_as(x1)
            seen = [x0, x0, x0.new_zeros(len(x0))]
        posterior = self.infer(x1, *seen)
        return keep(rows, z=posterior.mean if mean else posterior.sample(noise(len(rows), encoder.dim)))

    def infer(self: Any, *seen: Tensor) -> Posterior:
        """Return q(z | ...) of what the encoder sees, beginning with latents (B, C, h, w)."""
        from ..models.latent_variable import Posterior  # families without a z need none of our networks

        encoder = self._z_encoder
        place = next(encoder.parameters()).device  # where an offloaded network waits
        place = self.device if place.type == "meta" else place
        return Posterior(*(part.to(self.device) for part in encoder(*(part.to(place) for part in seen))))
