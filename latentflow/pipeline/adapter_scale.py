"""The scale of adapters in one call, ``pipe(prompt, joint_attention_kwargs={"scale": 0.5})``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypedDict

from ..errors import UserError, finite, shown
from .adapter_files import PARTS
from .offloading import weights_in_place

log = logging.getLogger(__name__)

Scale: TypeAlias = dict[str, Any] | None


class AdapterScale(TypedDict, total=False):
    """The names under which diffusers' pipelines take ``{"scale": s}``.

    Attributes:
        joint_attention_kwargs: Stable Diffusion 3's and FLUX's.
        attention_kwargs: Sana's, and of most pipelines since.
        cross_attention_kwargs: Stable Diffusion's.
    """

    joint_attention_kwargs: Scale
    attention_kwargs: Scale
    cross_attention_kwargs: Scale


SCALE_NAMES = tuple(AdapterScale.__annotations__)


def check_scale(name: str, value: Any) -> dict[str, float]:
    """Return ``{"scale": s}`` with a finite s, or {}.

    Raises:
        UserError: it is anything else.
    """
    fix = 'Pass {"scale": 0.5}, by which the weights of all adapters are multiplied; nothing else is taken.'
    if not isinstance(value, Mapping) or set(value) - {"scale"}:
        raise UserError(f"{name} is {shown(value)}", fix)
    return {key: finite(f"the scale in {name}", scale, fix=fix) for key, scale in value.items()}


def scale_of(given: Mapping[str, Mapping[str, float] | None]) -> float:
    """Return the scale that the arguments ``SCALE_NAMES`` of a call ask for; 1 where there are none.

    Raises:
        UserError: several of them are given.
    """
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are given", "They mean the same here: pass one of them.")
    return (given[names[0]] or {})["scale"] if names else 1.0


@contextmanager
def scaled_adapters(pipe: Any, scale: float) -> Iterator[None]:
    """Multiply the weights of a pipeline's adapters by ``scale`` within the context, also if it ends with an error.

    The same as ``set_adapters`` with each weight times ``scale``, for words, classes and control inputs as well.
    Adapters that are fused stay as they are, as in diffusers.
    """
    if scale == 1.0:
        yield
        return
    parts = [getattr(pipe, part, None) for part in PARTS]
    modules = [layer for part in parts if part is not None for layer in part.modules()]
    layers = [layer for layer in modules if isinstance(getattr(layer, "scaling", None), dict)]
    layers = [layer for layer in layers if not getattr(layer, "merged_adapters", None)]
    if not layers:
        log.warning("the scale %g of adapters has no effect: none is loaded, or all are fused", scale)
        yield
        return
    own = [layer.scaling for layer in layers]
    added = getattr(pipe.transformer, "_adapters_added", None)
    brought = () if added is None else (added.words, added.labels, added.controls)
    if not any(value for values in brought for value in values.values()):
        added = None  # no words, classes and control inputs to scale
    fused = {} if added is None else added.scale
    try:
        for layer in layers:
            layer.scaling = {name: scale * value for name, value in layer.scaling.items()}
        if added is not None:
            added.scale = dict.fromkeys(PARTS, scale) | fused
            with weights_in_place(pipe):
                pipe._renew()
        yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling = scaling
        if added is not None:
            added.scale = fused
            with weights_in_place(pipe):
                pipe._renew()
