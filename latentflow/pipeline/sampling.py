"""Sampling: the conditions of a call, one row per image, and the steps from noise to data under them."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import UserError, few, shown
from ..families.distilled import warn_of_guidance, warn_of_steps
from ..families.few_steps import require_velocity
from ..families.latentflow import NAMED_STEPS, LatentFlowModel
from ..families.model import FlowModel, Generators, Rows, Size
from ..families.tokens import CodeModel, TokenModel
from ..flow import Solver, Velocity, integrate
from ..flow.discrete import simulate
from ..flow.discrete.simulate import as_logits
from ..flow.solvers import BY_ROW
from ..flow.tensors import expand_t, require_finite
from ..models.text import UnknownWords, unknown_words, with_guesses
from ..utils.memory import require_memory
from . import scheduler as border
from .arguments import (
    SCHEDULER,
    TUNED,
    ClassLabels,
    ConditionArguments,
    StepCallback,
    check_inputs,
    checked,
    labels,
)
from .jumps import JumpSettings, check_solver, sample_tokens
from .steps import AfterStep, Interrupted, Sampler, last_part
from .tuned import TunedSolver, fitting, required

if TYPE_CHECKING:
    from .control import Controls

log = logging.getLogger(__name__)

#: grid of an average velocity, or None -> the velocity
BindVelocity: TypeAlias = Callable[[Tensor | None], Velocity]
# A callback's tensor, and the rows of a `RunningCall` whose text it is.
_NAMES = {"prompt_embeds": "rows", "negative_prompt_embeds": "negative"}
# An image while it is drawn, at least: three channels in float32.
_PIXEL_BYTES = 12


def unknown_words_text(tokenizer: Any, words: Sequence[str]) -> str:
    """Return a sentence for users that names the words, and known words that they may misspell; see
    ``SamplingMixin.unknown_words``."""
    named = few([*with_guesses(tokenizer, words[:10]), *words[10:]], 10)
    return f"words that the checkpoint's vocabulary does not know, and that it cannot draw: {named}"


class SamplingMixin:
    """The conditions and the sampling loop, for a diffusers pipeline of latentflow's components."""

    model: FlowModel
    tokenizer: Any
    scheduler: Any
    vae_scale_factor: int
    progress_bar: Any
    _execution_device: torch.device
    _guidance_scale: float = 1.0
    _jumps: JumpSettings = JumpSettings()
    _num_timesteps: int = 0
    _interrupt: bool = False
    _running: bool = False
    maybe_free_model_hooks: Any

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if guidance does anything: the checkpoint has a condition and the scale is not 1."""
        return self._guidance_scale != 1.0 and (self.model.takes_text or self.model.takes_classes)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True if the call ends after this step; a callback sets ``_interrupt``, and x as it is then is decoded."""
        return self._interrupt

    @property
    def usual_steps(self) -> int:
        """Steps of a call that names neither their number nor a solver."""
        return self.model.usual_steps if self.scheduler is None else NAMED_STEPS

    @property
    def is_running(self) -> bool:
        """True within a call, or another of the pipeline's methods that compute."""
        return self._running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compute without gradients; at the end, after an error too, let go of the components that were brought to the
        device. Within another such context nothing is let go of.

        To differentiate, use `model`.
        """
        outermost, self._running = not self._running, True
        try:
            with torch.no_grad():
                yield
        finally:
            if outermost:
                self._running = False
                self.maybe_free_model_hooks()

    # ---------------------------------------------------------------- conditions

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return class ids of class names; see ``class_ids``."""
        return self.model.class_ids([label] if isinstance(label, str) else label)

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """Return class ids of names, ids or a mixture.

        Raises:
            UserError: a name is unknown (the nearest is suggested), or an id, or there are no names.
        """
        given = labels("class_labels", class_labels)
        return self.model.class_ids(given if isinstance(given, list) else [given])

    def unknown_words(self, prompts: str | list[str]) -> list[str]:
        """Return words of prompts that the checkpoint's vocabulary does not know, each once: they cannot be drawn.

        None without a tokenizer, or with one that spells everything in bytes.
        """
        if self.tokenizer is None:
            return []
        return unknown_words(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts)

    def warn_of_unknown_words(self, *prompts: str | list[str] | None, stacklevel: int = 2) -> None:
        """Warn once of all `unknown_words` of ``prompts``, as ``UnknownWords``."""
        rows = [[text] if isinstance(text, str) else text or [] for text in prompts]
        if words := self.unknown_words([text for row in rows for text in row]):
            warnings.warn(UnknownWords(unknown_words_text(self.tokenizer, words)), stacklevel=stacklevel + 1)

    def start_call(
        self,
        asked: ConditionArguments,
        height: int,
        width: int,
        images: int = 1,
        *,
        fills: bool = False,
        controls: Controls | None = None,
    ) -> RunningCall:
        """Check how the arguments fit one another and encode the condition, one row per image.

        Row i * num_images_per_prompt + j is of prompt i and image i. Without sizes as a condition a network that takes
        them is given those of an image of which nothing was cut off.

        Args:
            height, width: in pixels, of what is drawn.
            images: how many images the call brings; one prompt serves them all, and one image all prompts.
            fills: the call fills the hole of an image.
            controls: the control images, where they are read already; None: those of ``asked``.

        Raises:
            UserError: before anything is computed: see `FlowModel.check_image_input` and `check_inputs`, or more
                images than the machine has memory for.
        """
        model, drawn = self.model, (height, width)
        model.check_image_input(asked.control_image, fills, asked.refers)
        if asked.control_image is None and asked.control_scale != 1.0:
            raise UserError(
                f"control_scale is {shown(asked.control_scale)}, and there is no control image",
                "Give one, control_image, or leave the scale out.",
            )
        if asked.control_image is not None:
            from .control import check_number, read_control  # which imports the readers of data

            controls = controls or read_control(model, asked.control_image, drawn)
            led = len(next(iter(controls.values())))
            if images > 1:
                check_number(led, images)
            images = max(images, led)
        like = None
        if asked.like is not None:
            from .images import read_images  # which imports the readers of data

            if model.latent_variable is None:
                raise model.no_latent_variable()
            like = read_images(asked.like, *drawn, name="like")
            images = max(images, len(like))
        self._jumps = JumpSettings(asked.temperature, asked.corrector)
        self._jumps.check(model)
        count = check_inputs(model, asked, height, width, images)
        self.require_room(count, height, width)

        self._guidance_scale, self._interrupt = model.guidance(asked.guidance_scale), False
        folded = model.few_steps.folded_guidance
        if asked.guidance_scale not in (None, self._guidance_scale, folded):
            why = (
                f"guidance {folded:g} is already in its weights"
                if folded != 1.0
                else "it draws without guidance"
            )
            log.warning("guidance_scale %g is ignored by the checkpoint: %s", asked.guidance_scale, why)
        warn_of_guidance(model, self._guidance_scale)
        rows, negative = self.encode_rows(asked, count, drawn)
        if controls is not None:
            from .control import add_control

            rows = add_control(rows, controls, asked.control_scale)
        if like is not None:
            like = model.encode(2.0 * like.to(self._execution_device) - 1.0)
        rows = model.with_latent_variable(rows, asked.generator, like)
        callback = asked.callback_on_step_end, asked.callback_on_step_end_tensor_inputs
        call = RunningCall(self, rows, negative, *callback, asked.guidance_interval)
        call.usual_scale = self._guidance_scale if asked.guidance_scale is None else None
        return call

    def encode_rows(self, asked: ConditionArguments, count: int, drawn: Size) -> tuple[Rows, Rows | None]:
        """Return the conditions of a call, ``count`` rows, and the negative ones; None: the model's null."""
        raise NotImplementedError

    def require_room(self, count: int, height: int, width: int) -> None:
        """Refuse more pixels than this machine has memory for.

        Raises:
            UserError: says how much there is.
        """
        require_memory(f"{count} images of {width} x {height} pixels", count * width * height * _PIXEL_BYTES)

    # ---------------------------------------------------------------- from noise to data

    @checked
    def sample(
        self,
        velocity: BindVelocity,
        x0: Tensor,
        steps: int | None = None,
        sigmas: list[float] | None = None,
        solver: str | Solver | None = None,
        generator: Generators | None = None,
        after_step: AfterStep = lambda i, t, x: x,
        *,
        strength: float = 1.0,
        x1: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """Go from noise to data, by our solvers or the diffusers scheduler; end early once interrupted.

        Args:
            velocity: of the grid, on the straight path; of a model of tokens its logits.
            x0: noise (B, C, h, w), or tokens (B, h, w).
            steps, sigmas: the grid, as of a call; steps None = the usual number.
            solver: None = the scheduler where there is one, else what was tuned to the checkpoint for so many steps,
                else the model's own; "tuned": what was tuned; "scheduler": the one of the pipeline, and of a
                pretrained model its own. Of tokens: a key of ``latentflow.flow.discrete.SAMPLERS``.
            generator: for solvers that draw noise.
            after_step: sees, and may replace, x after each step.
            strength: the part of the grid, counted from its end, that is taken: from t = 1 - strength on.
            x1: data; the start is the point t x1 + (1 - t) x0 of the path at the time t of the first step. None: x0.
            sampler: in the place of ``integrate``, and of the scheduler; without a solver it takes its own.
        """

        def stepped(i: int, t: Tensor, x: Tensor) -> Tensor:
            x = after_step(i, t, x)
            if self._interrupt:
                raise Interrupted(x)
            return x

        def start(t: float) -> Tensor:
            return x0 if x1 is None else t * x1 + (1.0 - t) * x0

        model: Any = self.model
        if isinstance(model, TokenModel):
            if sigmas is not None or self.scheduler is not None:
                raise UserError(
                    "sigmas or a scheduler of diffusers with tokens, whose times are no levels of noise",
                    "Give num_inference_steps, and set pipe.scheduler = None.",
                )
            return sample_tokens(
                self, velocity(None), x0, steps, solver, generator, stepped, strength, x1, sampler or simulate
            )
        if solver == SCHEDULER and isinstance(model, LatentFlowModel):
            if self.scheduler is None:
                raise UserError("this checkpoint has no scheduler", "Set pipe.scheduler, or use our solvers.")
            solver = None  # the default where there is one
        if solver == SCHEDULER and not model.has_velocity:
            solver = None  # its own steps are its scheduler's
        tuned = self._tuned(solver, steps, x0, plain=sigmas is None and strength == 1.0 and sampler is None)
        if tuned is not None:
            solver, steps = tuned.numbers.solver(), tuned.steps
            log.info("%d steps of the sampler that was tuned to this checkpoint", steps)
        if solver is not None:
            require_velocity(model)
            check_solver(model, solver)
        scheduled = self.scheduler is not None and solver is None and sampler is None
        # A consistency model has no velocity but that which is bound to the grid.
        bound_to_grid = solver is None and (sampler is None or not model.has_velocity)
        made_for_few = bool(model.few_steps) and not scheduled and bound_to_grid
        usual = solver is None and sampler is None and not scheduled and strength == 1.0
        if steps is None:
            own = usual or made_for_few or not isinstance(model, LatentFlowModel)
            steps = model.usual_steps if own else NAMED_STEPS
        if made_for_few and model.few_steps.step_counts and steps not in model.few_steps.step_counts:
            counts = " or ".join(map(str, model.few_steps.step_counts))
            log.warning("%d steps are asked for; the checkpoint was trained to draw in %s", steps, counts)
        warn_of_steps(model, steps)

        def progress(steps: Iterable[int]) -> Any:
            bar = self.progress_bar(steps)
            if tuned is not None and hasattr(bar, "set_description"):
                bar.set_description("tuned sampler")
            return bar

        options: dict[str, Any] = {"progress": progress, "generator": generator}
        try:
            if scheduled:
                border.set_grid(self.scheduler, steps, sigmas, x0.device, strength)
                self._num_timesteps = border.remaining_steps(self.scheduler)
                x = start(border.start_time(self.scheduler))
                return border.integrate_with_scheduler(
                    self.scheduler, velocity(None), x, callback=stepped, **options
                )
            height, width = (side * self.vae_scale_factor for side in x0.shape[-2:])
            if solver == SCHEDULER:
                if sigmas is not None or strength != 1.0 or sampler is not None:
                    raise UserError(
                        "solver='scheduler' with sigmas, a strength below 1 or a method that steers the flow",
                        "The model's own scheduler draws images from noise: leave the others out.",
                    )
                own = border.own_scheduler(self.scheduler, model, steps, height, width)
                self._num_timesteps = len(own.timesteps)
                bound = velocity(model.scheduler_grid(own))
                return border.sample_with_scheduler(model, own, bound, x0, callback=stepped, **options)
            grid = model.usual_grid if usual else model.time_grid
            times = grid(steps, height, width) if sigmas is None else border.times_from_sigmas(sigmas)
            if tuned is not None:
                times = torch.tensor(tuned.numbers.times, dtype=torch.float64)
            times = last_part(times, strength)
            self._num_timesteps = len(times) - 1
            x = model.begin(x0, times) if x1 is None else start(float(times[0]))
            if self._num_timesteps == 0:
                return x
            run: Sampler = integrate if sampler is None else sampler
            if sampler is None and solver is None:
                solver = model.usual_solver
            if solver is not None:
                solver = by_row(solver)
            bound = velocity(times if bound_to_grid else None)
            return run(
                bound, x, times, solver=solver, callback=lambda i, t, x: stepped(i, times[i], x), **options
            )
        except Interrupted as interrupted:
            return interrupted.latents

    def _tuned(
        self, solver: str | Solver | None, steps: int | None, x0: Tensor, *, plain: bool
    ) -> TunedSolver | None:
        """Return the solver of the checkpoint's file that a call takes: where it is asked for, or nothing else is.

        Args:
            plain: the call goes from noise to data, on no grid of the caller's.

        Raises:
            UserError: it is asked for, and there is none that fits.
        """
        height, width = (side * self.vae_scale_factor for side in x0.shape[-2:])
        call = self.model, steps, self._guidance_scale, height, width
        if solver == TUNED:
            if not plain:
                raise UserError(
                    "solver='tuned' with sigmas, a strength below 1 or a method that steers the flow",
                    "It goes from noise to data along its own times: leave the others out.",
                )
            require_velocity(self.model)
            return required(*call)
        usual = solver is None and self.scheduler is None and not self.model.few_steps
        if not usual or not plain or not self.model.has_velocity:
            return None
        return fitting(self.model, self.usual_steps if steps is None else steps, *call[2:])


class RunningCall:
    """The conditions of one call, a row per image, as a guided velocity.

    Args:
        pipe: the pipeline that is called.
        rows: the conditions.
        negative: what guidance leads away from; None: the model's null.
        callback: as ``callback_on_step_end`` of the pipelines.
        wanted: the names of ``arguments.CALLBACK_TENSORS`` that it gets.
        interval: of guidance.
    """

    def __init__(
        self,
        pipe: SamplingMixin,
        rows: Rows,
        negative: Rows | None = None,
        callback: StepCallback | None = None,
        wanted: Sequence[str] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.pipe, self.rows, self.negative = pipe, rows, negative
        self.callback, self.wanted, self.interval = callback, wanted or ["latents"], interval
        #: guidance of this call where it is not the pipeline's own
        self.scale: float | None = None
        #: guidance scale of a call that names none, for which the model may have a schedule
        self.usual_scale: float | None = None
        #: where the last evaluation pointed: the data that it predicts
        self.prediction: Tensor | None = None

    def expand(self, values: Tensor) -> Tensor:
        """Return values of the images of this call, (P, ...), as one for each row."""
        return values.repeat_interleave(len(self.rows) // len(values), 0)

    def velocity(self, times: Tensor | None = None) -> Velocity:
        """Return the guided velocity under the conditions as they are at each evaluation; see `FlowModel.velocity`.

        Of a model of tokens it is their logits; see `TokenModel.logits`.
        """

        @functools.lru_cache(maxsize=1)
        def bound(scale: float | None, rows: Rows, negative: Rows | None) -> Any:
            model: Any = rows.model
            if model.draws_tokens:
                return model.logits(rows, scale, negative, self.interval)
            if isinstance(model, CodeModel):
                model = model.at_temperature(self.pipe._jumps.temperature)
            return model.velocity(rows, scale, negative, times, self.interval)

        def guided(x: Tensor, t: Tensor) -> Any:
            scale = self.pipe.guidance_scale if self.scale is None else self.scale
            usual = scale == self.usual_scale  # nobody asked for it, and no callback has changed it
            value = bound(None if usual else scale, self.rows, self.negative)(x, t)
            if isinstance(model := self.rows.model, TokenModel):  # the likeliest tokens
                likely = as_logits(value).conditional.argmax(-1)
                self.prediction = torch.where(model.token_path.known(x), x, likely)
            else:
                self.prediction = x + (1.0 - expand_t(t, x)) * value  # on the straight path
            return value

        return guided

    def after_step(self, i: int, t: Tensor, x: Tensor) -> Tensor:
        """Let the callback see step i, which began at t, and take what it returns."""
        if self.callback is None:
            return x
        tensors: dict[str, Any] = {"latents": x, "prediction": self.prediction}
        for name, place in _NAMES.items():
            rows: Rows | None = getattr(self, place)
            tensors[name] = None if rows is None else rows.values.get("text")
        given = {name: tensors[name] for name in self.wanted}
        changed = self.callback(self.pipe, i, border.to_timestep(t), given) or {}
        if not isinstance(changed, dict):
            raise UserError(
                f"callback_on_step_end returned {shown(changed)} after step {i + 1}",
                "Let it return None, or a dictionary of the tensors that are to be replaced.",
            )
        for name in ("latents", *_NAMES):
            if name in changed:
                what = f"{name} that the callback returned after step {i + 1}"
                _check_replacement(changed[name], tensors[name], what)
        for name, place in _NAMES.items():
            rows = getattr(self, place)
            if rows is not None and changed.get(name) is not None:
                setattr(self, place, replace(rows, values={**rows.values, "text": changed[name]}))
        replacement: Tensor = changed.get("latents", x)
        if self.pipe.interrupt and isinstance(model := self.rows.model, TokenModel):
            assert self.prediction is not None
            masked = replacement >= model.token_path.vocabulary  # which no image is made of
            replacement = torch.where(masked, self.prediction, replacement)
        return replacement


def _check_replacement(value: Any, earlier: Tensor | None, what: str) -> None:
    """Refuse a tensor in the place of another if it is none, or of another shape, or not finite."""
    if value is None and earlier is None:
        return
    if not isinstance(value, Tensor) or earlier is None or value.shape != earlier.shape:
        expected = (
            "Leave it out: this call has none."
            if earlier is None
            else f"It has shape {tuple(earlier.shape)}."
        )
        raise UserError(f"{what} is {shown(value)}", expected)
    require_finite(value, what, "Check the callback.")


def by_row(solver: str | Solver) -> str | Solver:
    """Return the solver of this name whose rows do not depend on one another: a generator alone decides its image."""
    return BY_ROW.get(solver, solver) if isinstance(solver, str) else solver
