"""Flow models in diffusers' own pipelines: what all of their families have in common.

A family calls its pipeline's own functions (``encode_prompt``, packing, positions, shifts) and copies none of them.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import flow
from ..autoencoder import downscale_factor, latent_channels
from ..errors import UserError, with_article
from ..flow import Velocity
from ..flow.tensors import require_finite
from ..utils.memory import inner_phase, release_memory
from .call_options import check_options, check_prompt_options
from .distilled import Distilled, recognised
from .edit_defaults import EditDefaults
from .model import FlowModel, Generators, Rows, Size, Values
from .rows import keep
from .siblings import text_to_image
from .sizes import check_size
from .text_encoders import TEXT_ENCODERS, absent_encoders_named, embeds_width
from .truncation import report_lost_words, watched_tokenizers


class PretrainedModel(FlowModel):
    """Flow model in one of diffusers' own pipelines; a family is a subclass.

    Numbers of steps, guidance scales and options that nobody gives are the defaults of the pipeline's call.

    Args:
        pipeline: the stock pipeline.
        options: arguments of its call in place of their defaults, such as ``max_sequence_length``.
    """

    #: argument of the pipeline's call that is the guidance scale
    guidance_argument: str = "guidance_scale"
    #: arguments of the pipeline's call that its ``encode_prompt`` takes as well
    prompt_options: tuple[str, ...] = ("max_sequence_length",)
    #: other arguments of the pipeline's call that the family uses
    sampling_options: tuple[str, ...] = ()
    #: prompts are encoded one by one, where those of a batch would change one another
    one_by_one: bool = False
    #: the pipeline opens with all of its parts only, or looks at its network where it encodes prompts
    opens_whole: bool = False
    #: the network follows a plan of the image, which a language model draws of the prompt and rows keep
    follows_plan: bool = False
    #: the network computes right under torch's autocast
    bears_autocast: bool = True
    #: the pipeline draws its noise with the channels last
    noise_channels_last: bool = False
    #: gradients pass from rows of prompts to the text encoders, where those learn
    encodes_with_gradients: bool = False
    #: cells of the latent that make one token of the network, along a side
    patch: int = 1
    #: what rows keep of images, (B, C', h, w) each, in the order in which the network takes them after its latent
    extra: tuple[str, ...] = ()
    #: likewise, after those, where rows keep it: the network draws without as well
    optional_extra: tuple[str, ...] = ()
    #: a fine-tune can give the network what it takes of images, ``extra``
    learns_with_images: bool = False

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(text_to_image(pipeline))
        check_options(self, options)
        self.options = options
        #: hashes of warnings about prompts, each of which is given once
        self.reported: set[int] = set()

    def option(self, name: str) -> Any:
        """Return an argument of the pipeline's call: as given, or its default."""
        if name in self.options:
            return self.options[name]
        return inspect.signature(type(self.pipeline).__call__).parameters[name].default

    # ---------------------------------------------------------------- defaults

    @property
    def usual_steps(self) -> int:
        """Steps where nobody asks for a number: of a step-distilled checkpoint those that it was made for."""
        found = self.distilled
        return found.steps if found and found.certain else int(self.option("num_inference_steps"))

    @property
    def usual_guidance(self) -> float:
        found = self.distilled
        unguided = found and found.certain and not found.guided
        return self.unguided if unguided else self.guidance(self.option(self.guidance_argument))

    @property
    def distilled(self) -> Distilled | None:
        """Steps and guidance that suit a step-distilled checkpoint; None of others, and where nothing says so."""
        return recognised(self.pipeline)

    @property
    def usual_solver(self) -> str | flow.Solver:
        """The solver of the pipeline itself."""
        return "euler"

    @property
    def edit_defaults(self) -> EditDefaults:
        """Settings of an edit where nobody gives any.

        Of networks that take the guidance scale as an input, FlowEdit's for FLUX.1 dev (Kulikov et al. 2024,
        arXiv:2412.08629, appendix): 28 steps, the last 24 taken, which begin at t = 0.05 at 1024 x 1024 pixels;
        guidance 1.5 and 5.5.
        """
        return EditDefaults(28, 0.95, 1.5, 5.5) if self.embeds_guidance else super().edit_defaults

    def describe_guidance(self) -> str:
        if self.guidance(2.0) == self.unguided:
            return "Leave it out: this checkpoint is step-distilled, and draws without guidance."
        if self.embeds_guidance:
            return (
                "Leave it out: the network takes its guidance scale as an input, and has no negative prompts."
            )
        return super().describe_guidance()

    def guidance(self, scale: float | None) -> float:
        return self.usual_guidance if scale is None else scale

    @property
    def native_size(self) -> Size | None:
        """(height, width) in pixels of the images that it was trained on."""
        cells = getattr(self.pipeline, "default_sample_size", None)
        if cells is not None:
            return (cells * self.pipeline.vae_scale_factor,) * 2
        height, width = self.option("height"), self.option("width")
        return None if height is None or width is None else (height, width)

    @property
    def size_multiple(self) -> int:
        return downscale_factor(self.vae) * self.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = downscale_factor(self.vae)
        return latent_channels(self.vae), height // factor, width // factor

    # ---------------------------------------------------------------- training

    def training_density(self, height: int, width: int) -> flow.TimeDensity:
        """Return the density of the training times of images of this size in pixels.

        Uniform times before a fixed shift of the scheduler, as diffusers' own training programs draw them. Of a
        scheduler whose shift depends on the size: logit-normal ones before the shift of this size, as FLUX.1 was
        trained; those programs leave such a shift out.
        """
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return flow.UniformTimes(shift=float(config.get("shift", config.get("flow_shift", 1.0))))
        mu = self.training_mu(PretrainedModel.tokens(self, height, width))
        linear = config.get("time_shift_type") == "linear"
        return flow.LogitNormal(shift=mu if linear else math.exp(mu))

    def training_mu(self, tokens: int) -> float:
        """Return the ``mu`` of the scheduler's shift for so many tokens, from the ends that its config has."""
        return float(PretrainedModel.mu(self, 0, tokens) or 0.0)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a padded prompt that the network sees where no option says otherwise; 512 if nothing says it."""
        known = "max_sequence_length" in inspect.signature(type(self.pipeline).__call__).parameters
        return int((known and self.option("max_sequence_length")) or 512)

    # ---------------------------------------------------------------- conditions

    def encode_prompt(self, prompts: Sequence[str], images: Sequence[Any] = (), **options: Any) -> Rows:
        """Return one row for each prompt.

        Rows have no gradients, whose graph would keep the text encoders in memory, unless `encodes_with_gradients`.

        Args:
            images: for networks that draw from images, see `ReferenceModel`.
            options: those of the pipeline's ``encode_prompt`` that `prompt_options` names.

        Raises:
            UserError: the pipeline lacks an encoder; an option or images that the family does not take.
        """
        return self._encoded(self.embed, prompts, images, options)

    def encode_negative(self, prompts: Sequence[str], images: Sequence[Any] = (), **options: Any) -> Rows:
        """Return one row for each prompt that guidance leads away from: some families encode it otherwise."""
        return self._encoded(self.embed_negative, prompts, images, options)

    def _encoded(
        self,
        embed: Callable[..., dict[str, Values]],
        prompts: Sequence[str],
        images: Sequence[Any],
        options: dict[str, Any],
    ) -> Rows:
        texts = [prompts] if isinstance(prompts, str) else [*prompts]
        for name in options:
            if name not in self.prompt_options:
                raise UserError(
                    f"{name} is given, which the prompts of {type(self.pipeline).__name__} do not take",
                    f"They take {', '.join(self.prompt_options)}."
                    if self.prompt_options
                    else "Leave it out.",
                )
        options = {**{name: self.option(name) for name in self.prompt_options}, **options}
        check_prompt_options(self, options)
        # lists of their own, since some pipelines change them
        parts = [[text] for text in texts] if self.one_by_one else [[*texts]]
        with (
            torch.set_grad_enabled(self.encodes_with_gradients and torch.is_grad_enabled()),
            inner_phase("encode prompts"),
            absent_encoders_named(self.pipeline),
            watched_tokenizers(self.pipeline) as seen,
        ):
            rows = Rows.cat([self.encode_part(embed, part, images, options) for part in parts])
        report_lost_words(self, texts, seen, self.kept_tokens(options))
        for values in rows.values.values():
            for value in values if isinstance(values, list) else [values]:
                if value.is_floating_point():
                    require_finite(
                        value,
                        "what the text encoder makes of the prompts",
                        "In float16 it may overflow: load the checkpoint in bfloat16 (--dtype bfloat16) or float32. "
                        "Else its weights are damaged.",
                    )
        return rows

    def kept_tokens(self, options: dict[str, Any]) -> dict[str, int]:
        """Return name of a tokenizer -> tokens of a text, template included, that are kept after it has made them."""
        return {}

    def drop_text_encoders(self) -> None:
        """Take the text encoders out of the pipeline, so that their memory is free: rows that are encoded are enough.

        What guidance leads away from by default is encoded once more before, and kept.
        """
        if not self.needs_images:  # rows of the others bring it along
            # in the place of the method, which would need an encoder
            vars(self)["null"] = self.null(1).repeat
        for name in self.pipeline.components:
            if name.startswith(TEXT_ENCODERS):
                setattr(self.pipeline, name, None)
        self.pipeline.maybe_free_model_hooks()  # which forgets those that moved them
        release_memory()

    def adopt(self, rows: Rows) -> Rows:
        """Return rows of another model of this class as rows of this one; see `FlowModel.adopt`.

        Raises:
            UserError: their embeddings are of another width than the network takes.
        """
        width, embeds = embeds_width(self.network.config), rows.values.get("embeds")
        if rows.model is not self and width and embeds is not None and embeds[0].shape[-1] != width:
            raise UserError(
                f"rows of another {type(self).__name__} have embeddings of width {embeds[0].shape[-1]}, but this "
                f"network takes {width}",
                "Encode the prompts with this model, or with one that has the same text encoders.",
            )
        return super().adopt(rows)

    def encode_part(
        self,
        embed: Callable[..., dict[str, Values]],
        prompts: list[str],
        images: Sequence[Any],
        options: dict[str, Any],
    ) -> Rows:
        """Return one row for each of the prompts that are encoded together.

        Raises:
            UserError: images are given, but the network draws from prompts alone.
        """
        if images:
            raise UserError(
                f"images are given to {with_article(type(self).__name__)}, whose prompts do not draw from images",
                "Edit the image with another method, such as flowedit: see `latentflow edit --help`."
                if self.image_input == "none"
                else self.describe_condition(),
            )
        return Rows(self, embed(prompts, **options))

    @abstractmethod
    def embed(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        """Return name -> what the network takes of the prompts, one value for each, see `Rows.values`."""

    def embed_negative(self, prompts: list[str], **options: Any) -> dict[str, Values]:
        """Return what the network takes of prompts that guidance leads away from."""
        return self.embed(prompts, **options)

    def null(self, n: int) -> Rows:
        """Return ``n`` rows of the empty negative prompt."""
        return self.encode_negative([""]).repeat(n)

    def _bound(self, rows: Rows, times: Tensor | None, scale: float) -> flow.Velocity:
        velocity = super()._bound(rows, times, scale)

        def evaluated(x: Tensor, t: Tensor) -> Tensor:
            with inner_phase("run the network"):
                return velocity(x, t)

        return evaluated

    def arrange(self, rows: Rows) -> dict[str, Any]:
        """Return the values by their names.

        Raises:
            UserError: the rows lack the images that the network takes.
        """
        if not rows.kept.keys() >= {*self.extra}:
            raise UserError(
                f"the rows have no images, which {type(self).__name__} takes beside its latent",
                "Add them: rows.with_known(images, masks)."
                if self.takes_masks
                else "Add them: rows.with_control(images).",
            )
        extra = [*self.extra, *(name for name in self.optional_extra if name in rows.kept)]
        return {**rows.values, **{name: rows.kept[name] for name in extra}}

    def with_masked(self, rows: Rows, channels: Tensor) -> Rows:
        """Return the rows of masked images, of which ``mask_condition`` has made the channels (B, C', h, w)."""
        return keep(rows, channels=channels)

    def with_extra(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """Return x (B, C, h, w) and, in further channels, what the network takes of images.

        Raises:
            UserError: they are of another size than x.
        """
        names = (*self.extra, *self.optional_extra)
        parts = [condition[name] for name in names if name in condition]
        for part in parts:
            if part.shape[2:] != x.shape[2:]:
                raise UserError(
                    f"latents of {tuple(x.shape[2:])} cells beside images of {tuple(part.shape[2:])}",
                    "Give images of the size that is drawn.",
                )
        return torch.cat([x, *(part.to(x) for part in parts)], 1) if parts else x

    # ---------------------------------------------------------------- from noise to data

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """Return the velocity; see `FlowModel.velocity`.

        Raises:
            UserError: an interval, but the guidance scale is an input of the network.
        """
        embedded = self.embeds_guidance and self.true_guidance(self.guidance(guidance_scale)) == 1.0
        if embedded and interval != (0.0, 1.0):
            raise UserError(
                f"a guidance interval {interval} is given, but the network takes its guidance scale as an input",
                "Leave the interval out: such a network was trained with one scale from noise to data.",
            )
        return super().velocity(rows, guidance_scale, negative, times, interval)

    def noise(self, n: int, height: int, width: int, generator: Generators | None = None) -> Tensor:
        """Return the noise to start from, (n, C, h, w) float32, as the pipeline draws it."""
        if not self.noise_channels_last:
            return super().noise(n, height, width, generator)
        check_size(height, width, self.size_multiple)
        channels, *cells = self.latent_shape(height, width)
        shape = (n, *cells, channels)
        drawn: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        return drawn.movedim(-1, 1)

    def time_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return ``steps`` + 1 times from 0 (noise) to 1 (data), float64: those of the pipeline's own scheduler."""
        steps = self.usual_steps if steps is None else steps
        flow.time_grid(steps)  # refuses what is no number of steps
        scheduler = self.set_timesteps(self.pipeline.scheduler, steps, height, width)
        sigmas: Tensor = scheduler.sigmas.double()
        if steps == 1:  # a shift to a terminal noise level divides 0 by 0
            sigmas = sigmas.nan_to_num(1.0)
        return sigmas if scheduler.config.get("invert_sigmas") else 1.0 - sigmas

    def set_timesteps(self, scheduler: Any, steps: int, height: int, width: int) -> Any:
        """Return a copy of a scheduler, whose timesteps are set as the pipeline's call sets them."""
        mu = self.mu(steps, self.tokens(height, width))
        return self.with_sigmas(scheduler, steps, self.sigmas(steps), **({} if mu is None else {"mu": mu}))

    @staticmethod
    def with_sigmas(scheduler: Any, steps: int, sigmas: list[float] | None, **shifted: float) -> Any:
        """Return a copy of a scheduler, which makes its timesteps of noise levels; a pipeline's own keeps its state."""
        copy = type(scheduler).from_config(scheduler.config)
        retrieve_timesteps(copy, steps, "cpu", sigmas=sigmas, **shifted)
        return copy

    def on_path(self, scheduler: Any, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the time and the state on the straight path of a scheduler's x before a step."""
        return self.scheduler_times(scheduler)[step], x

    @staticmethod
    def scheduler_times(scheduler: Any) -> Tensor:
        """Return the times of a flow scheduler's steps, by its timesteps, which some round to whole numbers."""
        sigmas: Tensor = torch.as_tensor(scheduler.timesteps).double() / scheduler.config.num_train_timesteps
        return sigmas if scheduler.config.get("invert_sigmas") else 1.0 - sigmas

    def scheduler_grid(self, scheduler: Any) -> Tensor | None:
        """Return the grid of a scheduler for networks that see the end of a step; None if it takes a time twice."""
        times = torch.cat([self.scheduler_times(scheduler), torch.ones(1, dtype=torch.float64)])
        return times if bool((times.diff() > 0).all()) else None

    def model_output(self, scheduler: Any, t: Tensor, state: Tensor, velocity: Tensor) -> Tensor:
        """Return what the scheduler's ``step`` takes for a velocity, which belongs to a state on the straight path."""
        return velocity if scheduler.config.get("invert_sigmas") else -velocity

    def tokens(self, height: int, width: int) -> int:
        """Return the number of the network's tokens of an image of this size in pixels."""
        _, rows, columns = self.latent_shape(height, width)
        return (rows // self.patch) * (columns // self.patch)

    def sigmas(self, steps: int) -> list[float] | None:
        """Return the ``steps`` noise levels before any shift; None leaves them to the scheduler."""
        return torch.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, steps: int, tokens: int) -> float | None:
        """Return the scheduler's ``mu``, the logarithm of its shift; None: it has a fixed shift."""
        config = self.pipeline.scheduler.config
        return float(
            calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
        )

    def evaluate(self, *args: Any, **named: Any) -> Any:
        """Call the network."""
        return self.network(*args, **named, return_dict=False)[0]

    @staticmethod
    def apart(x: Tensor, embeds: list[Tensor], evaluate: Callable[[list[int], Tensor], Tensor]) -> Tensor:
        """Return what a network without a mask makes of x: prompts of different lengths are evaluated apart.

        Args:
            embeds: B tensors (L, D).
            evaluate: (numbers of rows of x, their embeds (b, L, D)) -> (b, C, h, w).
        """
        output = torch.empty_like(x)
        for length in {len(row) for row in embeds}:
            rows = [row for row in range(len(x)) if len(embeds[row]) == length]
            found = evaluate(rows, torch.stack([embeds[row] for row in rows]))
            output[rows] = found.to(output.dtype)  # autocast chooses its own
        return output


class FixedShiftModel(PretrainedModel):
    """Family whose noise levels are the scheduler's own, with the shift that its config has."""

    def sigmas(self, steps: int) -> None:
        """Leave the noise levels to the scheduler."""

    def mu(self, steps: int, tokens: int) -> None:
        """Return None: the shift is fixed."""


class PackedModel(PretrainedModel):
    """Family whose network takes 2 x 2 cells of the latent as one token.

    ``pack`` and ``unpack`` call the pipeline's own functions.
    """

    patch = 2

    def pack(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, 4 C)."""
        packed: Tensor = self.pipeline._pack_latents(x, *x.shape)
        return packed

    def unpack(self, tokens: Tensor, like: Tensor) -> Tensor:
        """(B, N, 4 C) -> the shape of ``like`` (B, C, h, w)."""
        factor = self.pipeline.vae_scale_factor
        height, width = like.shape[2] * factor, like.shape[3] * factor
        unpacked: Tensor = self.pipeline._unpack_latents(tokens, height, width, factor)
        return unpacked.reshape(like.shape)

    def token_lengths(self, v: Tensor) -> Tensor:
        """Return the length of each of the network's tokens, spread over the cells of v (B, C, h, w)."""
        lengths = self.pack(v).norm(dim=-1, keepdim=True)
        return self.unpack(lengths.expand(-1, -1, v.shape[1] * self.patch**2), v)
