"""Family options: arguments of a stock pipeline's call, checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UserError, few, is_number, nearest, reason, shown, whole

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

#: argument of a stock call -> flag of the commands, and argument of our calls, in its place
OURS = {
    "prompt": ("the prompt", "prompt"),
    "negative_prompt": ("--negative", "negative_prompt"),
    "height": ("--height", "height"),
    "width": ("--width", "width"),
    "num_inference_steps": ("--steps", "num_inference_steps"),
    "guidance_scale": ("--guidance", "guidance_scale"),
    "generator": ("--seed", "generator"),
    "num_images_per_prompt": ("-n", "num_images_per_prompt"),
    "class_labels": ("--class", "class_labels"),
    "true_cfg_scale": ("--guidance", "guidance_scale"),
}
#: argument of a stock call -> the only value that our sampling has
FIXED = {
    "use_resolution_binning": False,
    "enable_prompt_rewrite": False,
    "use_pe": False,
    "prompt_upsampling": False,
}


def check_options(model: PretrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse family options that the family does not use, or whose values are of another kind than their defaults.

    Raises:
        UserError: names the flag that is meant, the nearest option, or all of the family's options; the kind of value.
    """
    known = [*model.prompt_options, *model.sampling_options]
    for name, value in options.items():
        if name in known:
            check_kind(name, value, inspect.signature(type(model.pipeline).__call__).parameters[name])
            continue
        if name in FIXED and value == FIXED[name]:
            continue
        what = f"{name} is no option of {type(model.pipeline).__name__} here"
        if name in OURS:
            flag, argument = OURS[name]
            fix = f"Give {flag} on the command line, {argument} in Python."
        elif name in FIXED:
            fix = f"Leave it out: {shown(FIXED[name])} is the only value that can be had."
        elif guess := nearest(name, known):
            fix = f"Did you mean {guess}?"
        else:
            fix = f"It has {few(known, 20)}." if known else "It has no options: leave it out."
        raise UserError(what, fix)


def check_kind(name: str, value: Any, entry: inspect.Parameter) -> None:
    """Refuse a value of another kind than the default of an argument; where that is None, any value will do.

    Raises:
        UserError: says which kind.
    """
    usual, fix = entry.default, None
    if usual is None or (value is None and "None" in str(entry.annotation)):
        return
    if isinstance(usual, bool):
        fix = None if isinstance(value, bool) else "Give true or false."
    elif isinstance(usual, int):
        whole(name, value, 1)  # all of them count something
    elif isinstance(usual, float):
        fix = None if is_number(value) else "Give a number."
    elif isinstance(usual, list | tuple) and not isinstance(value, Tensor) and value is not None:
        several = isinstance(value, list | tuple)
        like = several and all(isinstance(part, str) == isinstance(usual[0], str) for part in value)
        fix = None if like else f"Give a list, such as {shown([*usual])}."
    if fix:
        raise UserError(f"{name} is {shown(value)}", fix)


def check_prompt_options(model: PretrainedModel, options: Mapping[str, Any]) -> None:
    """Have the stock pipeline check options of its prompts, such as ``max_sequence_length``, by its own limits.

    Raises:
        UserError: says its limit, or the kind of value.
    """
    parameters = inspect.signature(type(model.pipeline).__call__).parameters
    for name, value in options.items():
        check_kind(name, value, parameters[name])
    check = getattr(model.pipeline, "check_inputs", None)
    if check is None:
        return
    usual = {
        name: entry.default
        for name, entry in parameters.items()
        if entry.default is not inspect.Parameter.empty
    }
    usual = {**usual, "prompt": "a", "height": 1024, "width": 1024}
    names = inspect.signature(check).parameters

    def refused(given: Mapping[str, Any]) -> str | None:
        try:
            check(**{name: given.get(name) for name in names})
        except ValueError as error:
            return reason(error).replace("`", "")
        return None

    why = refused({**usual, **options})
    if why and why != refused(usual):  # some pipelines take no such prompt, or need an image
        given = few([f"{name}={shown(value)}" for name, value in options.items()])
        raise UserError(f"{type(model.pipeline).__name__} refuses {given}", why)
