"""Settings of a fine-tune of a pretrained model that follow from the model and the data, and the plan's lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from ...config import AdapterConfig, AutoencoderConfig, FlowConfig, LoopConfig, NetworkConfig, RunConfig
from ...errors import UserError, with_article
from ...flow import TimeDensity
from ...pipeline.stock_adapters import adapted_encoders
from ...utils.flags import flag_of
from ..loop.distributed import compute_dtype, process_state, samples_per_step
from ..losses.pretrained import TEXT_ENCODER_RATE
from .defaults import check_shared, without_muon
from .pretrained_adapter import check_adapter
from .pretrained_base import PretrainedBase

#: parameters of a network above which an adapter is trained by default
LARGE = 500_000_000
#: what a base draws from -> the flag of a run that learns with it, and what the base does
_OWN_INPUTS = {
    "mask": ("--inpainting", "fills the hole of an image"),
    "control": ("--control", "draws under a control image"),
}
#: settings with which the usual number of steps and learning rate are those of another run
KEPT = ("lora_rank", "train_batch_size", "gradient_accumulation_steps")
_USES = 740  # samples of one image; of n images the cube root of n times as many (docs/guide/fine-tune-pretrained.md)
# values of --quantize whose weights autograd keeps in 16 bits as well; bitsandbytes makes them anew
_WIDENED = ("int8", "float8")
# settings of `FlowConfig` that do not belong to the network, and may be chosen
_FREE = (
    "weighting", "weighting_options", "time_density", "time_options", "condition_dropout", "inpainting", "mask_shapes"
)  # fmt: skip


def with_base_settings(
    config: RunConfig, base: PretrainedBase, images: int, given: Collection[str], own_share: float = 1.0
) -> RunConfig:
    """Return the settings of a run with those that follow from the model and the data; what is ``given`` stays.

    Args:
        own_share: share of the samples that are images of the data.

    Raises:
        UserError: a setting has no effect on a pretrained model, or contradicts another one; it cannot have such an
            adapter.
    """
    _refuse_unused(config, base)
    defaults = base.shape.training_defaults
    adapter = config.adapter
    if "lora_rank" not in given and base.size > LARGE and base.loads_adapters:
        adapter = replace(adapter, lora_rank=defaults.lora_rank)
    flow = config.flow
    if "condition_dropout" not in given:
        flow = replace(flow, condition_dropout=defaults.condition_dropout)
    tuned = replace(config, adapter=adapter, flow=flow)
    network, checkpoints = config.network, base.shape.network._supports_gradient_checkpointing
    if tuned.fine_tuning.quantize:
        _check_quantised(tuned)
        if "gradient_checkpointing" not in given and tuned.fine_tuning.quantize in _WIDENED:
            network = replace(network, gradient_checkpointing=checkpoints)
    if network.gradient_checkpointing and not checkpoints:
        raise UserError(
            f"--gradient-checkpointing: {type(base.shape.network).__name__} has none", "Leave it out."
        )
    if adapter.lora_rank:
        check_adapter(base.shape, adapter)
    _check_added_inputs(tuned, base, given)
    rate = defaults.learning_rate if adapter.lora_rank else defaults.full_learning_rate
    return replace(tuned, network=network, loop=_fitted(config.loop, given, images, rate, adapter, own_share))


def _check_added_inputs(config: RunConfig, base: PretrainedBase, given: Collection[str]) -> None:
    if config.flow.mask_shapes and not config.flow.inpainting:
        raise UserError(
            "--mask-shapes without --inpainting: masks of the data weight the loss of a pretrained model",
            "Add --inpainting to hide parts of the images, or leave --mask-shapes out.",
        )
    asked = {"--inpainting": "masks"} if config.flow.inpainting else {}
    if config.control.control:
        asked["--control"] = "control images"
    if base.draws_from in _OWN_INPUTS:
        _check_own_input(config, base, given, asked)
        asked = {}
    for flag, inputs in asked.items():
        if getattr(base.shape, "first_layer", None) is None:
            kind = with_article(type(base.shape.pipeline).__name__)
            steered = "; `latentflow inpaint` steers every checkpoint" if flag == "--inpainting" else ""
            raise UserError(
                f"{flag}: {base.name} is {kind}, which cannot be given input channels for {inputs}",
                f"Start from SD3.5, FLUX.1, FLUX.2, Chroma, Qwen-Image, Z-Image, Sana or Lumina2{steered}.",
            )
        if not config.adapter.lora_rank:
            raise UserError(
                f"{flag}: {base.name} learns it in an adapter, and all weights are to be trained",
                f"Add --lora-rank 16: the adapter's file holds the input channels for {inputs} as well.",
            )
    if config.flow.inpainting and "outside_mask" in given:
        raise UserError(
            "--outside-mask with --inpainting: masks are then holes to fill, and errors count everywhere",
            "Leave one of the two out.",
        )


def _check_own_input(
    config: RunConfig, base: PretrainedBase, given: Collection[str], asked: Collection[str]
) -> None:
    """Refuse a run without the images that the base draws from, and what goes with a base that draws without."""
    flag, does = _OWN_INPUTS[base.draws_from]
    kind = f"{base.name}, {with_article(type(base.shape.pipeline).__name__)}, {does}"
    if flag not in asked:
        add = "--control image" if flag == "--control" else flag
        raise UserError(f"{kind}, and does nothing else", f"Add {add}, so that it learns from such images.")
    unfit = {
        "--inpainting": config.flow.inpainting and flag != "--inpainting",
        "--control": bool(config.control.control) and flag != "--control",
        "--coupling data-dependent": config.flow.coupling == "data-dependent",
        "--control-dropout": "control_dropout" in given and config.control.control_dropout > 0,
        "--prior-samples": bool(config.fine_tuning.prior_samples or config.fine_tuning.prior_prompts),
    }
    for name, is_unfit in unfit.items():
        if is_unfit:
            raise UserError(f"{name}: {kind}, and it is trained as it was before", "Leave it out.")


def _check_quantised(config: RunConfig) -> None:
    quantize = config.fine_tuning.quantize
    if not config.adapter.lora_rank:
        raise UserError(
            f"--quantize {quantize}: quantised weights cannot learn, and all are to be trained",
            "Train an adapter (--lora-rank 16), or leave --quantize out.",
        )
    if config.loop.shard and process_state().num_processes > 1:
        raise UserError(
            f"--quantize {quantize} with --shard: quantised weights cannot be spread over processes",
            "Leave one of the two out: without --shard, each process holds all quantised weights.",
        )


def _fitted(
    loop: LoopConfig,
    given: Collection[str],
    images: int,
    rate: float,
    adapter: AdapterConfig,
    own_share: float,
) -> LoopConfig:
    """Return the loop's settings for a pretrained model.

    One image a step, as memory allows, and one of the model's own where it draws some; a constant rate; AdamW's usual
    second decay, which averages over a thousand steps of one image.
    """
    if adapter.lora_rank and loop.optimizer == "muon":
        loop = without_muon(loop, given)
    changes: dict[str, Any] = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1 if own_share == 1 else 2,
        "learning_rate": rate,
        "lr_scheduler": "constant",
        "adam_beta2": 0.999,
        "lr_embeddings": 1.0,
    }
    loop = replace(loop, **{name: value for name, value in changes.items() if name not in given})
    check_shared(loop, own_share)
    steps = math.ceil(_USES * images ** (1 / 3) / (own_share * samples_per_step(loop)))
    if "max_train_steps" in given:
        steps = loop.max_train_steps
    changes = {"max_train_steps": steps, "lr_warmup_steps": min(100, max(1, steps // 10))}
    for name, parts in (("validation_steps", 10), ("preview_steps", 4), ("checkpointing_steps", 4)):
        changes[name] = max(1, steps // parts)
    return replace(loop, **{name: value for name, value in changes.items() if name not in given})


def _refuse_unused(config: RunConfig, base: PretrainedBase) -> None:
    """Refuse settings that a pretrained model decides itself."""
    network = replace(config.network, gradient_checkpointing=False)
    fixed: list[tuple[Any, Any, Collection[str]]] = [
        (config.flow, FlowConfig(), (*_FREE, *["coupling"] * (config.flow.coupling == "data-dependent"))),
        (network, NetworkConfig(), ()),
        (config.autoencoder, AutoencoderConfig(), ()),
        (config.text, type(config.text)(), ()),
        (config.routing, type(config.routing)(), ()),
        (config.alignment, type(config.alignment)(), ()),
        (config.latent_variable, type(config.latent_variable)(), ()),
    ]
    found = [
        name
        for section, plain, free in fixed
        for name in (field.name for field in dataclasses.fields(section))
        if name not in free and getattr(section, name) != getattr(plain, name)
    ]
    found += ["vae"] if config.vae else []
    found += ["latents_as_is"] if config.latents_as_is else []
    found += ["size_conditioning"] if config.framing.size_conditioning else []
    found += ["ema_lengths"] if config.loop.ema_lengths else []
    found += ["lr_layer_decay"] if config.loop.lr_layer_decay != 1.0 else []
    if found:
        flags = " ".join(flag_of(name) for name in found)
        raise UserError(
            f"{base.name}, a pretrained model, takes no {flags}",
            f"Leave {'it' if len(found) == 1 else 'them'} out.",
        )


def base_dtype(loop: LoopConfig, adapter: AdapterConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the network's weights: what it computes in where they are frozen, else float32."""
    return compute_dtype(loop.mixed_precision, device) if adapter.lora_rank else torch.float32


def _density_text(density: TimeDensity, flow: FlowConfig) -> str:
    """Return the density of the noise levels in words."""
    if flow.time_density is not None:
        return f"--time-density {flow.time_density}"
    if flow.weighting is not None:
        return f"those of --weighting {flow.weighting}"
    levels = 1.0 - density.quantile(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    low, middle, high = levels.tolist()
    return (
        f"as the family was trained: a tenth below {low:.2f}, half below {middle:.2f}, a tenth above {high:.2f} (0 is "
        "the image, 1 is noise alone)"
    )


# ---------------------------------------------------------------- the plan


def setting_lines(base: PretrainedBase, config: RunConfig, images: int, own_share: float = 1.0) -> list[str]:
    """Describe the fine-tune, for the plan.

    Args:
        config: of `with_base_settings`.
        images: number of images that are trained on.
        own_share: share of the samples that are images of the data.
    """
    loop, defaults, adapter = config.loop, base.shape.training_defaults, config.adapter
    uses = own_share * loop.max_train_steps * samples_per_step(loop) / max(1, images)
    flags = (
        f"--lora-rank {adapter.lora_rank} --learning-rate {loop.learning_rate:g} --lr-scheduler "
        f"{loop.lr_scheduler} --condition-dropout {config.flow.condition_dropout:g}"
    )
    side, quantize = config.data.resolution, config.fine_tuning.quantize
    recomputed = (
        f"gradient checkpointing: on, as a step would keep a copy of each {quantize} weight in 16 bits without "
        "(--no-gradient-checkpointing)"
    )
    return [
        f"fine-tuning {base.name}, {with_article(type(base.shape.pipeline).__name__)} whose network has "
        f"{base.size / 1e6:,.0f} M parameters; each image is used about {uses:.{int(uses < 10)}f} times",
        f"settings: {flags} (the family's, unless you gave others; from {defaults.source})",
        f"noise levels: {_density_text(base.shape.training_density(side, side), config.flow)}",
        f"resolution: {side} x {side} pixels{', or as many in another shape' * config.framing.buckets}",
        *([_encoders_line(base, loop.learning_rate)] if adapter.lora_text_encoder else []),
        *[recomputed] * (quantize in _WIDENED and config.network.gradient_checkpointing),
    ]


def _encoders_line(base: PretrainedBase, rate: float) -> str:
    """Describe the training of text encoders."""
    names = [*adapted_encoders(base.shape.pipeline)]
    return (
        f"text encoders: {' and '.join(names)} {'learn' if len(names) > 1 else 'learns'} too, at the rate "
        f"{TEXT_ENCODER_RATE * rate:g}, {TEXT_ENCODER_RATE:g} of the network's, as in diffusers' own programs; "
        "all text encoders stay in memory and encode the captions in each step"
    )
