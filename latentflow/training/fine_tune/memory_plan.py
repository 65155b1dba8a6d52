"""Memory that fine-tuning a pretrained model takes, counted from its configs before anything else is fetched.

A run has three phases. The text encoders turn the prompts into embeddings, then the autoencoder turns the images into
latents, and both are dropped; then the network is loaded and trained. Weights, gradients, moments and averages are
counted from shapes; what a computation holds on its way is simulated (`step_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
from torch import nn

from ...config import RunConfig
from ...errors import UserError
from ...families.pretrained import PretrainedModel
from ...families.stored_weights import QUANTISED, parameter_count, stored_bytes
from ...families.text_encoders import TEXT_ENCODERS
from ...pipeline.stock_adapters import adapted_encoders
from ..loop.distributed import process_state
from ..loop.optimizers import adam_bytes
from .adapters import chosen_layers
from .pretrained_adapter import LAYERS_OF_CLIP, compute_as_base
from .step_memory import NotCountedError, encoding_images, encoding_prompts, training_step

T = TypeVar("T")
GIB = 2**30
#: memory of graphics cards as they are sold, "GB" (which are GiB)
CARDS = (12, 16, 24, 48, 80)
#: GiB that a run cannot use: CUDA's context, workspaces of its libraries, gaps between blocks of the allocator
RESERVED = 1.0
#: changes that save memory, those that cost least first: flags, and the settings that they change
SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gradient-checkpointing", {"gradient_checkpointing": True}),
    ("--optimizer adamw-8bit", {"optimizer": "adamw-8bit"}),
    ("--train-batch-size 1", {"batch_size": 1}),
    ("--lora-rank 16", {"lora_rank": 16}),
    ("--quantize nf4", {"base": "nf4", "encoders": "nf4"}),
    ("--resolution 768", {"resolution": 768}),
    ("--resolution 512", {"resolution": 512}),
)


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The settings of a fine-tuning run that its memory depends on.

    Attributes:
        lora_rank: 0 trains all weights.
        lora_layers: names of layers with an adapter, as in `AdapterConfig`.
        base: how the frozen weights of the network are stored, one of `STORED`; those that learn are float32.
        encoders: how the text encoders are stored; CLIP's, which are small, are not quantised.
        autoencoder: how the autoencoder is stored, "float32" or "bfloat16".
        optimizer: "adamw" or "adamw-8bit".
        gradient_checkpointing: compute each block again in the backward pass.
        batch_size: images of a forward pass.
        resolution: pixels of a side of an image.
        averages: moving averages of the weights that learn, in float32.
        lora_text_encoder: CLIP's text encoders learn by adapters too; then all text encoders stay.
        inpainting: each step encodes its images with holes; then the autoencoder stays.
    """

    lora_rank: int = 16
    lora_layers: tuple[str, ...] = ("attention",)
    base: str = "bfloat16"
    encoders: str = "bfloat16"
    autoencoder: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    batch_size: int = 1
    resolution: int = 1024
    averages: int = 1
    lora_text_encoder: bool = False
    inpainting: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a fine-tuning run by part.

    Attributes:
        base: weights of the network.
        adapter: weights of the adapter; 0 where all weights learn.
        gradients, optimizer, averages: of the weights that learn.
        kept: text encoders that stay while the network learns.
        autoencoder: likewise.
        activations: the most that a step holds beside all these; None where that cannot be counted.
        prompts: peak while prompts are encoded; 0 where that is a part of each step.
        images: peak while images are encoded.
    """

    base: float
    adapter: float
    gradients: float
    optimizer: float
    averages: float
    kept: float
    autoencoder: float
    activations: float | None
    prompts: float
    images: float

    @property
    def training(self) -> float:
        """Peak while the network learns."""
        parts = (self.base, self.adapter, self.gradients, self.optimizer, self.averages)
        return sum(parts) + self.kept + self.autoencoder + (self.activations or 0.0)

    @property
    def peak(self) -> float:
        """Peak of the run."""
        return max(self.prompts, self.images, self.training)


class MemoryPlanner:
    """Counts the memory of runs that fine-tune one model; the same computation is simulated once.

    Args:
        model: on the meta device, see `latentflow.families.from_configs`.
    """

    def __init__(self, model: PretrainedModel) -> None:
        self.model = model
        parts = model.pipeline.components.items()
        self.encoders: list[nn.Module] = [
            part for name, part in parts if name.startswith(TEXT_ENCODERS) and isinstance(part, nn.Module)
        ]
        self._adapted = [*adapted_encoders(model.pipeline).values()]
        self._found: dict[Hashable, Any] = {}

    def plan(self, settings: FineTuning) -> MemoryPlan:
        """Return the memory of a run.

        Raises:
            UserError: a quantised network is to learn; no layers have such names.
        """
        weights, activations = self.weights(settings), self._activations(settings)
        prompts, image = self._prompts(settings), self._image(settings)[0]
        images = weights.images + image
        if settings.inpainting and activations is not None:
            activations = max(activations, settings.batch_size * image)
        if not settings.lora_text_encoder:
            return replace(weights, activations=activations, prompts=weights.prompts + prompts, images=images)
        if activations is not None:
            activations = max(activations + self._learning_prompts(settings), prompts)
        kept = weights.prompts
        return replace(weights, kept=kept, activations=activations, prompts=0, images=kept + images)

    def weights(self, settings: FineTuning) -> MemoryPlan:
        """Return the memory of a run without what its computations hold on their way.

        Raises:
            UserError: as for `plan`.
        """
        full = settings.lora_rank == 0
        if full and settings.base in QUANTISED:
            raise UserError(
                f"all weights are to learn, which those in {settings.base} cannot",
                "Train an adapter (--lora-rank 16), or leave the quantisation out.",
            )
        learn = self._learning(settings)
        eight_bit = settings.optimizer == "adamw-8bit"
        return MemoryPlan(
            base=self._weights(self.model.network, "float32" if full else settings.base),
            adapter=0 if full else 4 * sum(learn),
            gradients=4 * sum(learn),
            optimizer=sum(adam_bytes(size, eight_bit=eight_bit) for size in learn),
            averages=4 * settings.averages * sum(learn),
            kept=0,
            autoencoder=settings.inpainting * self._weights(self.model.vae, settings.autoencoder),
            activations=0,
            prompts=sum(self._weights(part, _stored(part, settings)) for part in self.encoders),
            images=self._weights(self.model.vae, settings.autoencoder),
        )

    def fitting(self, settings: FineTuning, gib: float) -> tuple[list[str], MemoryPlan] | None:
        """Return the flags with which a run fits into a card of ``gib``, as few as suffice, and its memory; None if it
        does not fit with all of `SAVINGS`."""

        def fits(changes: Sequence[int]) -> bool:
            changed, room = _changed(settings, changes), (gib - RESERVED) * GIB
            if changed.lora_rank == 0 and changed.base in QUANTISED:  # what is quantised cannot learn
                return False
            return self.weights(changed).peak <= room and self.plan(changed).peak <= room

        useful = [number for number, (_, change) in enumerate(SAVINGS) if _saves(settings, change)]
        taken: list[int] = []
        for number in useful:
            if fits(taken):
                break
            taken.append(number)
        if not fits(taken):
            return None
        for number in [*taken]:  # one that came too early
            if fits(fewer := [other for other in taken if other != number]):
                taken = fewer
        return [SAVINGS[number][0] for number in taken], self.plan(_changed(settings, taken))

    # ---------------------------------------------------------------- lines for people

    def lines(self, settings: FineTuning) -> list[str]:
        """Return the lines that say what a run takes, and on which cards it fits.

        Raises:
            UserError: as for `plan`.
        """
        plan, side, full = self.plan(settings), settings.resolution, settings.lora_rank == 0
        billions = parameter_count(self.model.network) / 1e9
        parts = {
            f"network, {billions:.1f} B parameters, {'float32' if full else settings.base}": plan.base,
            "adapter": plan.adapter,
            "gradients": plan.gradients,
            f"optimiser, {settings.optimizer}": plan.optimizer,
            "moving averages": plan.averages,
            "text encoders": plan.kept,
            "autoencoder": plan.autoencoder,
            "activations": plan.activations,
            "in all": plan.training,
        }
        width = max(map(len, parts))
        prompts = f"{_gib(plan.prompts)} to encode the prompts, " if plan.prompts else ""
        before = f"before that, without the network: {prompts}{_gib(plan.images)} to encode the images"
        return [
            f"memory to train {'all weights' if full else f'an adapter of rank {settings.lora_rank}'} on "
            f"{settings.batch_size} x {side} x {side} pixels a step, "
            f"{'with' if settings.gradient_checkpointing else 'without'} gradient checkpointing, in GiB:",
            *(f"  {name:{width}}  {_gib(size):>7}" for name, size in parts.items() if size != 0),
            before,
            *(f"{gib} GB: {self._fit(settings, plan, gib)}" for gib in CARDS),
            f"{RESERVED:g} GiB of each card is left to CUDA itself. All this is counted from the model's configs, not "
            "measured.",
        ]

    def _fit(self, settings: FineTuning, plan: MemoryPlan, gib: int) -> str:
        """Return whether a run fits into a card, and with which flags."""
        left = (gib - RESERVED) * GIB - plan.peak
        if plan.activations is None and left > 0:
            return f"{_gib(left)} GiB are left for activations, which cannot be counted for this model"
        found = None if plan.activations is None else self.fitting(settings, gib)
        if found is None:
            return "does not fit"
        flags, least = found
        return f"fits with {' '.join(flags)} ({_gib(least.peak)} GiB)" if flags else "fits"

    # ---------------------------------------------------------------- what is simulated

    def _weights(self, module: nn.Module, stored: str) -> float:
        """Return the bytes of the weights of a component; the scales of nf4 are quantised as well."""
        return self._once((id(module), stored), lambda: stored_bytes(module, stored, double=True))

    def _learning(self, settings: FineTuning) -> list[int]:
        """Return the numbers of elements of the parameters that learn."""

        def count() -> list[int]:
            parts = [deepcopy(self.model.network)]
            _learn(parts[0], settings)
            if settings.lora_text_encoder:
                parts += [_with_adapter(part, settings) for part in self._adapted]
            return [weight.numel() for part in parts for weight in part.parameters() if weight.requires_grad]

        key = ("learn", settings.lora_rank, settings.lora_layers, settings.lora_text_encoder)
        return self._once(key, count)

    def _prompts(self, settings: FineTuning) -> int:
        """Return the bytes that encoding one prompt holds beside weights; all of a step where they are encoded then."""
        together = settings.batch_size if settings.lora_text_encoder else 1

        def count() -> int:
            length = self.model.prompt_tokens
            return max(
                (encoding_prompts(part, _stored(part, settings), length, together) for part in self.encoders),
                default=0,
            )

        return self._once(("prompts", settings.encoders, together), count)

    def _learning_prompts(self, settings: FineTuning) -> int:
        """Return the bytes that text encoders which learn hold beside weights, for their backward pass."""

        def count() -> int:
            return sum(
                encoding_prompts(
                    _with_adapter(part, settings),
                    _stored(part, settings),
                    self.model.prompt_tokens,
                    settings.batch_size,
                    learns=True,
                )
                for part in self._adapted
            )

        return self._once(
            ("learning prompts", settings.encoders, settings.batch_size, settings.lora_rank), count
        )

    def _image(self, settings: FineTuning) -> tuple[int, tuple[int, ...]]:
        """Return the bytes that encoding one image holds beside weights, and the shape of its latent."""
        side, stored = settings.resolution, settings.autoencoder
        return self._once(
            ("image", side, stored), lambda: encoding_images(self.model.vae, stored, (side, side))
        )

    def _activations(self, settings: FineTuning) -> float | None:
        """Return the bytes that a step holds beside weights, gradients and the optimiser; None if that is unknown."""
        saves = self.model.network._supports_gradient_checkpointing and settings.gradient_checkpointing
        step = (settings.base, settings.batch_size, settings.resolution, saves)

        def count() -> float | None:
            try:
                return training_step(
                    self.model,
                    partial(_learn, settings=settings),
                    stored=settings.base if settings.lora_rank else "float32",
                    batch_size=settings.batch_size,
                    latent_shape=self._image(settings)[1],
                    text_length=self.model.prompt_tokens,
                    checkpointing=saves,
                    autocast=not settings.lora_rank or settings.base == "float32",
                ).peak
            except NotCountedError:
                return None

        return self._once(("step", settings.lora_rank, settings.lora_layers, *step), count)

    def _once(self, key: Hashable, count: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = count()
        found: T = self._found[key]
        return found


def _learn(network: nn.Module, settings: FineTuning) -> None:
    """Let the weights of a network learn, or put an adapter beside them that does."""
    network.requires_grad_(settings.lora_rank == 0)
    if settings.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        layers = [*chosen_layers(network, settings.lora_layers)]
        inject_adapter_in_model(LoraConfig(r=settings.lora_rank, target_modules=layers), network)
        compute_as_base(network)


def _with_adapter(encoder: nn.Module, settings: FineTuning) -> nn.Module:
    """Return a copy of a text encoder with an adapter, whose weights alone learn."""
    from peft import LoraConfig, inject_adapter_in_model

    copied = deepcopy(encoder).requires_grad_(False)
    layers = LoraConfig(r=settings.lora_rank, target_modules=[*LAYERS_OF_CLIP])
    inject_adapter_in_model(layers, copied)
    compute_as_base(copied)
    return copied


def _stored(encoder: nn.Module, settings: FineTuning) -> str:
    small = type(encoder).__name__.startswith("CLIP") and settings.encoders in QUANTISED
    return "bfloat16" if small else settings.encoders


def _saves(settings: FineTuning, change: dict[str, Any]) -> bool:
    """Return whether a change of `SAVINGS` makes a run smaller."""
    if "lora_rank" in change:
        return settings.lora_rank == 0
    if "resolution" in change:
        return bool(change["resolution"] < settings.resolution)
    return replace(settings, **change) != settings


def _changed(settings: FineTuning, numbers: Iterable[int]) -> FineTuning:
    for number in numbers:
        settings = replace(settings, **SAVINGS[number][1])
    return settings


def plan_of(config: RunConfig, dtype: torch.dtype) -> FineTuning:
    """Return the settings of a run that its memory depends on.

    Args:
        dtype: precision of the network's weights where they are frozen.
    """
    stored = config.fine_tuning.quantize or str(dtype).removeprefix("torch.")
    return FineTuning(
        lora_rank=config.adapter.lora_rank,
        lora_layers=config.adapter.lora_layers,
        base=stored,
        encoders="float32" if stored == "float16" else stored,
        optimizer="adamw-8bit" if config.loop.optimizer == "adamw-8bit" else "adamw",
        gradient_checkpointing=config.network.gradient_checkpointing,
        batch_size=config.loop.train_batch_size,
        resolution=config.data.resolution,
        lora_text_encoder=config.adapter.lora_text_encoder,
        inpainting=config.flow.inpainting,
    )


def refuse_too_large(
    shape: PretrainedModel, config: RunConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a run that the memory of the device cannot hold, before anything is fetched or read.

    Nothing is refused of a run that is spread over several devices: each holds a part of it.

    Raises:
        UserError: it cannot; names flags with which it can, if there are any.
    """
    if config.loop.shard and int(process_state().num_processes) > 1:
        return
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory / GIB
    elif device.type == "cpu":
        room = psutil.virtual_memory().total / GIB
    else:
        return
    planner, settings = MemoryPlanner(shape), plan_of(config, dtype)
    if config.loop.auto_micro_batch:  # a step that does not fit is taken image by image
        settings = replace(settings, batch_size=1)
    if planner.weights(settings).peak * settings.batch_size < (room - RESERVED) * GIB / 4:  # far from it
        return
    plan = planner.plan(settings)
    if plan.peak <= (room - RESERVED) * GIB:
        return
    found = planner.fitting(settings, room)
    raise UserError(
        f"this run takes {plan.peak / GIB:.1f} GiB of memory, and {device} has {room:.1f} "
        "(--dry-run counts it, part by part)",
        f"It fits with {' '.join(found[0])}." if found else "No flag that saves memory makes it fit.",
    )


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f}"
