"""latentflow's own checkpoints of an autoencoder's codes.

Of tokens: a ``TokenDiT``, which jumps from token to token and has no velocity. Of codes in the space of their
embeddings: a ``DiT`` whose channels are logits of the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from .. import flow
from ..autoencoder import codebook, detokenize, filled, tokenize
from ..errors import UserError
from ..flow.discrete import Codebook, Posterior, guide_batched
from ..flow.discrete.table import mixture_path
from ..flow.tensors import uniform_like
from ..models import settings_of
from ..utils.files import MEND, check_types
from .few_steps import require_velocity
from .latentflow import LatentFlowModel
from .model import Generators, Rows
from .sizes import check_size

#: guidance scale where nobody asks for one: on log-probabilities, which it sharpens, less is needed than on velocities
TOKEN_GUIDANCE = 2.0


class TokenModel(LatentFlowModel):
    """The flow model of checkpoints of tokens: latents are tokens (B, h, w) int64 of the autoencoder's codebook.

    Attributes:
        token_path: the path of its tokens.

    Raises:
        UserError: the pipeline's settings are none, or do not fit the network.
    """

    has_velocity, draws_tokens = False, True
    jump_settings = "temperature", "corrector"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        settings = pipeline.config["token_path"]
        if not isinstance(settings, Mapping) or {*settings} != {"source", "kappa", "kappa_options"}:
            raise UserError(f"token_path is {settings}", f"Expected: source, kappa and kappa_options. {MEND}")
        check_types("token_path", settings, {"source": str, "kappa": str, "kappa_options": dict[str, Any]})
        vocabulary = self.setting("vocabulary", 2)  # without a network it says nothing
        self.token_path = mixture_path(vocabulary, **settings)
        if self.token_path.states > (self.setting("states") or vocabulary + 1):
            raise UserError(
                f"the source of the tokens is '{settings['source']}', and the network knows no mask", MEND
            )

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting of the network or its transformer, or ``default`` where it has none or is not loaded."""
        return default if self.network is None else settings_of(self.network).get(name, default)

    # ---------------------------------------------------------------- images and tokens

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens (B, h, w) of images, and None; see `FlowModel.encode`."""
        with self.steady_vae() as vae:
            return tokenize(vae, images), None

    def known_tokens(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return the tokens (B, h, w) of images whose holes are filled from the nearest kept pixel.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            masks: (B, 1, H, W) in {0, 1}; what is under 1 has no influence.
        """
        return self.encode(filled(images, masks))

    def decode(self, x1: Tensor) -> Tensor:
        """Tokens (B, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1].

        Raises:
            UserError: there are masks among them, or other numbers that are no tokens; no autoencoder is loaded.
        """
        with self.steady_vae() as vae:
            return detokenize(vae, x1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return (h, w) of the tokens of an image of this size in pixels."""
        factor = self.pipeline.vae_scale_factor
        return height // factor, width // factor

    def noise(self, n: int, height: int, width: int, generator: Generators | None = None) -> Tensor:
        """Return the tokens to start from, (n, h, w) int64; see `FlowModel.noise`."""
        check_size(height, width, self.size_multiple)
        like = torch.empty(n, *self.latent_shape(height, width), device=self.device)
        return self.token_path.start(uniform_like(like, generator, 1)[0])

    def mixed(self, x0: Tensor, x1: Tensor, t: Tensor, generator: Generators | None = None) -> Tensor:
        """Return tokens (B, h, w) at time t of the path: those of the data x1 with probability kappa(t), else of x0."""
        return torch.where(uniform_like(x0, generator, 1)[0] < float(self.token_path.progress(t)), x1, x0)

    # ---------------------------------------------------------------- from noise to data

    @property
    def usual_solver(self) -> str:
        """The sampler that draws where none is named, a key of ``latentflow.flow.discrete.SAMPLERS``."""
        return "exact"

    def usual_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return even times: how many tokens become known by each of them is kappa's to say."""
        return self.time_grid(steps, height, width)

    def guidance(self, scale: float | None) -> float:
        return super().guidance(TOKEN_GUIDANCE if scale is None and self._usual_guidance is None else scale)

    def logits(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Posterior:
        """Return (x, t) -> logits (B, h, w, V) of the data, which ``latentflow.flow.discrete.simulate`` follows.

        Args:
            rows, guidance_scale, negative, interval: see `FlowModel.velocity`.

        Raises:
            UserError: the numbers of rows and negative rows differ.
        """
        scale, alone = self.guidance(guidance_scale), self._logits(rows)
        both = None if scale == 1.0 else self.beside_negative(rows, negative)
        return alone if both is None else guide_batched(self._logits(both), alone, scale, interval)

    def _logits(self, rows: Rows) -> Posterior:
        condition = self.prepare(rows)

        def posterior(x: Tensor, t: Tensor) -> Tensor:
            each = t.to(x.device, torch.float32).expand(len(x))
            return self.predict(x, each, condition, None, 1.0)

        return posterior

    def velocity(self, *arguments: Any, **options: Any) -> flow.Velocity:
        """Refuse: there is none.

        Raises:
            UserError: always; says what the checkpoint can do.
        """
        require_velocity(self)
        raise AssertionError


class CodeModel(LatentFlowModel):
    """The flow model of checkpoints whose network predicts codes: Purrception, Matisan et al. 2025 (arXiv:2510.01478).

    Latents are embeddings of the autoencoder's codes, on an ordinary path. The mean embedding under the network's
    posterior is a prediction of the data, and so a velocity for every solver, guidance, edit and inpainting method.

    Attributes:
        temperature: divides the logits; below 1 likely codes count more.
    """

    jump_settings = ("temperature",)
    network_options: Mapping[str, Any] = {"all_channels": True}
    temperature = 1.0

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.prediction = "data"

    @cached_property
    def codes(self) -> Codebook:
        """The codes of the autoencoder, as latents.

        Raises:
            UserError: no autoencoder is loaded, or it has none.
        """
        with self.steady_vae() as vae:
            return Codebook(codebook(vae))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings (B, E, h, w) of the codes of images, and None; see `FlowModel.encode`."""
        with self.steady_vae() as vae:
            return self.codes.embed(tokenize(vae, images)), None

    def at_temperature(self, temperature: float) -> Self:
        """Return the model with another temperature."""
        model = copy.copy(self)
        model.temperature = temperature
        return model

    def logits(self, rows: Rows) -> flow.Velocity:
        """Return (x, t) -> logits (B, h, w, V) of the codes, without guidance, for x on the model's own path."""
        condition = self.prepare(rows)

        def posterior(x: Tensor, t: Tensor) -> Tensor:
            each = t.to(x.device, torch.float32).expand(len(x))
            return self._logits(self.path.scale_input(x, t).to(self.dtype), each, condition, None, 1.0)

        return posterior

    def predict(
        self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Return the mean embedding of the codes, float32 or better; see `FlowModel.predict`."""
        return self.codes.mean(self._logits(x, t, condition, end, guidance_scale), self.temperature)

    def _logits(self, *arguments: Any) -> Tensor:
        """Return what the network predicts of the arguments of `predict`, (B, h, w, V)."""
        return super().predict(*arguments).movedim(1, -1)
