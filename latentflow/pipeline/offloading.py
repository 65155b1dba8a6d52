"""Offloaded weights brought back while they are read or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])


def with_weights_in_place(method: Method) -> Method:
    """Return a method of a pipeline that runs within `weights_in_place`."""

    @wraps(method)
    def wrapped(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        with weights_in_place(pipe):
            return method(pipe, *args, **kwargs)

    return cast(Method, wrapped)


@contextmanager
def weights_in_place(pipe: Any) -> Iterator[None]:
    """Bring a pipeline's weights back within the context, and offload them again afterwards.

    accelerate keeps them on "meta", where they cannot be read; hooks do not know layers that come later.
    """
    device = pipe._execution_device
    by_model, one_by_one, by_group = _func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if by_model:
            pipe.enable_model_cpu_offload(device=device)
        elif one_by_one:
            pipe.enable_sequential_cpu_offload(device=device)
        elif by_group:
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)
