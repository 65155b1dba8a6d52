"""The arguments of a pipeline's call: each of the right kind and in range, before anything is computed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, finite, lookup, shown, unknown, whole
from ..flow import SOLVERS, Solver
from ..flow.tensors import require_finite
from ..flow.times import MOST_STEPS, STEPS_FIX
from .scheduler import checked_sigmas

P = ParamSpec("P")
T = TypeVar("T")
#: (name, value) -> the value, in the form that the pipelines work with.
Check = Callable[[str, Any], Any]

#: largest side in pixels, and longest text in tokens: whatever is larger is a mistake
LARGEST = 2**20
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: what a callback may ask for; "prediction" cannot be replaced
CALLBACK_TENSORS = ["latents", "prompt_embeds", "negative_prompt_embeds", "prediction"]


def checked(call: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a pipeline's method by ``CHECKS`` before it runs, and warn once of unknown words.

    None passes where it is the argument's default.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in CHECKS and not (value is None and signature.parameters[name].default is None):
                given.arguments[name] = CHECKS[name](name, value)
        words = [given.arguments.get(name) for name in ("prompt", "negative_prompt", "source_prompt")]
        given.arguments["self"].warn_of_unknown_words(*words, stacklevel=2)
        return call(*given.args, **given.kwargs)

    return checking


def texts(name: str, value: Any) -> str | list[str]:
    """Return a text, or a list of at least one.

    Raises:
        UserError: it is none, or holds half of a character (a lone surrogate).
    """
    rows = [value] if isinstance(value, str) else value
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, str) for row in rows):
        raise UserError(f"{name} is {shown(value)}", 'Pass a text, or a list of texts; "" is none.')
    for row in rows:
        if any("\ud800" <= character <= "\udfff" for character in row):
            raise UserError(f"{name} is {shown(row)}", "It holds half of a character: write it anew.")
    return value if isinstance(value, str) else list(rows)


def labels(name: str, value: Any) -> int | str | list[int | str]:
    """Return a class, or a list of at least one: names, or whole numbers (numpy's and torch's are).

    Raises:
        UserError: it is none.
    """

    def plain(label: Any) -> Any:
        return label.tolist() if hasattr(label, "tolist") else label

    value = plain(value)
    rows = [value] if isinstance(value, int | str) else value
    fine = isinstance(rows, list | tuple | range) and len(rows) > 0
    rows = [plain(row) for row in rows] if fine else []
    if not rows or not all(isinstance(row, int | str) and not isinstance(row, bool) for row in rows):
        raise UserError(f"{name} is {shown(value)}", "Pass a class name or number, or a list of them.")
    return rows[0] if isinstance(value, int | str) else rows


def _whole(least: int, most: int | None = None, fix: str = "") -> Check:
    return lambda name, value: whole(name, value, least, most, fix=fix)


def _finite(least: float = -float("inf"), most: float = float("inf"), fix: str = "") -> Check:
    return lambda name, value: finite(name, value, least, most, fix=fix)


def _tensor(shape: str, *, floating: bool = True) -> Check:
    """Return the check of a tensor of as many dimensions as ``shape`` names, such as "(B, L)", none of them 0."""

    def check(name: str, value: Any) -> Tensor:
        ndim = shape.count(",") + 1
        fits = isinstance(value, Tensor) and value.ndim == ndim and value.numel() > 0
        if not fits or (floating and not value.is_floating_point()) or value.is_complex():
            what = f"{shown(value)}, {value.dtype}" if isinstance(value, Tensor) else shown(value)
            kind = "floating-point tensor" if floating else "tensor"
            raise UserError(f"{name} is {what}", f"Pass a {kind} {shape}.")
        if floating:
            require_finite(value, name, "Check where it comes from.")
        tensor: Tensor = value
        return tensor

    return check


def _pair(least: int, what: str) -> Check:
    def check(name: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise UserError(f"{name} is {shown(value)}", f"Give two numbers of pixels: {what}.")
        first, second = (
            whole(name, side, least, LARGEST, fix=f"Give two numbers of pixels: {what}.") for side in value
        )
        return first, second

    return check


def _instance(kind: Any, fix: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise UserError(f"{name} is {shown(value)}", fix)
        return value

    return check


def _generators(name: str, value: Any) -> Any:
    rows = [value] if isinstance(value, torch.Generator) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(row, torch.Generator) for row in rows):
        raise UserError(
            f"{name} is {shown(value)}", "Pass a torch.Generator, or a list with one for each image."
        )
    return value


def _solver(name: str, value: Any) -> str | Solver:
    if isinstance(value, Solver):
        return value
    _instance(str, f"Pass one of {', '.join(SOLVERS)}.")(name, value)
    lookup(SOLVERS, value, "solver")
    return str(value)


def output_kind(name: str, value: Any) -> str:
    """Return one of ``OUTPUT_TYPES``.

    Raises:
        UserError: it is none of them.
    """
    _instance(str, f"Pass one of {', '.join(OUTPUT_TYPES)}.")(name, value)
    if value not in OUTPUT_TYPES:
        raise unknown(name, value, OUTPUT_TYPES)
    return str(value)


def _tensor_names(name: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(row, str) for row in value):
        raise UserError(f"{name} is {shown(value)}", f"Pass a list of {', '.join(CALLBACK_TENSORS)}.")
    for row in value:
        if row not in CALLBACK_TENSORS:
            raise unknown("callback tensor", row, CALLBACK_TENSORS)
    return list(value)


def _interval(name: str, value: Any) -> tuple[float, float]:
    fix = "Use 0 <= low <= high <= 1 (t = 1 is data)."
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UserError(f"guidance interval {shown(value)}", fix)
    low, high = (finite("guidance interval", side, 0.0, 1.0, fix=fix) for side in value)
    if low > high:
        raise UserError(f"guidance interval {shown(value)}", fix)
    return low, high


_SIZE, _EMBEDS, _MASK = _pair(1, "height and width"), _tensor("(B, L, D)"), _tensor("(B, L)", floating=False)
_NOISE, _FLAG = _tensor("(B, C, h, w)"), _instance(bool, "Pass True or False.")

#: argument of a pipeline's method -> its check. Images are checked as they are read.
CHECKS: dict[str, Check] = {
    "prompt": texts,
    "negative_prompt": texts,
    "source_prompt": texts,
    "class_labels": labels,
    "source_class_labels": labels,
    "height": _whole(1, LARGEST, "Give a whole number of pixels."),
    "width": _whole(1, LARGEST, "Give a whole number of pixels."),
    "num_inference_steps": _whole(1, MOST_STEPS, STEPS_FIX),
    "sigmas": lambda name, value: checked_sigmas(value),
    "guidance_scale": _finite(),
    "source_guidance_scale": _finite(),
    "guidance_interval": _interval,
    "num_images_per_prompt": _whole(1, 10**9),
    "frames": _whole(2, fix="Ask for at least 2, the first and the last."),
    "generator": _generators,
    "latents": _NOISE,
    "masked_image_latents": _NOISE,
    "prompt_embeds": _EMBEDS,
    "negative_prompt_embeds": _EMBEDS,
    "prompt_attention_mask": _MASK,
    "negative_prompt_attention_mask": _MASK,
    "max_sequence_length": _whole(1, LARGEST),
    "output_type": output_kind,
    "return_dict": _FLAG,
    "measure": _FLAG,
    "callback_on_step_end": _instance(Callable, "Pass a function (pipe, i, timestep, tensors)."),
    "callback_on_step_end_tensor_inputs": _tensor_names,
    "solver": _solver,
    "method": _instance(str, "Pass the name of a method."),
    "strength": _finite(0.0, 1.0, "Use 0 (nothing changes) to 1 (drawn from pure noise)."),
    "draws": _whole(1, 10_000),
    "plain_from": _finite(0.0, 1.0, "Use a time in [0, 1]; 1 is off."),
    "padding_mask_crop": _whole(0, LARGEST, fix="Give a number of pixels, at least 0."),
    "feather": _finite(0.0, fix="Give a number of pixels, at least 0."),
    "original_size": _SIZE,
    "target_size": _SIZE,
    "crops_coords_top_left": _pair(0, "top and left"),
}
