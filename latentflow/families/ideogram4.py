"""Ideogram 4 (Ideogram 2026)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from torch import Tensor

from ..autoencoder import denormalise, normalise
from ..errors import UserError, reason
from ..flow import LogitNormal, Velocity
from .model import Rows, Values
from .pretrained import PretrainedModel
from .training_defaults import documented


class Ideogram4Model(PretrainedModel):
    """Flow model of Ideogram 4. Its rows have embeds (B, L, D) and lengths (B,), the number of tokens at their end.

    Guidance leads away from what a second network predicts without a prompt: that of rows of length 0. Its latents
    are those of FLUX.2's autoencoder with the channels in another order, the cells of a token first.
    """

    opens_whole = True
    #: its images turn grey under it, as diffusers' train_dreambooth_lora_ideogram4.py says
    bears_autocast = False
    sampling_options = ("guidance_schedule", "mu", "std")
    noise_channels_last = True
    documented_training = documented(  # the network itself is never evaluated without a prompt
        "diffusers' train_dreambooth_lora_ideogram4.py", posterior="mode", condition_dropout=0.0
    )

    def training_density(self, height: int, width: int) -> LogitNormal:
        """Return the density of the training times, as in diffusers' train_dreambooth_lora_ideogram4.py.

        The logit of the noise level is normal, with mean ln(h w / 512^2) / 2 and standard deviation 1.5.
        """
        return LogitNormal(mean=-_resolution_aware_mu(height, width, 0.0), std=1.5)

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale; by default that of the first step of ``guidance_schedule``."""
        return float(self.option("guidance_schedule")[0] if scale is None else scale)

    @property
    def usual_guidance(self) -> float:
        return self.guidance(None)

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """Return the velocity; without a scale, on a grid, it follows ``guidance_schedule`` over the steps."""
        schedule = self.option("guidance_schedule")
        if guidance_scale is not None or times is None or schedule is None:
            return super().velocity(rows, guidance_scale, negative, times, interval)
        guided = {
            scale: super(Ideogram4Model, self).velocity(rows, scale, negative, times, interval)
            for scale in set(schedule)
        }
        grid, steps = times.cpu(), len(times) - 1

        def scheduled(x: Tensor, t: Tensor) -> Tensor:
            now = t.double().max().cpu()
            step = min(int((grid <= now + 1e-6).sum()) - 1, steps - 1)
            return guided[schedule[max(step, 0) * len(schedule) // steps]](x, t)

        return scheduled

    def set_timesteps(self, scheduler: Any, steps: int, height: int, width: int) -> Any:
        """Return a copy of a scheduler, whose noise levels are a logit-normal's quantiles."""
        mu = _resolution_aware_mu(height, width, self.option("mu"))
        return self.with_sigmas(
            scheduler, steps, _logit_normal_sigmas(steps, mu, self.option("std")).tolist()
        )

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        """Return what the network takes of the prompts.

        Raises:
            UserError: a prompt is longer than ``max_sequence_length``; the pipeline cuts none off.
        """
        try:
            embeds, _, segments, _ = self.pipeline.encode_prompt(
                prompts, grid_h=0, grid_w=0, device=self.device, **options
            )
        except ValueError as error:
            if "max_sequence_length" not in str(error):
                raise
            raise UserError(f"the {reason(error)}", "Give a shorter prompt.") from error
        return {"embeds": embeds, "lengths": (segments == 1).sum(1)}

    def null(self, n: int) -> Rows:
        """Return ``n`` rows without a prompt."""
        embeds = torch.zeros(n, 1, self.network.config.llm_features_dim, device=self.device)
        return Rows(self, {"embeds": embeds, "lengths": torch.zeros(n, dtype=torch.long, device=self.device)})

    def posterior(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the mean of the latents of images (B, 3, H, W) in [-1, 1]; their deviation is not needed."""
        return self._reordered(super().posterior(images)[0], cells_first=True), None

    def decode(self, x1: Tensor) -> Tensor:
        return super().decode(self._reordered(x1.float(), cells_first=False))

    def _reordered(self, latents: Tensor, cells_first: bool) -> Tensor:
        """Bring the channels of raw latents into another order: the autoencoder's statistics stay where they are."""
        with self.steady_vae() as vae:
            raw = F.pixel_unshuffle(denormalise(vae, latents), 2)
            parts = (-1, 4) if cells_first else (4, -1)
            return normalise(vae, F.pixel_shuffle(raw.unflatten(1, parts).transpose(1, 2).flatten(1, 2), 2))

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate one network under prompts, the other without; see `FlowModel.predict`."""
        embeds, lengths = condition["embeds"], condition["lengths"]
        output, prompted, before = torch.empty_like(x), lengths > 0, embeds.shape[1]
        for network, rows, longest in (
            (self.network, prompted, before),
            (self.pipeline.unconditional_transformer, ~prompted, 0),
        ):
            if rows.any():
                output[rows] = self._predicted(
                    network, x[rows], t[rows], embeds[rows, :longest], lengths[rows]
                )
        return output

    def _predicted(self, network: Any, x: Tensor, t: Tensor, embeds: Tensor, lengths: Tensor) -> Tensor:
        tokens, before = x.flatten(2).transpose(1, 2), embeds.shape[1]
        position_ids, segment_ids, indicator = self.pipeline._prepare_ids(
            lengths.tolist(), *x.shape[2:], before, x.device
        )
        predicted: Tensor = network(
            hidden_states=F.pad(tokens, (0, 0, before, 0)),
            timestep=t.to(x.dtype),
            encoder_hidden_states=F.pad(embeds, (0, 0, 0, tokens.shape[1])),
            position_ids=position_ids,
            segment_ids=segment_ids,
            indicator=indicator,
            return_dict=False,
        )[0]
        return predicted[:, before:].transpose(1, 2).reshape(x.shape)
