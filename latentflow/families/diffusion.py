"""Diffusion models in diffusers' pipelines: Stable Diffusion 1 and 2, SDXL, PixArt, HunyuanDiT, CogView 3, DiT.

A diffusion model is a flow on another path: x_k = a_k x1 + s_k x0 at timestep k. With t = a / (a + s), the state
x / (a + s) lies on the straight path, and there the velocity is x1 - x0, both of which follow from what the network
predicts. Euler's method on it is DDIM without noise (arXiv:2010.02502), step for step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from .. import flow
from ..autoencoder import downscale_factor
from ..errors import UserError, lookup
from ..flow.tensors import expand_t
from .extra_channels import MaskedModel
from .model import Rows, Size, Values
from .pretrained import PretrainedModel
from .siblings import extra_channels
from .training_defaults import documented


@dataclass(frozen=True)
class TableTimes(flow.TimeDensity):
    """Times of a table (K,), increasing, each with the same probability."""

    times: tuple[float, ...]

    def _quantile(self, u: Tensor) -> Tensor:
        table = torch.tensor(self.times, dtype=torch.float64, device=u.device)
        return table[(u * len(table)).long().clamp(max=len(table) - 1)]

    def _slope(self, u: Tensor, t: Tensor) -> Tensor:
        raise UserError(
            "a weighting is given to a diffusion model, whose times are those of a table",
            "Leave --weighting out.",
        )


class DiffusionModel(PretrainedModel):
    """Flow model in a pipeline whose network predicts noise, data or diffusion's "v", on a table of timesteps.

    Raises:
        UserError: the network takes channels beside its latent that its pipeline does not make.
    """

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        if extra_channels(self.pipeline) > 0 and not self.extra:
            taken, drawn = (self.network.config[name] for name in ("in_channels", "out_channels"))
            raise UserError(
                f"the network takes {taken} channels, {drawn} of them the latent's, which a "
                f"{type(self.pipeline).__name__} does not make",
                "Name its own pipeline class in model_index.json: a network of 9 channels inpaints, one of 8 is of "
                "InstructPix2Pix.",
            )
        embeds_guidance = (
            self.network is not None and self.network.config.get("time_cond_proj_dim") is not None
        )
        if self.has_velocity and embeds_guidance:
            raise UserError(
                "the network takes its guidance scale as an input: it is a latent consistency model",
                "Of Stable Diffusion 1 or 2: name LatentConsistencyModelPipeline and LCMScheduler in its "
                "model_index.json, and it opens. Of SDXL: use it with diffusers itself.",
            )

    @property
    def network(self) -> Any:
        """The network, which some of the pipelines call ``unet``."""
        unet = getattr(self.pipeline, "unet", None)
        return getattr(self.pipeline, "transformer", None) if unet is None else unet

    @property
    def native_size(self) -> Size | None:
        size = self.network.config.sample_size
        rows, columns = size if isinstance(size, list | tuple) else (size, size)
        factor = downscale_factor(self.vae)
        return rows * factor, columns * factor

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """Times on the straight path (K,), increasing, and their timesteps (K,), float64."""
        cumulative = self.pipeline.scheduler.alphas_cumprod.double().cpu()
        data, noise = cumulative.sqrt(), (1.0 - cumulative).sqrt()
        times = data / (data + noise)
        return times.flip(0), torch.arange(len(times), dtype=torch.float64).flip(0)

    def time_of(self, timesteps: Tensor) -> Tensor:
        """Return the times on the straight path of timesteps, which may be between two of the table."""
        times, steps = (part.numpy() for part in self.table)
        return torch.from_numpy(np.interp(timesteps.double().numpy(), steps[::-1], times[::-1]))

    def timestep_of(self, t: Tensor) -> Tensor:
        """Return the timesteps (B,) float32 of times on the straight path (B,)."""
        times, steps = (part.numpy() for part in self.table)
        found = np.interp(t.double().cpu().numpy(), times, steps)
        return torch.from_numpy(found).to(t.device, torch.float32)

    def time_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return ``steps`` + 1 times, float64, from the noisiest of the scheduler's timesteps to 1."""
        steps = self.usual_steps if steps is None else steps
        flow.time_grid(steps)  # refuses what is no number of steps
        scheduler = self.set_timesteps(self.pipeline.scheduler, steps, height, width)
        timesteps = torch.as_tensor(scheduler.timesteps).double().unique().flip(0)  # some take a step twice
        return torch.cat([self.time_of(timesteps), torch.ones(1, dtype=torch.float64)])

    def set_timesteps(self, scheduler: Any, steps: int, height: int, width: int) -> Any:
        copy = type(scheduler).from_config(scheduler.config)
        copy.set_timesteps(steps)
        return copy

    def on_path(self, scheduler: Any, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        timesteps = torch.as_tensor(scheduler.timesteps)[step : step + 1]
        t = self.time_of(timesteps)[0]
        return t, scheduler.scale_model_input(x, timesteps[0]) * self._norm(t).to(x)

    def scheduler_grid(self, scheduler: Any) -> None:
        """Return None: no diffusion network sees the end of a step."""

    def model_output(self, scheduler: Any, t: Tensor, state: Tensor, velocity: Tensor) -> Tensor:
        x0, x1 = state - t.to(state) * velocity, state + (1.0 - t).to(state) * velocity
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            return x0
        return x1 if kind == "sample" else ((t * x0 - (1.0 - t) * x1) / self._norm(t)).to(state)

    def begin(self, noise: Tensor, times: Tensor) -> Tensor:
        """Return the state at the noisiest timestep: there is data in it, and noise alone takes its place."""
        return noise * self._norm(times[0]).to(noise)

    def noise_of(self, state: Tensor, times: Tensor) -> Tensor:
        """Return the noise that takes the place of the state at the noisiest timestep."""
        return state / self._norm(times[0]).to(state)

    def training_density(self, height: int, width: int) -> TableTimes:
        """Return the density of the training times: those of the table, each as often."""
        return TableTimes(tuple(self.table[0].tolist()))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return factors (B,) that make the error of the velocity that of what the network predicts.

        An error e of the velocity is one of t e in the noise, (1 - t) e in the data, and of the root of t^2 + (1 - t)^2
        times e in diffusion's "v".
        """
        kind = self.pipeline.scheduler.config.prediction_type
        if kind == "epsilon":
            return t.square()
        return (1.0 - t).square() if kind == "sample" else self._norm(t).square()

    @staticmethod
    def _norm(t: Tensor) -> Tensor:
        """Return the straight state over the network's at time t: 1 / (a + s), since a^2 + s^2 = 1."""
        return (t.square() + (1.0 - t).square()).sqrt()

    def predict(
        self, x: Tensor, t: Tensor, condition: dict[str, Any], end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        wide, time = x.float(), expand_t(t, x)
        norm = self._norm(time)
        data, noise = time / norm, (1.0 - time) / norm
        state = wide / norm
        output = self.output(state.to(x.dtype), self.timestep_of(t), condition)[:, : x.shape[1]].float()
        kind = self.pipeline.scheduler.config.prediction_type
        if kind == "epsilon":
            x0, x1 = output, (state - noise * output) / data
        elif kind == "sample":
            x0, x1 = (state - data * output) / noise, output
        else:
            x0, x1 = data * output + noise * state, data * state - noise * output
        return x1 - x0

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """Return what the network predicts of x (B, C, h, w) at timesteps (B,); more channels are cut off."""
        raise NotImplementedError


class InpaintableModel(MaskedModel, DiffusionModel):
    """Family whose inpainting pipeline has networks of two kinds: that of the base model, and one of 9 channels.

    Rows of the latter also keep mask (B, 1, h, w) and known (B, 4, h, w).
    """

    @property
    def extra(self) -> tuple[str, ...]:  # type: ignore[override]
        """The mask and the known latents, for a network that was trained to inpaint."""
        trained = extra_channels(self.pipeline) == 5 and hasattr(self.pipeline, "prepare_mask_latents")
        return ("mask", "known") if trained else ()

    def mask_channels(self, masks: Tensor, known: Tensor) -> Tensor:
        """Return the mask at the size of the latent."""
        mask: Tensor = self.pipeline.prepare_mask_latents(
            masks, known, len(masks), *masks.shape[2:], masks.dtype, masks.device, None, False
        )[0]
        return mask


class StableDiffusionModel(InpaintableModel):
    """Flow model of Stable Diffusion 1 and 2, inpainting weights too. Its rows have embeds (B, L, D)."""

    prompt_options: tuple[str, ...] = ("clip_skip",)
    documented_training = documented("diffusers' train_text_to_image_lora.py")

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        if options.get("clip_skip") is not None:
            # diffusers 0.42 looks there for the last norm, which transformers 5 has on the encoder itself.
            vars(self.pipeline.text_encoder).setdefault("text_model", self.pipeline.text_encoder)
        return {"embeds": self.pipeline.encode_prompt(prompts, self.device, 1, False, **options)[0]}

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        predicted: Tensor = self.evaluate(
            self.with_extra(x, condition), timestep, encoder_hidden_states=condition["embeds"]
        )
        return predicted


class StableDiffusionXLModel(InpaintableModel):
    """Flow model of SDXL, inpainting weights too. Its rows have embeds (B, L, D) and pooled (B, D').

    Where the pipeline says so, the empty negative prompt is zeros.

    Raises:
        UserError: the pipeline is SDXL's refiner.
    """

    prompt_options: tuple[str, ...] = ("clip_skip",)
    documented_training = documented("diffusers' train_dreambooth_lora_sdxl.py")

    def __init__(self, pipeline: Any, **options: Any) -> None:
        if pipeline.config.get("requires_aesthetics_score"):
            raise UserError(
                "this is SDXL's refiner, which finishes images that the base model began",
                "Open the base model, or use the refiner with diffusers itself.",
            )
        super().__init__(pipeline, **options)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **options
        )
        return {"embeds": embeds, "pooled": pooled}

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of what the pipeline takes without a negative prompt."""

        def negative(prompts: list[str], **options: Any) -> dict[str, Values]:
            _, embeds, _, pooled = self.pipeline.encode_prompt(prompts, **options)
            return {"embeds": embeds, "pooled": pooled}

        return self._encoded(negative, [""], (), {}).repeat(n)

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        factor = downscale_factor(self.vae)
        size = (x.shape[2] * factor, x.shape[3] * factor)
        pooled = condition["pooled"]
        encoder = getattr(self.pipeline, "text_encoder_2", None)
        width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        given = [size, (0, 0), size]
        if self.takes_masks:  # its pipeline also serves the refiner, by scores
            scores = [self.option(name) for name in ("aesthetic_score", "negative_aesthetic_score")]
            sizes, _ = self.pipeline._get_add_time_ids(*given, *scores, *given, pooled.dtype, width)
        else:
            sizes = self.pipeline._get_add_time_ids(*given, pooled.dtype, width)
        added = {"text_embeds": pooled, "time_ids": sizes.to(x.device).repeat(len(x), 1)}
        predicted: Tensor = self.evaluate(
            self.with_extra(x, condition),
            timestep,
            encoder_hidden_states=condition["embeds"],
            added_cond_kwargs=added,
        )
        return predicted


class PixArtModel(DiffusionModel):
    """Flow model of PixArt-alpha and PixArt-Sigma. Its rows have embeds (B, L, D) and mask (B, L)."""

    prompt_options = ("max_sequence_length", "clean_caption")
    patch = 2
    documented_training = documented("OneTrainer's preset of PixArt-Sigma", lora_rank=16, learning_rate=1e-5)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **options)
        return {"embeds": embeds, "mask": mask}

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.network.config.sample_size == 128 and self.network.use_additional_conditions:
            factor = downscale_factor(self.vae)
            size = torch.tensor([[x.shape[2] * factor, x.shape[3] * factor]], dtype=x.dtype, device=x.device)
            added["resolution"] = size.expand(len(x), 2)
            added["aspect_ratio"] = (size[:, :1] / size[:, 1:]).expand(len(x), 1)
        predicted: Tensor = self.evaluate(
            x,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            timestep=timestep,
            added_cond_kwargs=added,
        )
        return predicted


class HunyuanDiTModel(DiffusionModel):
    """Flow model of HunyuanDiT (Li et al. 2024, arXiv:2405.08748).

    Its rows have embeds (B, L, D) and mask (B, L) of CLIP, and t5 (B, L', D') and t5_mask (B, L') of T5.
    """

    prompt_options = ()
    sampling_options = ("original_size",)
    patch = 2
    documented_training = documented("HunyuanDiT's lora/train_lora.sh", lora_rank=64)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        encode = self.pipeline.encode_prompt
        embeds, _, mask, _ = encode(
            prompts, self.device, do_classifier_free_guidance=False, text_encoder_index=0
        )
        t5, _, t5_mask, _ = encode(
            prompts, self.device, do_classifier_free_guidance=False, text_encoder_index=1
        )
        return {"embeds": embeds, "mask": mask, "t5": t5, "t5_mask": t5_mask}

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        grid = x.shape[2] // self.patch, x.shape[3] // self.patch
        places = get_2d_rotary_pos_embed(
            self.network.inner_dim // self.network.num_heads,
            get_resize_crop_region_for_grid(grid, 512 // 8 // self.patch),
            grid,
            device=x.device,
            output_type="pt",
        )
        factor = downscale_factor(self.vae)
        size = x.shape[2] * factor, x.shape[3] * factor
        sizes = torch.tensor([[*self.option("original_size"), *size, 0, 0]], dtype=x.dtype, device=x.device)
        predicted: Tensor = self.evaluate(
            x,
            timestep.to(x.dtype),
            encoder_hidden_states=condition["embeds"],
            text_embedding_mask=condition["mask"],
            encoder_hidden_states_t5=condition["t5"],
            text_embedding_mask_t5=condition["t5_mask"],
            image_meta_size=sizes.repeat(len(x), 1),
            style=torch.zeros(len(x), dtype=torch.long, device=x.device),
            image_rotary_emb=places,
        )
        return predicted


class CogView3PlusModel(DiffusionModel):
    """Flow model of CogView3-Plus (Zheng et al. 2024, arXiv:2403.05121). Its rows have embeds (B, L, D).

    The empty negative prompt is zeros.
    """

    prompt_options = ("max_sequence_length",)
    patch = 2

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        return {"embeds": self.pipeline.encode_prompt(prompts, None, False, **options)[0]}

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of what the pipeline takes without a negative prompt."""

        def zeros(prompts: list[str], **options: Any) -> dict[str, Values]:
            return {"embeds": self.pipeline.encode_prompt(prompts, None, True, **options)[1]}

        return self._encoded(zeros, [""], (), {}).repeat(n)

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        factor = downscale_factor(self.vae)
        size = torch.tensor([[x.shape[2] * factor, x.shape[3] * factor]], dtype=x.dtype, device=x.device)
        sizes = size.expand(len(x), 2)
        predicted: Tensor = self.evaluate(
            hidden_states=x,
            encoder_hidden_states=condition["embeds"],
            timestep=timestep,
            original_size=sizes,
            target_size=sizes,
            crop_coords=torch.zeros_like(sizes),
        )
        return predicted


class ClassDiTModel(DiffusionModel):
    """Flow model of DiT (Peebles & Xie 2022, arXiv:2212.09748). Its rows have labels (B,).

    Its classes are the names of the pipeline's ``labels``, of which one class may have several.
    """

    prompt_options = ()
    patch = 2
    opens_whole = True  # the null follows its classes

    @property
    def takes_text(self) -> bool:
        return False

    @property
    def takes_classes(self) -> bool:
        return True

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids, the first of each."""
        names: dict[int, str] = {}
        for name, number in self.pipeline.labels.items():
            names.setdefault(number, name)
        return tuple(names.get(number, str(number)) for number in range(self._null))

    @property
    def _null(self) -> int:
        return int(self.network.config.num_embeds_ada_norm)

    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        raise UserError("this checkpoint does not take prompts", "Give classes: model.encode_class([...]).")

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id; one class may have several names."""
        return dict(self.pipeline.labels)

    def class_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Return the ids of class names, ids or a mixture; where a class has no name, its number is one."""
        known = {**{name: number for number, name in enumerate(self.classes)}, **self.labels}
        ids = [lookup(known, label, "class") if isinstance(label, str) else label for label in labels]
        for number in ids:
            if not 0 <= number < self._null:
                raise UserError(f"class id {number} does not exist", f"Ids go from 0 to {self._null - 1}.")
        return ids

    def encode_class(self, labels: Sequence[int | str]) -> Rows:
        return Rows(self, {"labels": torch.tensor(self.class_ids(labels))})

    def null(self, n: int) -> Rows:
        """Return ``n`` rows without a class."""
        return Rows(self, {"labels": torch.full((n,), self._null)})

    def output(self, x: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        predicted: Tensor = self.evaluate(x, timestep=timestep, class_labels=condition["labels"])
        return predicted
