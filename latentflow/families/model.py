"""The flow model: a velocity network with all that belongs to it, whatever family of checkpoints it comes from.

    model = FlowModel.from_pretrained(folder_or_hub_id)
    rows = model.encode_prompt(["red apple"])
    times = model.usual_grid(20, height, width)
    velocity = model.velocity(rows, times=times)
    noise = model.noise(len(rows), height, width, generator)
    x1 = integrate(velocity, model.begin(noise, times), times, model.usual_solver)
    images = model.decode(x1)

A new family is one subclass of `FlowModel` in a file of its own, and one line in ``FAMILIES``. It says how a prompt
becomes rows (`FlowModel.encode_prompt`) and how its network is evaluated once (`FlowModel.predict`: time, sign and
layout); the rest is overridden where the family differs. Everything here may be differentiated, except that
pretrained text encoders encode without gradients: sample under ``torch.no_grad()``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Self, TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import flow
from ..autoencoder import decode, in_float32, normalised_posterior
from ..errors import UserError
from ..flow import CondOT, Velocity, as_velocity, change_path, guide_batched, next_time
from ..utils.memory import inner_phase
from ..utils.names import as_spelled
from .distilled import Distilled
from .edit_defaults import EditDefaults
from .few_steps import FewSteps
from .image_input import ImageInputMixin
from .latent_variable import LatentVariableMixin
from .opening import OpeningMixin
from .rows import Rows as Rows
from .rows import Values as Values
from .sizes import check_size
from .training_defaults import TrainingDefaults

Generators: TypeAlias = torch.Generator | list[torch.Generator]
#: (height, width), or (top, left), in pixels
Size: TypeAlias = tuple[int, int]
# of velocities: by them diffusers' caches tell one from another
_NUMBERS = itertools.count()


class FlowModel(OpeningMixin, ImageInputMixin, LatentVariableMixin, ABC):
    """A velocity network with its conditioning, latents, path and prediction, guidance, time grid and saving.

    It holds no state beside its pipeline's: where adapters, devices or precisions of that change, it follows.

    Args:
        pipeline: the diffusers pipeline that has the components.
    """

    #: what the network predicts, a member of ``latentflow.flow.PREDICTIONS``
    prediction: str = "velocity"
    #: the path that it was trained on; it is sampled on the straight path all the same
    path: flow.Path = CondOT()
    #: the coupling that it was trained with, a key of ``latentflow.flow.COUPLINGS``
    coupling: str = "independent"
    #: the network takes the guidance scale as an input, and is evaluated under the condition alone
    embeds_guidance: bool = False
    #: the guidance scale that is none
    unguided: float = 1.0
    #: guidance scale that a network with such an input is given while it is trained; 1 is none
    training_guidance: float = 1.0
    #: it has learnt to draw without a condition
    trained_null: bool = True
    #: a consistency model has none, which jumps to the data, nor has a model of tokens
    has_velocity: bool = True
    #: its latents are tokens (B, h, w)
    draws_tokens: bool = False
    #: settings of the draw of tokens that it takes, of temperature and corrector
    jump_settings: tuple[str, ...] = ()

    def __init__(self, pipeline: Any, **family_options: Any) -> None:
        if family_options:
            raise UserError(
                f"{next(iter(family_options))} is an option of a family, and {type(self).__name__} has none",
                "Leave the family options out.",
            )
        self.pipeline = pipeline

    @property
    def takes_text(self) -> bool:
        """True for a network that is conditioned on prompts."""
        return True

    @property
    def takes_classes(self) -> bool:
        """True for a network that is conditioned on a class."""
        return False

    @property
    def takes_sizes(self) -> bool:
        """True for a network that is conditioned on sizes and crops."""
        return False

    @property
    def condition_kind(self) -> Literal["text", "class", "unconditional"]:
        """Condition of the samples as data sets name it; of several, captions."""
        return "text" if self.takes_text else "class" if self.takes_classes else "unconditional"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids, which stand for names that there are not."""
        return ()

    @property
    def labels(self) -> dict[str, int]:
        """Class name -> id."""
        return {}

    @property
    def text_width(self) -> int | None:
        """Width D of embeddings (B, L, D) of prompts that a call may bring; None: it may bring any, or none."""
        return None

    @property
    def longest_text(self) -> int | None:
        """Number of tokens that the text encoder takes at most; None if it does not say."""
        return None

    def describe_condition(self) -> str:
        """Return what the checkpoint takes, as the second half of an error."""
        if self.takes_text:
            return 'It takes a prompt: pipe(prompt="...").'
        return "It takes class_labels." if self.takes_classes else "It takes no condition."

    def describe_guidance(self) -> str:
        """Return how a negative prompt takes effect, as the second half of an error."""
        return "Leave it out, or give a guidance scale above 1."

    def check_condition(
        self, prompt: Any = None, negative_prompt: Any = None, class_labels: Any = None
    ) -> None:
        """Refuse a condition that the checkpoint does not take, or the lack of one (None = not given).

        Raises:
            UserError: says what the checkpoint takes.
        """
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "class_labels": class_labels}
        taken = {"prompt": self.takes_text, "negative_prompt": self.takes_text}
        taken["class_labels"] = self.takes_classes
        for name, value in given.items():
            if value is not None and not taken[name]:
                raise UserError(f"this checkpoint does not take {name}", self.describe_condition())
        needed = [name for name in ("prompt", "class_labels") if taken[name]]
        if needed and all(given[name] is None for name in needed):
            raise UserError(f"{' or '.join(needed)} is missing", self.describe_condition())

    @property
    def native_size(self) -> Size | None:
        """(height, width) in pixels of the images that it was trained on; None if it does not say."""
        return None

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def native_side(self) -> int | None:
        """The longer side of `native_size`."""
        return None if self.native_size is None else max(self.native_size)

    @property
    def trains_text(self) -> bool:
        """True for a network whose text encoder was trained with it, and knows only the words of its captions."""
        return False

    @property
    def few_steps(self) -> FewSteps:
        """Settings of few-step sampling; the default is an ordinary velocity's."""
        return FewSteps()

    @property
    def distilled(self) -> Distilled | None:
        """Steps and guidance that suit a step-distilled checkpoint of a pretrained family; None of others."""
        return None

    @property
    def usual_steps(self) -> int:
        """Steps where nobody asks for a number."""
        return 20

    @property
    def usual_guidance(self) -> float:
        """Guidance scale where nobody asks for one."""
        return 4.0

    @property
    def edit_defaults(self) -> EditDefaults:
        """Settings of an edit where nobody gives any: a little guidance, towards the target alone."""
        return EditDefaults(source_guidance=self.unguided, guidance=self.unguided + 1.0)

    @property
    def usual_solver(self) -> str | flow.Solver:
        """The solver that suits `usual_grid`, as ``latentflow.flow.integrate`` takes it."""
        return "heun"

    # ---------------------------------------------------------------- training

    @property
    def training_defaults(self) -> TrainingDefaults:
        """Settings of a fine-tune where nobody gives any: the usual ones, and what families have `documented`."""
        found = TrainingDefaults.usual(self)
        for family in reversed(type(self).__mro__):
            if change := vars(family).get("documented_training"):
                found = change(found)
        return found

    def training_density(self, height: int, width: int) -> flow.TimeDensity:
        """Return the density of the training times of images of this size in pixels."""
        return flow.LogitNormal()

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Return factors (B,) on the squared errors of the velocity at times t (B,); None: 1."""
        return None

    # ---------------------------------------------------------------- components

    def network_alone(self) -> Self:
        """Return the model without its other components: it computes where its network is."""
        others = {name: None for name, part in self.pipeline.components.items() if part is not self.network}
        dtype = self.dtype  # of another component, the network would be brought to that one's
        return type(self)(self.pipeline.from_pipe(self.pipeline, dtype=dtype, **others))

    @property
    def network(self) -> Any:
        """The velocity network."""
        return self.pipeline.transformer

    @property
    def vae(self) -> Any:
        """The autoencoder, or None."""
        return self.pipeline.vae

    @property
    def device(self) -> torch.device:
        """The device that computes, also where weights are offloaded from it."""
        device: torch.device = self.pipeline._execution_device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's inputs.

        diffusers takes the first floating-point weight, which beside layers in 4 bits may be an adapter's.
        """
        network = self.network
        weights = (
            (name, weight.dtype) for name, weight in network.named_parameters() if weight.is_floating_point()
        )
        first, _ = next(weights, ("", None))
        if not _of_adapters(first):
            return network.dtype  # type: ignore[no-any-return]
        own = [dtype for name, dtype in weights if not _of_adapters(name)]
        lowest: torch.dtype = min(own, key=lambda dtype: dtype.itemsize, default=network.dtype)
        return lowest  # some layers are kept in float32

    # ---------------------------------------------------------------- conditions

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str], **options: Any) -> Rows:
        """Return one row for each prompt, as `Rows` (a pipeline's own ``encode_prompt`` returns diffusers' tensors).

        ``options`` are the family's own, such as ``max_sequence_length``.

        Raises:
            UserError: the network takes no prompts, or its text encoder is not loaded.
        """

    def encode_class(self, labels: Sequence[int | str]) -> Rows:
        """Return one row for each class, a name or a number.

        Raises:
            UserError: the network takes no classes, or knows none of this name.
        """
        raise UserError("this checkpoint does not take classes", "Give prompts: model.encode_prompt([...]).")

    def encode_negative(self, prompts: Sequence[str], **options: Any) -> Rows:
        """Return one row for each prompt that guidance leads away from."""
        return self.encode_prompt(prompts, **options)

    def class_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Return the ids of class names, ids or a mixture.

        Raises:
            UserError: a name or an id is unknown.
        """
        raise UserError("this checkpoint does not take classes", self.describe_condition())

    def unlabelled(self, n: int) -> Rows:
        """Return ``n`` rows to which no condition is given."""
        return self.null(n)

    def call_arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return arguments with which the pipeline draws one image for each caption, class, or "" without either."""
        if self.takes_text:
            return {"prompt": [*texts]}
        if self.takes_classes:
            known = {**{name: number for number, name in enumerate(self.classes)}, **self.labels}
            return {"class_labels": [known[as_spelled(name, known)] for name in texts]}
        return {"num_images_per_prompt": len(texts)}

    def rows_of(self, condition: Any, count: int) -> Rows:
        """Return ``count`` rows of what `prepare` returns."""
        rows: Rows = condition
        return rows

    def adopt(self, rows: Rows) -> Rows:
        """Return rows of another model of this class as rows of this one."""
        return replace(rows, model=self)

    def null(self, n: int) -> Rows:
        """Return ``n`` rows without a condition."""
        return self.encode_prompt([""]).repeat(n)

    def unconditional(self, rows: Rows) -> Rows | None:
        """Return what guidance leads away from by default; None where ``rows`` have nothing to leave out."""
        return replace(self.null(len(rows)), kept=rows.kept)

    # ---------------------------------------------------------------- images and latents

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32, the posterior's mean, normalised.

        Raises:
            UserError: no autoencoder is loaded.
        """
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation (None: there is none) of latents; see `encode`."""
        with self.steady_vae() as vae:
            return normalised_posterior(vae, images)

    def decode(self, x1: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) float32, nominally in [-1, 1].

        Raises:
            UserError: no autoencoder is loaded.
        """
        with self.steady_vae() as vae:
            return decode(vae, x1)

    @contextmanager
    def steady_vae(self) -> Iterator[Any]:
        """Yield the autoencoder; one that overflows in float16 (``force_upcast`` in its config) in float32.

        Raises:
            UserError: no autoencoder is loaded.
        """
        vae = self.vae
        if vae is None:
            raise UserError(
                "the pipeline was loaded without its autoencoder",
                "Load it; to draw without one, use output_type='latent'.",
            )
        widen = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
        with (
            inner_phase("encode images"),
            in_float32(vae) if widen else nullcontext(),
        ):  # decoding has its own
            yield vae

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return (C, h, w) of the latents of an image of this size in pixels."""
        factor = self.pipeline.vae_scale_factor
        return int(self.vae.config.latent_channels), height // factor, width // factor

    def noise(self, n: int, height: int, width: int, generator: Generators | None = None) -> Tensor:
        """Return the noise to start from, (n, C, h, w) float32.

        Args:
            height, width: of the images, in pixels.
            generator: one for all, or a list with one for each row, which alone decides its noise.

        Raises:
            UserError: a side that is not a multiple of `size_multiple`.
        """
        check_size(height, width, self.size_multiple)
        shape = (n, *self.latent_shape(height, width))
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        return noise

    # ---------------------------------------------------------------- from noise to data

    def begin(self, noise: Tensor, times: Tensor) -> Tensor:
        """Return the state at the first of ``times`` to which `noise` leads; of a flow that begins at 0 the noise."""
        return noise

    def noise_of(self, state: Tensor, times: Tensor) -> Tensor:
        """Return the noise that leads to the state at the first of ``times``; what `begin` does, undone."""
        return state

    def time_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return ``steps`` + 1 times from 0 (noise) to 1 (data), float64; None is `usual_steps`.

        Args:
            height, width: of the images, in pixels.

        Raises:
            UserError: ``steps`` is no number of steps.
        """
        steps = self.usual_steps if steps is None else steps
        return flow.time_grid(steps, self.shift(steps, height, width))

    def usual_grid(self, steps: int | None, height: int, width: int) -> Tensor:
        """Return the times that `usual_solver` takes, as `time_grid` does."""
        return self.time_grid(steps, height, width)

    def shift(self, steps: int, height: int, width: int) -> float:
        """Return the shift of the time grid, see ``latentflow.flow.time_grid``; 1 is none."""
        return 1.0

    def require_null(self) -> None:
        """Refuse what needs the null, if the network has not learnt it.

        Raises:
            UserError: it has not.
        """
        if not self.trained_null:
            raise UserError(
                "this checkpoint was trained without --condition-dropout, and cannot draw without its condition",
                "Give every image a condition, and no guidance (a scale of 1) or one with a negative prompt.",
            )

    def guidance(self, scale: float | None) -> float:
        """Return the guidance scale that is used where ``scale`` is asked for; None is `usual_guidance`."""
        return self.usual_guidance if scale is None else scale

    def velocity(
        self,
        rows: Rows,
        guidance_scale: float | None = None,
        negative: Rows | None = None,
        times: Tensor | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Velocity:
        """Return (x, t) -> dx/dt on the straight path, float32, whatever path and prediction the network has.

        Each call is one evaluation of the network: of B rows without guidance or outside its interval, else of 2B.

        Args:
            rows: B conditions.
            guidance_scale: 1.0 is the condition alone; None the model's own.
            negative: what guidance leads away from, one row or B; default: `null`. Known images are those of ``rows``.
            times: the grid to which an average velocity is bound; other networks ignore it.
            interval: guide only while t is in it.

        Raises:
            UserError: the numbers of rows and negative rows differ.
            ValueError: they do not hold the same values.
        """
        scale = self.guidance(guidance_scale)
        alone, strength = self._bound(rows, times, scale), self.true_guidance(scale)
        pairs = None if strength == 1.0 else self.beside_negative(rows, negative)
        if pairs is None:
            return alone
        both = self._bound(pairs, times, scale)
        return guide_batched(both, alone, strength, interval, adjust=self.adjust_guided)

    def beside_negative(self, rows: Rows, negative: Rows | None) -> Rows | None:
        """Return 2B rows, ``rows`` and what guidance leads away from, see `velocity`; None where that is nothing."""
        negative = self.unconditional(rows) if negative is None else negative
        return None if negative is None else Rows.cat([rows, negative_of(rows, negative)])

    def true_guidance(self, scale: float) -> float:
        """Return the scale of classifier-free guidance, see ``latentflow.flow.guide``, for a guidance scale."""
        return 1.0 if self.embeds_guidance else scale

    #: the family's change of a guided velocity: (guided, that of the condition alone) -> guided
    adjust_guided: Callable[[Tensor, Tensor], Tensor] | None = None

    def _bound(self, rows: Rows, times: Tensor | None, scale: float) -> Velocity:
        """Return the velocity under ``rows`` alone, on the straight path, where nothing is singular."""
        condition, dtype = self.prepare(rows), self.dtype
        # diffusers' caches of a network keep what they remember under these rows apart from the rest.
        cache, name = getattr(self.network, "cache_context", nullcontext), f"rows {next(_NUMBERS)}"

        def network(x: Tensor, t: Tensor) -> Tensor:
            each = t.to(x.device, torch.float32).expand(x.shape[0])
            end = None if times is None else next_time(times, each)
            with cache(name):
                return self.predict(
                    self.path.scale_input(x, t).to(dtype), each, condition, end, scale
                ).float()

        straight, trained = CondOT(), as_velocity(network, self.path, self.prediction)
        return trained if self.path == straight else change_path(trained, old=self.path, new=straight)

    def prepare(self, rows: Rows) -> Any:
        """Return ``rows`` as `predict` takes them, on the network's device and in its precision; called once."""
        return self.arrange(rows.to(self.device, self.dtype))

    def arrange(self, rows: Rows) -> Any:
        """Return rows that are on the network's device and in its precision as `predict` takes them."""
        return rows

    @abstractmethod
    def predict(
        self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        """Evaluate the network once; return what it predicts (see ``prediction``), shaped like x.

        Args:
            x: (B, C, h, w) in the network's precision.
            t: (B,) float32, 0 is noise and 1 data.
            condition: what `prepare` returns.
            end: (B,) the end of the interval of an average velocity; None: its velocity is asked for.
            guidance_scale: for networks that embed it.
        """


def negative_of(rows: Rows, negative: Rows) -> Rows:
    """Return a negative row for each of ``rows``, which keeps what that one keeps.

    Raises:
        UserError: there is neither one nor one for each.
    """
    if len(negative) not in (1, len(rows)):
        raise UserError(f"{len(negative)} negative rows for {len(rows)} rows", "Pass one, or one for each.")
    return replace(negative.repeat(len(rows) // len(negative)), kept=rows.kept)


def _of_adapters(name: str) -> bool:
    """Return whether a weight of this name is a LoRA's, or that of an input which an adapter brings."""
    return "lora_" in name or ".added." in name
