"""What every latentflow pipeline shares: components, conditions, the guided velocity, sampling, loading."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoder import decode, downscale_factor, encode, in_float32
from ..errors import UserError, lookup, unknown
from ..flow import (
    CONSISTENCY_STEPS,
    COUPLINGS,
    PATHS,
    PREDICTIONS,
    CondOT,
    Solver,
    Velocity,
    as_velocity,
    change_path,
    guide_batched,
    integrate,
    make,
    next_time,
    time_grid,
)
from ..flow import Path as FlowPath
from ..flow.solvers import BY_ROW
from ..models import Condition
from ..utils.memory import require_memory
from . import scheduler as border
from .adapters import AdapterMixin
from .arguments import CALLBACK_TENSORS, output_kind
from .call import RunningCall, Size, StepCallback, count_rows, repeated_to
from .conditioning import ClassLabels, ConditionMixin
from .few_steps import FewSteps
from .loading import CheckpointPipeline, check_components

log = logging.getLogger(__name__)

Generators: TypeAlias = torch.Generator | list[torch.Generator]
#: (step, timestep as diffusers counts it, x) -> x
AfterStep: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
#: called as ``integrate`` is: (velocity, x, times, solver, callback=, progress=, generator=) -> x at times[-1]
Sampler: TypeAlias = Callable[..., Tensor]
#: steps by default, and of a network of average velocities
USUAL_STEPS, FEW_STEPS = 20, 4
#: guidance by default
USUAL_GUIDANCE = 4.0
# Of an image while it is drawn, at least: three channels in float32.
_PIXEL_BYTES = 12
# Times that differ by less are the same time of a grid, reached by different sums.
ROUNDING = 1e-9


class FlowPipeline(ConditionMixin, AdapterMixin, CheckpointPipeline):
    """The common part of the pipelines; not called itself.

    What a checkpoint is conditioned on is read from its network's config: ``text_dim`` set means captions,
    ``num_classes`` classes, neither nothing.

    Args:
        vae: autoencoder between images and latents; the statistics of its latents are in its own config.
        transformer: the velocity network, a ``DiT`` or a ``UNet``.
        text_encoder, tokenizer: for captions; None elsewhere, or where embeddings are passed instead.
        scheduler: None means our own solvers. A diffusers flow scheduler steps in their place, unless a call
            names a ``solver``.
        id2label: class id -> name.
        path: the probability path that the network was trained on, a key of ``latentflow.flow.PATHS``. It is sampled
            on the straight path all the same.
        path_options: settings of that path, such as {"beta_max": 12.0}.
        prediction: what the network predicts: "velocity", "data", "noise" or "score".
        coupling: the coupling that it was trained with, a key of ``latentflow.flow.COUPLINGS``. "data-dependent" means
            that inpainting starts from the known latents, with noise in the hole only (arXiv:2310.03725).
        average: the network predicts average velocities (arXiv:2505.13447): by default it is followed from time to time
            of the grid, one evaluation a step. A solver that is named follows its velocities.
        consistency: those average velocities lead to the data only: between steps noise is added again.
        folded_guidance: the scale of the guidance that was learned along; where it is not 1, none is added.
        step_counts: the numbers of steps, of one evaluation each, that the network was made for, in increasing order;
            by default the last is taken, and another is warned of. Empty: `FEW_STEPS` steps of average velocities, and
            no few-step sampling of other networks.

    Raises:
        UserError: components that do not belong together, or settings that are none.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
    _optional_components: ClassVar[Any] = ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"]
    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny | VQModel,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scheduler: Any | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON makes the ids strings
        path: str = "condot",
        path_options: dict[str, float] | None = None,
        prediction: str = "velocity",
        coupling: str = "independent",
        average: bool = False,
        consistency: bool = False,
        folded_guidance: float = 1.0,
        step_counts: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_components(vae, transformer, text_encoder, tokenizer, id2label)
        components = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        self.register_modules(vae=vae, transformer=transformer, **components)
        few = FewSteps.of(
            {
                "average": average,
                "consistency": consistency,
                "folded_guidance": folded_guidance,
                "step_counts": step_counts,
            }
        )
        # Keys as JSON has them, so that the config is the same before and after saving.
        names = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(
            id2label=names,
            path=path,
            path_options=dict(path_options or {}),
            prediction=prediction,
            coupling=coupling,
            **few.plain(),
        )
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        lookup(COUPLINGS, coupling, "coupling")
        self._prediction = prediction
        #: the probability path that the network was trained on
        self.path: FlowPath = make(PATHS, path, "path", **dict(path_options or {}))
        if average and (prediction != "velocity" or self.path != CondOT()):
            raise UserError(
                f"average velocities with prediction {prediction} on path {path}",
                "They are of velocities on the straight path: prediction velocity, path condot.",
            )
        self._own_few_steps = few
        self._grid: Tensor | None = None  # of the running call, where average velocities are followed
        #: class name -> id
        self.labels: dict[str, int] = {name: int(key) for key, name in (names or {}).items()}
        self.vae_scale_factor = downscale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._guidance_interval = 1.0, (0.0, 1.0)
        self._num_timesteps, self._interrupt = 0, False

    # ---------------------------------------------------------------- the running call

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance does anything: the checkpoint has a condition and the scale is not 1."""
        return self._guidance_scale != 1.0 and (self.takes_text or self.takes_classes)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call ends after this step; a callback sets ``_interrupt``, what is there is decoded."""
        return self._interrupt

    # ---------------------------------------------------------------- what the checkpoint takes

    @property
    def usual_steps(self) -> int:
        """Steps of a call that names neither their number nor a solver."""
        if not self.few_steps or self.scheduler is not None:
            return USUAL_STEPS
        return self.few_steps.step_counts[-1] if self.few_steps.step_counts else FEW_STEPS

    @property
    def usual_guidance(self) -> float:
        """Guidance scale of a call that names none: what is added to that which the checkpoint has learned along."""
        return self._guidance_of(None)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        class_labels: ClassLabels | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            UserError: a size that the autoencoder cannot make (the nearest is named), a condition that is
                missing or that the checkpoint does not take, arguments that exclude each other or do not fit one
                another.
        """
        unit = self._unit
        for what, size in (("height", height), ("width", width)):
            if size <= 0 or size % unit:
                valid = max(1, round(size / unit)) * unit
                raise UserError(f"{what} {size} is not a multiple of {unit}", f"The nearest is {valid}.")
        for name, text, embeds, mask in (
            ("prompt", prompt, prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if text is not None and embeds is not None:
                raise UserError(f"both {name} and {name}_embeds are given", "Pass one of them.")
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                shape = None if embeds is None else tuple(embeds.shape)
                raise UserError(
                    f"{name}_attention_mask has shape {tuple(mask.shape)}, {name}_embeds {shape}",
                    "Pass both as encode_prompt returns them: (B, L) and (B, L, D).",
                )
        self.check_condition(
            prompt if prompt_embeds is None else prompt_embeds,
            negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds,
            class_labels,
        )
        width_of_text = self._network_config("text_dim")
        for name, embeds in (("prompt", prompt_embeds), ("negative_prompt", negative_prompt_embeds)):
            if embeds is not None and embeds.shape[-1] != width_of_text:
                raise UserError(
                    f"{name}_embeds has shape {tuple(embeds.shape)}",
                    f"The network takes (B, L, {width_of_text}).",
                )
        limit = getattr(getattr(self.text_encoder, "config", None), "max_position_embeddings", None)
        if limit is not None and (max_sequence_length or 0) > limit:
            raise UserError(
                f"max_sequence_length is {max_sequence_length}", f"The text encoder takes {limit} tokens."
            )

    @property
    def _unit(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        return int(self.vae_scale_factor * self._network_config("patch_size", 1))

    # ---------------------------------------------------------------- condition and velocity

    def start_call(
        self,
        *,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        guidance_scale: float | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        output_type: str,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
        max_sequence_length: int | None,
        class_labels: ClassLabels | None,
        guidance_interval: tuple[float, float],
        prompt_attention_mask: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        images: int = 1,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> RunningCall:
        """Check how the arguments fit one another and encode the condition, one row per image.

        Args:
            height, width: in pixels, of what is drawn.
            guidance_scale: None is the usual one; see ``_guidance_of``.
            images: how many images the call brings; one prompt serves them all, and one image all prompts.
                Row i * num_images_per_prompt + j is of prompt i and image i.
            original_size, crops_coords_top_left, target_size: what a network that takes sizes is told; by default that
                of an image of this size of which nothing was cut off.
            generator, latents: checked only, where they are one for each row.

        Raises:
            UserError: see ``check_inputs``; numbers of prompts, classes, images and generators that do not fit one
                another; more images than the machine has memory for.
        """
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            class_labels,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
        ids = None if class_labels is None else self.class_ids(class_labels)
        prompts = _number(prompt, prompt_embeds)
        _check_negatives(negative_prompt, negative_prompt_embeds, prompts)
        rows = count_rows(num_images_per_prompt, prompts, None if ids is None else len(ids), images)
        self._require_room(rows, height, width)
        self._check_noise(rows, self.transformer.config.in_channels, height, width, generator, latents)
        self._guidance_scale = self._guidance_of(guidance_scale)
        if guidance_scale not in (None, self._guidance_scale, self.few_steps.folded_guidance):
            told = (guidance_scale, self.few_steps.folded_guidance)
            log.warning("guidance_scale %g is left out: the checkpoint has learned guidance %g along", *told)
        self._guidance_interval = guidance_interval
        self._interrupt = False
        encoded = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_images_per_prompt,
            self._execution_device,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
        ids = None if ids is None else [number for number in ids for _ in range(num_images_per_prompt)]
        embeds, negative_embeds, mask, negative_mask = (repeated_to(value, rows) for value in encoded)
        ids = None if ids is None else ids * (rows // len(ids))
        call = RunningCall(
            self,
            ids,
            embeds,
            negative_embeds,
            mask,
            negative_mask,
            rows,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs or ["latents"],
        )
        size = height, width
        call.sizes = self._sizes_told(
            rows, original_size or size, crops_coords_top_left, target_size or size, size
        )
        return call

    def _require_room(self, rows: int, height: int, width: int) -> None:
        """Refuse more pixels than this machine has memory for."""
        require_memory(f"{rows} images of {width} x {height} pixels", rows * width * height * _PIXEL_BYTES)

    def _guidance_of(self, scale: float | None) -> float:
        """The guidance of a call, which a checkpoint that has learned its guidance along does without."""
        if self.few_steps.folded_guidance != 1.0:
            return 1.0
        return USUAL_GUIDANCE if scale is None else scale

    def velocity(self, positive: Condition | None, negative: Condition | None) -> Velocity:
        """The guided velocity over B rows, float32 whatever the network's precision.

        Each call is one network evaluation: of B rows at guidance 1 and outside the guidance interval, of 2B
        rows inside it. ``negative`` None means no guidance. The scale is read at every call, so that a
        callback can change it.
        """
        guided = positive is not None and negative is not None
        alone = self._under(positive)
        doubled = self._under(Condition.cat(positive, negative)) if positive and negative else alone

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            scale = self._guidance_scale if guided else 1.0
            return guide_batched(doubled, alone, scale, self._guidance_interval)(x, t)

        return velocity

    def _under(self, condition: Condition | None) -> Velocity:
        """The network as a velocity under one condition: its own precision inside, float32 outside.

        Whatever the network's path, its samples are drawn on the straight one, where nothing is singular.
        """
        dtype = self.transformer.dtype
        moved = None if condition is None else condition.to(self._execution_device, dtype)

        def network(x: Tensor, t: Tensor) -> Tensor:
            times = t.to(x.device, torch.float32).expand(x.shape[0])
            # As ``average_as_velocity`` of the running grid.
            end: dict[str, Tensor] = {} if self._grid is None else {"end": next_time(self._grid, times)}
            output: Tensor = self.transformer(self.path.scale_input(x, t).to(dtype), times, moved, **end)
            return output.float()

        straight, trained = CondOT(), as_velocity(network, self.path, self._prediction)
        return trained if self.path == straight else change_path(trained, old=self.path, new=straight)

    # ---------------------------------------------------------------- noise to latents to images

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise to start from, (B, C, height / factor, width / factor), or ``latents`` as they are.

        With a list of generators the noise of image b comes from generator b alone, whatever else is in the batch.

        Raises:
            UserError: the list's length is not the number of images, or ``latents`` have another shape.
        """
        shape = self._check_noise(batch_size, num_channels_latents, height, width, generator, latents)
        if latents is None:
            noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return noise
        return latents.to(device, dtype)

    def _check_noise(
        self,
        rows: int,
        channels: int,
        height: int,
        width: int,
        generator: Generators | None,
        latents: Tensor | None,
    ) -> tuple[int, int, int, int]:
        """The shape of the noise, if the generators and the given ``latents`` fit it."""
        factor = self.vae_scale_factor
        shape = (rows, channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != rows:
            raise UserError(
                f"{len(generator)} generators for {rows} images",
                "Pass one for each image (prompts x num_images_per_prompt), or a single one.",
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents have shape {tuple(latents.shape)}", f"For these inputs it is {shape}.")
        device = self._execution_device.type
        for one in [generator] if isinstance(generator, torch.Generator) else generator or []:
            if one.device.type not in ("cpu", device):
                raise UserError(
                    f"a generator is on {one.device}, the pipeline on {device}",
                    "Make it on the CPU, where the same seed is the same noise everywhere: torch.Generator().",
                )
        return shape

    def prepare_noise(
        self, rows: int, height: int, width: int, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """``prepare_latents`` for this network, in float32."""
        channels, device = self.transformer.config.in_channels, self._execution_device
        return self.prepare_latents(rows, channels, height, width, torch.float32, device, generator, latents)

    def image_size(
        self, height: int | None = None, width: int | None = None, latents: Tensor | None = None
    ) -> tuple[int, int]:
        """Height and width in pixels: as asked for, else of the given latents, else as in training."""
        native = self._network_config("sample_size") if latents is None else tuple(latents.shape[-2:])
        if native is None and (height is None or width is None):
            raise UserError("this checkpoint does not say its size", "Pass height and width.")
        rows, columns = native if isinstance(native, list | tuple) else (native, native)
        height = rows * self.vae_scale_factor if height is None else height
        return height, columns * self.vae_scale_factor if width is None else width

    def _canvas(self, size: Size) -> Size:
        """``size`` in pixels, rounded up to what the autoencoder and the network's patches divide."""
        return -(-size[0] // self._unit) * self._unit, -(-size[1] // self._unit) * self._unit

    def follow(
        self,
        velocity: Velocity,
        x0: Tensor,
        steps: int | None,
        sigmas: list[float] | None,
        solver: str | Solver | None,
        generator: Generators | None,
        after_step: AfterStep,
        *,
        strength: float = 1.0,
        x1: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """From noise to data, by our solvers or by the diffusers scheduler; ends early once interrupted.

        Args:
            velocity: on the straight path.
            x0: noise (B, C, h, w).
            steps, sigmas: the grid, as of a call; steps None = the usual number.
            solver: None = the scheduler where there is one, else average velocities where the network predicts them,
                else our default.
            generator: for solvers that draw noise.
            after_step: sees, and may replace, x after each step.
            strength: the part of the grid, counted from its end, that is followed: from t = 1 - strength on.
            x1: data; the start is the point t x1 + (1 - t) x0 of the path at the time t of the first step. None: x0.
            sampler: in the place of ``integrate``, and of the scheduler; without a solver it takes its own.
        """

        def stepped(i: int, timestep: Tensor, y: Tensor) -> Tensor:
            y = after_step(i, timestep, y)
            if self._interrupt:
                raise Interrupted(y)
            return y

        def start(t: float) -> Tensor:
            return x0 if x1 is None else t * x1 + (1.0 - t) * x0

        leaps = bool(self.few_steps) and self.scheduler is None and solver is None and sampler is None
        if steps is None:
            steps = self.usual_steps if leaps else USUAL_STEPS
        if leaps and self.few_steps.step_counts and steps not in self.few_steps.step_counts:
            made = " or ".join(map(str, self.few_steps.step_counts))
            log.warning("%d steps of a checkpoint that was made for %s", steps, made)
        try:
            if self.scheduler is not None and solver is None and sampler is None:
                border.set_grid(self.scheduler, steps, sigmas, x0.device, strength)
                x = start(border.start_time(self.scheduler))
                return self._follow_scheduler(velocity, x, generator, stepped)
            times = time_grid(steps) if sigmas is None else border.times_from_sigmas(sigmas)
            times = last_part(times, strength)
            x = start(float(times[0]))
            if leaps:
                sampler, solver = integrate, CONSISTENCY_STEPS if self.few_steps.consistency else "euler"
                if self.few_steps.average:
                    self._grid = times[[0, -1]] if self.few_steps.consistency else times
            elif sampler is None:
                # Heun's last evaluation is at t = 1, where a velocity made from predicted data magnifies its errors.
                usual = "exponential-adams" if self._prediction == "data" else "heun"
                sampler, solver = integrate, solver or usual
            if isinstance(solver, str):
                solver = BY_ROW.get(solver, solver)  # a generator alone decides its image
            return self._follow_solver(sampler, velocity, x, times, solver, generator, stepped)
        except Interrupted as interrupted:
            return interrupted.latents
        finally:
            self._grid = None

    def _follow_scheduler(
        self, velocity: Velocity, x: Tensor, generator: Generators | None, after_step: AfterStep
    ) -> Tensor:
        self._num_timesteps = border.remaining_steps(self.scheduler)
        return border.integrate_with_scheduler(
            self.scheduler,
            velocity,
            x,
            callback=lambda i, t, y: after_step(i, border.to_timestep(t), y),
            progress=self.progress_bar,
            generator=generator,
        )

    def _follow_solver(
        self,
        sampler: Sampler,
        velocity: Velocity,
        x: Tensor,
        times: Tensor,
        solver: str | Solver | None,
        generator: Generators | None,
        after_step: AfterStep,
    ) -> Tensor:
        self._num_timesteps = len(times) - 1
        if self._num_timesteps == 0:
            return x
        return sampler(
            velocity,
            x,
            times,
            solver=solver,
            callback=lambda i, reached, y: after_step(i, border.to_timestep(times[i]), y),
            progress=self.progress_bar,
            generator=generator,
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32, the posterior's mean.

        Raises:
            UserError: no autoencoder is loaded.
        """
        with self._steady_vae() as vae:
            return encode(vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1].

        Raises:
            UserError: no autoencoder is loaded.
        """
        with self._steady_vae() as vae:
            return decode(vae, latents)

    @contextmanager
    def _steady_vae(self) -> Iterator[Any]:
        """The autoencoder; one that overflows in float16 (``force_upcast`` in its config) is widened meanwhile."""
        if self.vae is None:
            raise UserError(
                "the pipeline was loaded without its autoencoder",
                "Load it; to draw without one, use output_type='latent'.",
            )
        widen = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast", False))
        with in_float32(self.vae) if widen else nullcontext():
            yield self.vae

    def to_images(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latents as a caller wants to have them: "pil", "np", "pt" or "latent".

        In a callback that asks for "prediction", ``pipe.to_images(tensors["prediction"])`` is a preview: the images
        that the flow is heading for.
        """
        output_kind("output_type", output_type)
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)

    def output_images(self, images: Tensor, output_type: str) -> Any:
        """Images (B, 3, H, W) in [0, 1] as a caller wants to have them: "pil", "np" or "pt"."""
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def finish_call(self, images: Any, return_dict: bool) -> Any:
        """What a call returns."""
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _number(text: str | list[str] | None, embeds: Tensor | None) -> int | None:
    """Return the number of prompts that are given; None = none."""
    if text is None:
        return None if embeds is None else len(embeds)
    return 1 if isinstance(text, str) else len(text)


def _check_negatives(text: str | list[str] | None, embeds: Tensor | None, prompts: int | None) -> None:
    """Refuse numbers of prompts and negative prompts that differ; one text serves all."""
    count = None if isinstance(text, str) else _number(text, embeds)
    if count is not None and count != prompts:
        raise UserError(
            f"{count} negative prompts for {prompts or 0} prompts",
            "Pass one negative prompt for all, or one for each prompt.",
        )


def last_part(times: Tensor, strength: float) -> Tensor:
    """The part of a grid from t = 1 - ``strength`` on, at which it begins exactly; at strength 1 the whole grid."""
    if strength == 1.0:
        return times
    first = times[:1].clamp(min=1.0 - strength)
    return torch.cat([first, times[times > first + ROUNDING]])


class Interrupted(Exception):  # noqa: N818 - no error: the way out of any solver's loop
    def __init__(self, latents: Tensor) -> None:
        super().__init__("interrupted by a callback")
        self.latents = latents
