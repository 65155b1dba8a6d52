"""One running call of a pipeline: its conditions, its guided velocity, and what its callback may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import UserError, shown
from ..flow import Velocity
from ..flow.tensors import expand_t, require_finite

if TYPE_CHECKING:
    from .base import FlowPipeline


Size: TypeAlias = tuple[int, int]  # (height, width)
StepCallback: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class RunningCall:
    """What the rows of one call are conditioned on, as a velocity.

    Args:
        pipe: whose network is followed.
        class_ids: one for each row, or None.
        prompt_embeds, negative_prompt_embeds, prompt_attention_mask, negative_prompt_attention_mask: one row for each
            row, as ``encode_prompt`` returns them.
        rows: number of rows.
        callback: as ``callback_on_step_end`` of the pipelines.
        wanted: the names of `pipeline_arguments.CALLBACK_TENSORS` that it gets.
    """

    def __init__(
        self,
        pipe: FlowPipeline,
        class_ids: list[int] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        rows: int,
        callback: StepCallback | None,
        wanted: Sequence[str],
    ) -> None:
        self.pipe = pipe
        self.class_ids = class_ids
        self.prompt_embeds, self.prompt_attention_mask = prompt_embeds, prompt_attention_mask
        self.negative_prompt_embeds = negative_prompt_embeds
        self.negative_prompt_attention_mask = negative_prompt_attention_mask
        self.rows = rows
        #: (rows, C', h, w) beside the latents, for networks that take them; set before the first evaluation
        self.channels: Tensor | None = None
        #: (rows, 6) what the network is told of sizes and crops, for networks that take them
        self.sizes: Tensor | None = None
        #: where the last evaluation pointed: the data that it predicts
        self.prediction: Tensor | None = None
        self._callback, self._wanted = callback, wanted
        self._velocity: Velocity | None = None

    def rows_of(self, values: Tensor) -> Tensor:
        """Values of the images of this call, (P, ...), as one for each row."""
        return values.repeat_interleave(self.rows // len(values), 0)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided velocity under the conditions as they are now; see ``FlowPipeline.velocity``."""
        if self._velocity is None:
            self._velocity = self._bound()
        value = self._velocity(x, t)
        self.prediction = x + (1.0 - expand_t(t, x)) * value  # on the straight path
        return value

    def after_step(self, i: int, timestep: Tensor, x: Tensor) -> Tensor:
        """Let the callback see step i, and take what it returns."""
        if self._callback is None:
            return x
        tensors = {
            "latents": x,
            "prompt_embeds": self.prompt_embeds,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "prediction": self.prediction,
        }
        given = {name: tensors[name] for name in self._wanted}
        changed = self._callback(self.pipe, i, timestep, given) or {}
        if not isinstance(changed, dict):
            raise UserError(
                f"callback_on_step_end returned {shown(changed)} after step {i + 1}",
                "Let it return None, or a dictionary of the tensors that are to be replaced.",
            )
        for name in {"latents", "prompt_embeds", "negative_prompt_embeds"} & changed.keys():
            _check_replacement(
                changed[name], tensors[name], f"{name} that the callback returned after step {i + 1}"
            )
        for name in {"prompt_embeds", "negative_prompt_embeds"} & changed.keys():
            setattr(self, name, changed[name])
            self._velocity = None
        replacement: Tensor = changed.get("latents", x)
        return replacement

    def _bound(self) -> Velocity:
        def condition(text: Tensor | None, mask: Tensor | None) -> Any:
            return self.pipe.condition(self.class_ids, text, mask, self.channels, self.sizes)

        positive = condition(self.prompt_embeds, self.prompt_attention_mask)
        if self.class_ids is None and self.prompt_embeds is None:
            return self.pipe.velocity(positive, None)  # nothing that guidance could leave out
        if self.negative_prompt_embeds is None:
            return self.pipe.velocity(positive, positive.unconditional())
        negative = condition(self.negative_prompt_embeds, self.negative_prompt_attention_mask)
        return self.pipe.velocity(positive, negative)


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


def count_rows(images_per_prompt: int, prompts: int | None, classes: int | None, images: int) -> int:
    """Rows of a call: prompts (or classes) x images_per_prompt; one prompt serves any number of images.

    Args:
        prompts, classes: how many are given; None = none.

    Raises:
        UserError: the numbers of prompts, classes and images do not fit one another.
    """
    given = {count for count in (prompts, classes) if count is not None}
    if len(given) > 1:
        raise UserError(
            f"the numbers of prompts and class_labels differ: {sorted(given)}", "Pass as many of each."
        )
    count = given.pop() if given else 1
    if 1 not in (count, images) and count != images:
        raise UserError(
            f"{count} prompts or classes for {images} images", "Pass as many of each, or one of either."
        )
    return max(count, images) * images_per_prompt


def repeated_to(value: Tensor | None, rows: int) -> Tensor | None:
    """``value`` as often as ``rows`` needs; it has all rows already, or is of one prompt (equal rows)."""
    return None if value is None else torch.cat([value] * (rows // len(value)))
