"""The flow-matching loss of a pretrained model's network, with the times and weights of its family."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...autoencoder import downscale_factor
from ...config import FlowConfig
from ...families.model import Rows, Values
from ...families.pretrained import PretrainedModel
from ...families.rows import keep
from ...families.text_encoders import text_encoders
from ...flow import PathSample
from ..loop.random_numbers import SampleRandom
from .flow import Density, FlowLoss

# beginnings of the names of a batch's entries that are conditions: of `Rows.values` and of `Rows.kept`
_VALUES, _KEPT = "rows.", "kept rows."
#: entry of a batch in the place of rows, where text encoders learn: B texts
CAPTIONS = "captions"
#: factor on the learning rate of text encoders: 5e-6 beside 1e-4, as in diffusers' train_dreambooth_lora_*.py
TEXT_ENCODER_RATE = 0.05


def in_batch(rows: Rows) -> dict[str, Values]:
    """Return rows as entries of a batch, which has no model: processes that load data hand it over."""
    values = {f"{_VALUES}{name}": value for name, value in rows.values.items()}
    return values | {f"{_KEPT}{name}": value for name, value in rows.kept.items()}


def of_batch(batch: Mapping[str, Any], model: PretrainedModel) -> Rows:
    """Return the rows of a batch, see `in_batch`."""

    def named(start: str) -> dict[str, Values]:
        return {key.removeprefix(start): value for key, value in batch.items() if key.startswith(start)}

    return Rows(model, named(_VALUES), named(_KEPT))


def encoded_captions(texts: list[str], model: PretrainedModel) -> Rows:
    """Return the rows of texts, encoded in the precision of the text encoders, also where the network has a lower one:
    T5 overflows in float16."""
    with torch.autocast(model.device.type, enabled=False):
        return model.encode_prompt(texts)


def encoded_null(model: PretrainedModel) -> Rows:
    """Return the row that guidance leads away from; see `encoded_captions`."""
    with torch.autocast(model.device.type, enabled=False):
        return model.null(1)


class PretrainedLoss(FlowLoss):
    """The loss of a pretrained model's network, and of its text encoders where they learn.

    A batch holds rows of the model, see `in_batch`, in the place of prompts; where text encoders learn, the prompts
    themselves: ``captions``, B texts. It may hold ``masks`` (B, 1, H, W) uint8 and ``has_mask`` (B,) bool: then the
    squared errors where a mask is 0 count ``outside`` times, and those of each image are divided by their mean factor,
    so that a small mask weighs as much as a large one. With ``config.inpainting`` they are holes instead, which
    ``masking`` hides, and errors count everywhere. See `FlowLoss` for the rest.

    Where the config names no density of times and no weighting, those of the family count: see
    `FlowModel.training_density` and `FlowModel.loss_weight`.

    Args:
        model: the flow model; its network is trained, and its text encoders if it ``encodes_with_gradients``.
        config, seed, options: see `FlowLoss`.
        guidance_scale: that a network with such an input is given; default: the family's.
        outside: factor on squared errors outside of masks.

    Attributes:
        rate_factors: beginning of parameters' names -> factor on their learning rate.
    """

    rate_factors: ClassVar[Mapping[str, float]] = {"text_encoders.": TEXT_ENCODER_RATE}

    def __init__(
        self,
        model: PretrainedModel,
        config: FlowConfig,
        seed: int,
        *,
        guidance_scale: float | None = None,
        outside: float = 0.1,
        **options: Any,
    ) -> None:
        scale = model.training_guidance if guidance_scale is None else guidance_scale
        super().__init__(_Network(model, scale), config, seed, **options)
        self._model, self._outside = [model], outside  # in a list: not a part of the module
        self._loss_weight = model.loss_weight
        learn = model.encodes_with_gradients
        self.text_encoders = nn.ModuleDict(text_encoders(model.pipeline) if learn else {})
        self._null = None if learn else model.null(1)  # None: it changes
        if config.time_density is None and config.weighting is None:
            factor = downscale_factor(model.vae)
            self.density = lambda batch: model.training_density(
                *(side * factor for side in batch["latents"].shape[2:])
            )

    def prompts(self, batch: dict[str, Any], drop: Tensor | None = None) -> Any:
        """Return the rows of a batch; those where ``drop`` (B,), on the CPU, holds are the empty prompt."""
        model = self._model[0]
        rows = encoded_captions(batch[CAPTIONS], model) if CAPTIONS in batch else of_batch(batch, model)
        if drop is None or not drop.any():
            return rows
        places = torch.arange(len(rows)) + len(rows) * drop.cpu()
        null = encoded_null(model) if self._null is None else self._null
        null = replace(null.repeat(len(rows)).to(batch["latents"].device), kept=rows.kept)
        return Rows.cat([rows, null])[places]

    def condition(self, batch: dict[str, Any], drop: Tensor | None = None) -> Any:
        """Return the rows of a batch, with its control images and what a mask leaves of each image where the network
        learns from them."""
        rows = self.prompts(batch, drop)
        if self.control is not None:
            rows = keep(rows, **self.control.values(batch, training=self.training))
        return rows if self.masking is None else self._model[0].with_masked(rows, self.masking(batch))

    def dropped(self, random: SampleRandom) -> Tensor:
        """Draw the rows (B,) bool whose prompt is replaced by the empty one, on the CPU: a GPU is not waited for."""
        return random.uniform("cpu") < (self.config.condition_dropout if self.training else 0.0)

    def compared_by(self, condition: Any) -> Tensor | None:
        """Return None: rows of different models have nothing in common that could be compared."""
        return None

    def weight(self, t: Tensor, u: Tensor, density: Density) -> Tensor | None:
        """Return factors (B,) on the squared errors; None: 1."""
        if self.choices.weighting is None:
            return self._loss_weight(t)
        return super().weight(t, u, density)

    def error(
        self, output: Tensor, sample: PathSample, weight: Tensor | None, batch: dict[str, Any]
    ) -> Tensor:
        """Return the errors (B,) of the network's output, by the batch's masks where it has any."""
        if "masks" in batch and not self.config.inpainting:
            cells = cell_factors(batch["masks"], batch["has_mask"], output.shape[2:], self._outside).sqrt()
            output, sample = output * cells, sample._replace(velocity=sample.velocity * cells)
        return super().error(output, sample, weight, batch)

    def channels(self, condition: Rows) -> Tensor | None:
        found = condition.kept.get("channels")
        assert not isinstance(found, list)
        return found

    def train(self, mode: bool = True) -> Self:
        """Leave network and text encoders in evaluation mode, but for the dropout of adapters: HiDream's network has
        another output in training mode, T5 a dropout of its own, and no other network of diffusers a difference. As in
        diffusers' own training program, no gradient passes HiDream's routed experts then."""
        super().train(mode)
        for part in (self.network, self.text_encoders):
            part.eval()
            for name, inside in part.named_modules():
                if "lora_dropout" in name:
                    inside.train(mode)
        return self

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights that learn: the others are the checkpoint's, and may be quantised."""
        return {name: weight.detach() for name, weight in self._learned().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Restore the weights that learn.

        Raises:
            RuntimeError: the state has others, or others' shapes.
        """
        learned = self._learned()
        if other := sorted(learned.keys() ^ state.keys()):
            raise RuntimeError(f"other weights learn: {', '.join(other[:3])}")
        for name, weight in learned.items():
            weight.copy_(state[name])

    def _learned(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}


def cell_factors(masks: Tensor, has_mask: Tensor, cells: torch.Size, outside: float) -> Tensor:
    """Return factors (B, 1, h, w) on the squared errors of the cells of latents; their mean is 1 for each image.

    Args:
        masks: (B, 1, H, W) uint8, 255 where errors count fully.
        has_mask: (B,) bool; the others count everywhere.
        cells: (h, w).
        outside: factor where the mask is 0.
    """
    inside = F.adaptive_avg_pool2d(masks.float() / 255.0, (cells[0], cells[1]))
    factors = outside + (1.0 - outside) * inside
    factors = torch.where(has_mask.view(-1, 1, 1, 1), factors, 1.0)
    return factors / factors.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)


class _Network(nn.Module):
    """A model's network, called as those of our own are: network(xt, t, rows)."""

    def __init__(self, model: PretrainedModel, guidance_scale: float) -> None:
        super().__init__()
        self.network = model.network
        self._model, self._guidance_scale = model, guidance_scale
        self._dtype = model.dtype  # asked once: it takes milliseconds in a large network

    def forward(self, xt: Tensor, t: Tensor, rows: Rows) -> Tensor:
        x, condition = xt.to(self._dtype), self._model.arrange(rows.to(xt.device, self._dtype))
        # A base in half precision computes as it does when images are drawn; autocast would only add casts.
        plain = x.dtype != torch.float32 or not self._model.bears_autocast
        with torch.autocast(x.device.type, enabled=False) if plain else nullcontext():
            output = self._model.predict(x, t.float(), condition, None, self._guidance_scale)
        return output.float()
