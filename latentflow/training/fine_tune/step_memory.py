"""Memory of one computation, measured without doing it: on tensors that have shapes and no storage.

Modules on the meta device become fake tensors of torch, which take part in autograd and attention as those of a CPU do:
what is kept for the backward pass and what is freed on the way are torch's own. Every storage is counted from the
operation that makes it until nothing holds it. Not counted: what a kernel takes for itself while it runs, and memory
that an allocator holds and does not use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...autoencoder.latents import _cells, encoded, of_videos
from ...families import Rows
from ...families.model import Values
from ...families.pretrained import PackedModel, PretrainedModel
from ...families.stored_weights import quantised_layers
from ...families.text_encoders import embeds_width

_DEVICE = "cpu"  # of the fake tensors: autograd asks a GPU's driver even where there is none


class NotCountedError(Exception):
    """A computation that cannot be simulated."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beside weights, gradients and the optimiser.

    Attributes:
        kept: those that the forward pass leaves for the backward pass.
        peak: the most at any moment of both.
    """

    kept: int
    peak: int


# ---------------------------------------------------------------- counting


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are held.

    Args:
        weights: tensors that are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {_storage(weight) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _storage(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Affirming(TorchDispatchMode):
    """Answers yes where a program asks whether something holds for the values of tensors, which fake ones have not.

    Programs ask whether times lie in [0, 1], and whether a mask is full.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        return True if asked else func(*args, **kwargs or {})


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _cuda_precision() -> Iterator[None]:
    """Compute norms in float32 within autocast, as it does on CUDA; on a CPU they stay in bfloat16.

    The functions are exchanged: torch's modes do not reach the blocks that gradient checkpointing computes again.
    """
    usual: tuple[Callable[..., Tensor], ...] = (F.layer_norm, F.rms_norm, F.group_norm)

    def widened(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(*args: Any, **options: Any) -> Tensor:
            if torch.is_autocast_enabled(_DEVICE):
                args, options = tree_map_only(Tensor, Tensor.float, (args, options))
            return norm(*args, **options)

        return computed

    F.layer_norm, F.rms_norm, F.group_norm = map(widened, usual)
    try:
        yield
    finally:
        F.layer_norm, F.rms_norm, F.group_norm = usual


# ---------------------------------------------------------------- modules without memory


class _Dequantised(nn.Linear):
    """A linear layer whose weight is made from 8 bits at each call. torchao leaves it to autograd, which keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(_DEVICE) if torch.is_autocast_enabled(_DEVICE) else x.dtype
        return F.linear(x, self.weight.to(dtype), self.bias)


class _Dequantised4(nn.Linear):
    """A linear layer whose weight is made from 4 bits at each call, and in the backward pass again (bitsandbytes)."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(_DEVICE) if torch.is_autocast_enabled(_DEVICE) else x.dtype
        product: Tensor = _Product4.apply(x.to(dtype), self.weight, dtype)
        return product if self.bias is None else product + self.bias.to(dtype)


class _Product4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        return x @ weight.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.to(ctx.dtype), None, None


_DEQUANTISED = {"int8": _Dequantised, "float8": _Dequantised, "nf4": _Dequantised4}


def _fake(module: nn.Module, mode: FakeTensorMode, stored: str) -> nn.Module:
    """Give a module of the meta device fake tensors, stored as its weights would be; trained ones are float32."""
    quantised = set()
    if stored in _DEQUANTISED:
        for layer in quantised_layers(module, stored).values():
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                layer.__class__ = _DEQUANTISED[stored]
                quantised.add(id(layer.weight))
    low = torch.float32 if stored == "float32" else torch.bfloat16
    made: dict[int, Any] = {}  # a shared weight stays one

    def fake(tensor: Tensor) -> Tensor:
        dtype = low if tensor.is_floating_point() and not tensor.requires_grad else tensor.dtype
        dtype = torch.int8 if id(tensor) in quantised else dtype
        with mode:
            return torch.empty(tensor.shape, dtype=dtype, device=_DEVICE)

    for part in module.modules():
        for name, weight in [*part._parameters.items()]:
            if weight is not None:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(fake(weight), requires_grad=weight.requires_grad)
                part._parameters[name] = made[id(weight)]
        for name, buffer in [*part._buffers.items()]:
            if buffer is not None:
                part._buffers[name] = fake(buffer)
    return module


@contextmanager
def _counted(module: Any, stored: str) -> Iterator[LiveBytes]:
    """Count what is computed with a module of the meta device, which becomes fake."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(module, mode, stored)
    with mode, LiveBytes([*module.parameters(), *module.buffers()]) as live, _Affirming():
        yield live


# ---------------------------------------------------------------- the computations


def training_step(
    model: PretrainedModel,
    prepare: Callable[[nn.Module], None],
    *,
    stored: str,
    batch_size: int,
    latent_shape: tuple[int, ...],
    text_length: int,
    checkpointing: bool,
    autocast: bool = True,
) -> StepMemory:
    """Return the memory of the forward and backward pass of a step.

    Args:
        model: on the meta device; it is not changed.
        prepare: puts adapters into a network, in place, or lets its weights learn.
        stored: one of `STORED`, of weights that do not learn; those that do are float32.
        latent_shape: (C, h, w), see `encoding_images`.
        text_length: tokens of a prompt.
        checkpointing: of gradients.
        autocast: compute in bfloat16 as autocast does on CUDA; else in the precision of the weights.

    Raises:
        NotCountedError: the family's network takes other conditions than `_rows`, or looks at values of tensors.
    """
    network: Any = deepcopy(model.network)
    prepare(network)
    network.train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    alone, kept = _with_network(model, network), dict[int, int]()
    vars(alone)["timestep_of"] = (
        torch.clone
    )  # of diffusion models, which look it up: fake tensors have no values

    def keep(value: Tensor) -> Tensor:
        if _storage(value) not in own:
            kept[_storage(value)] = value.untyped_storage().nbytes()
        return value

    with _counted(network, stored) as live, _cuda_precision():
        for weight in network.parameters():
            if weight.requires_grad:  # gradients are counted elsewhere
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        own = {_storage(weight) for weight in [*network.parameters(), *network.buffers()]}
        x = torch.empty(batch_size, *latent_shape, device=_DEVICE)
        t = torch.empty(batch_size, device=_DEVICE)
        try:
            condition = alone.prepare(replace(_rows(alone, batch_size, text_length), kept=_images(alone, x)))
            with (
                torch.autocast(_DEVICE, torch.bfloat16, enabled=autocast),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            ):
                output = alone.predict(x.to(alone.dtype), t, condition, None, alone.usual_guidance)
                loss = (output.float() - x).square().mean()
        except (AttributeError, KeyError, ValueError, RuntimeError) as error:
            raise NotCountedError(str(error)) from error
        del output
        loss.backward()
    return StepMemory(sum(kept.values()), live.peak)


def _with_network(model: PretrainedModel, network: nn.Module) -> PretrainedModel:
    """Return the model with another network and no other module."""
    alone, pipeline = copy(model), copy(model.pipeline)
    for name, part in model.pipeline.components.items():
        if isinstance(part, nn.Module):
            setattr(pipeline, name, network if part is model.network else None)
    alone.pipeline = pipeline
    return alone


def _images(model: PretrainedModel, x: Tensor) -> dict[str, Values]:
    """Return what rows keep of images beside latents x (B, C, h, w), for a network that takes them."""
    cells = model.patch**2 if isinstance(model, PackedModel) else 1
    latents = x.shape[1] * (1 + sum(name != "mask" for name in model.extra))
    channels = {"mask": int(model.network.config.in_channels) // cells - latents} if model.extra else {}
    return {name: x.new_empty(len(x), channels.get(name, x.shape[1]), *x.shape[2:]) for name in model.extra}


def _rows(model: PretrainedModel, count: int, length: int) -> Rows:
    """Return rows of the shapes that most families have; a network takes of them what it knows."""
    config = model.network.config
    values = {"embeds": torch.empty(count, length, embeds_width(config) or 1, device=_DEVICE)}
    values["mask"] = torch.ones(count, length, dtype=torch.bool, device=_DEVICE)
    if pooled := config.get("pooled_projection_dim"):
        values["pooled"] = torch.empty(count, pooled, device=_DEVICE)
    return Rows(model, values)


def encoding_prompts(encoder: Any, stored: str, length: int, count: int = 1, *, learns: bool = False) -> int:
    """Return the bytes that a text encoder takes beside its weights to encode ``count`` prompts, padded to ``length``
    tokens or as many as it reads; with those for the backward pass if it learns."""
    module = deepcopy(encoder)
    read = getattr(module.config.get_text_config(), "max_position_embeddings", length)
    with _counted(module, stored) as live, torch.set_grad_enabled(learns):
        tokens = torch.ones(count, min(length, read), dtype=torch.long, device=_DEVICE)
        module(input_ids=tokens, output_hidden_states=True)
    return live.peak


def encoding_images(vae: Any, stored: str, size: tuple[int, int]) -> tuple[int, tuple[int, ...]]:
    """Return the bytes that an autoencoder takes beside its weights to encode an image, and (C, h, w) of the latent.

    Args:
        size: (height, width) of the image in pixels.
    """
    module = deepcopy(vae)
    channels = vae.config.get("in_channels") or vae.config.get("input_channels") or 3
    with _counted(module, stored) as live, torch.no_grad():
        images = torch.empty(1, channels, *size, dtype=module.dtype, device=_DEVICE)
        raw = encoded(module, images.unsqueeze(2) if of_videos(vae) else images)[0]
        latent = F.pixel_unshuffle(raw.squeeze(2) if of_videos(vae) else raw, _cells(vae))
    return live.peak, tuple(latent.shape[1:])
