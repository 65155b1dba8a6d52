"""Family options: arguments of a stock pipeline's call, checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError, few, nearest, reason, shown

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
    """Refuse family options that the family does not use.

    Raises:
        UserError: names the flag that is meant, the nearest option, or all of the family's options.
    """
    known = [*model.prompt_options, *model.sampling_options]
    for name, value in options.items():
        if name in known or (name in FIXED and value == FIXED[name]):
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


def check_prompt_options(model: PretrainedModel, options: Mapping[str, Any]) -> None:
    """Have the stock pipeline check options of its prompts, such as ``max_sequence_length``, by its own limits.

    Raises:
        UserError: says its limit.
    """
    check = getattr(model.pipeline, "check_inputs", None)
    if check is None:
        return
    usual = {
        name: entry.default
        for name, entry in inspect.signature(type(model.pipeline).__call__).parameters.items()
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
