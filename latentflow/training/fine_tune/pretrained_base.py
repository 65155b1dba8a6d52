"""A pretrained model that a fine-tune starts from: its data, its settings, and its parts, one at a time."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from ...config import AdapterConfig, AutoencoderConfig, FlowConfig, LoopConfig, NetworkConfig, RunConfig
from ...data import Source, find_source, readable, split
from ...errors import UserError, few, with_article
from ...families import FlowModel
from ...families.from_configs import model_from_configs
from ...families.index import pipeline_class, read_index
from ...families.pretrained import PretrainedModel
from ...families.stored_weights import parameter_count
from ...families.text_encoders import TEXT_ENCODERS
from ...flow import TimeDensity
from ...pipeline.stock_adapters import adapted_encoders, adapted_part
from ...utils.components import library_reads, load_module, quiet_libraries
from ...utils.files import pipeline_folder, result_of
from ...utils.flags import parse_options
from ...utils.memory import release_memory
from ...utils.names import as_spelled
from ...utils.weight_files import variants, weight_files
from ..data import DataSplits
from ..loop.distributed import compute_dtype, has_fast_bfloat16, process_state
from ..losses.pretrained import TEXT_ENCODER_RATE
from .defaults import check_shared, held_out_share
from .encoded_prompts import EncodedPrompts
from .pretrained_adapter import check_adapter

#: parameters of a network above which an adapter is trained by default
LARGE = 500_000_000
#: settings with which the usual number of steps and learning rate are those of another run
KEPT = ("lora_rank", "train_batch_size", "gradient_accumulation_steps")
_USUAL_SIDE = 1024  # pixels, of models that do not say which, and at most, by default
_USES = 740  # samples of one image; of n images the cube root of n times as many (docs/guide/fine-tune-pretrained.md)
# components that training never needs
_UNUSED = (*TEXT_ENCODERS, "safety_checker", "image_encoder", "prior")
_NETWORKS = ("transformer", "unet", "unconditional_transformer")
# values of --quantize whose weights autograd keeps in 16 bits as well; bitsandbytes makes them anew
_WIDENED = ("int8", "float8")
# settings of `FlowConfig` that do not belong to the network, and may be chosen
_FREE = ("weighting", "weighting_options", "time_density", "time_options", "condition_dropout")


def is_pretrained(checkpoint: str | None) -> bool:
    """Return whether this is a pipeline of diffusers, not of ours; a run folder, or no pipeline, is none.

    Raises:
        UserError: no pipeline can be read there.
    """
    if checkpoint is None:
        return False
    source = result_of(checkpoint)
    if (Path(source) / "config.yaml").is_file() or Path(source).is_file():
        return False
    kind = str(pipeline_class(source))
    return not kind.startswith("LatentFlow")


@dataclass(frozen=True)
class PretrainedBase:
    """The model that a fine-tune starts from, before its weights are read.

    Attributes:
        name: as the user wrote it.
        folder: of the pipeline; a hub id until `fetched`.
        shape: the model on the meta device.
        options: arguments of the stock pipeline's call in place of their defaults.
    """

    name: str
    folder: str
    shape: PretrainedModel
    options: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: str, family_options: Sequence[str] = ()) -> PretrainedBase:
        """Read the configs of a checkpoint.

        Args:
            family_options: as `FineTuningConfig.family_options`.

        Raises:
            UserError: they cannot be read; or the model draws from images or plans, which training does not give it,
                or has no velocity.
        """
        quiet_libraries()
        folder = result_of(checkpoint)
        options = parse_options(family_options)
        shape = model_from_configs(folder, options)
        kind = f"{checkpoint}, {with_article(type(shape.pipeline).__name__)}, cannot be fine-tuned"
        if shape.takes_masks or shape.extra or shape.needs_images:
            raise UserError(
                f"{kind}: it draws from images", "Start from a text-to-image model of its family."
            )
        if not shape.has_velocity:
            raise UserError(
                f"{kind}: it is a consistency model, which has no velocity",
                "Start from the model that it was distilled from.",
            )
        if shape.follows_plan:
            raise UserError(
                f"{kind}: its network follows a plan of the image, and there are none of your images",
                "Start from a model of another family.",
            )
        return cls(checkpoint, folder, shape, options)

    def fetched(self) -> PretrainedBase:
        """Return the same with its files on this machine."""
        if pipeline_folder(self.folder) is not None:
            return self
        with (
            process_state().main_process_first(),
            library_reads(f"the hub repository '{self.folder}'", fix="Check the name and the network."),
        ):
            found = DiffusionPipeline.download(self.folder, use_safetensors=True)
        return replace(self, folder=str(found))

    @property
    def size(self) -> int:
        """Number of parameters of the network."""
        return parameter_count(self.shape.network)

    @property
    def loads_adapters(self) -> bool:
        """True where diffusers loads adapters into this pipeline."""
        return adapted_part(self.shape.pipeline) is not None

    def lines(self, config: RunConfig, images: int, own_share: float = 1.0) -> list[str]:
        """Describe the fine-tune, for the plan.

        Args:
            config: of `with_base_settings`.
            images: number of images that are trained on.
            own_share: share of the samples that are images of the data.
        """
        loop, defaults, adapter = config.loop, self.shape.training_defaults, config.adapter
        batch = loop.train_batch_size * loop.gradient_accumulation_steps * int(process_state().num_processes)
        uses = own_share * loop.max_train_steps * batch / max(1, images)
        flags = (
            f"--lora-rank {adapter.lora_rank} --learning-rate {loop.learning_rate:g} --lr-scheduler "
            f"{loop.lr_scheduler} --condition-dropout {config.flow.condition_dropout:g}"
        )
        side, quantize = config.data.resolution, config.fine_tuning.quantize
        return [
            f"fine-tuning {self.name}, {with_article(type(self.shape.pipeline).__name__)} whose network has "
            f"{self.size / 1e6:,.0f} M parameters; each image is used about {uses:.{int(uses < 10)}f} times",
            f"settings: {flags} (the family's, unless you gave others; from {defaults.source})",
            f"noise levels: {_density_text(self.shape.training_density(side, side), config.flow)}",
            f"resolution: {side} x {side} pixels{', or as many in another shape' * config.framing.buckets}",
            *([self._encoders_line(loop.learning_rate)] if adapter.lora_text_encoder else []),
            *(
                [_checkpointed(quantize)]
                if quantize in _WIDENED and config.network.gradient_checkpointing
                else []
            ),
        ]

    def _encoders_line(self, rate: float) -> str:
        """Describe the training of text encoders."""
        names = [*adapted_encoders(self.shape.pipeline)]
        return (
            f"text encoders: {' and '.join(names)} {'learn' if len(names) > 1 else 'learns'} too, at the rate "
            f"{TEXT_ENCODER_RATE * rate:g}, {TEXT_ENCODER_RATE:g} of the network's, as in diffusers' own programs; "
            "all text encoders stay in memory and encode the captions in each step"
        )

    # ---------------------------------------------------------------- parts

    @property
    def variant(self) -> str | None:
        """The variant of the weights, such as fp16, where a component has no others."""
        for folder in (Path(self.folder) / name for name in read_index(self.folder)):
            if (there := variants(folder)) and weight_files(folder, None) is None:
                return there[0]
        return None

    def encoded_prompts(self, quantize: str | None, dtype: torch.dtype) -> EncodedPrompts:
        """Return the cache of the prompts of this model's text encoders."""
        index = read_index(self.folder)
        looked_at = self.shape.network.config if self.shape.opens_whole else {}
        networks = (*_NETWORKS, "vae", "scheduler", "safety_checker")
        files = [
            [
                str(path.relative_to(self.folder)),
                path.resolve().name,
                path.stat().st_size,
                path.stat().st_mtime_ns,
            ]
            for name in sorted(index)
            if name not in networks
            for path in sorted((Path(self.folder) / name).glob("*"))
            if path.is_file()
        ]
        return EncodedPrompts(
            {
                "pipeline": str(index.get("_class_name")),
                "files": files,
                "settings": {
                    name: value
                    for name, value in index.items()
                    if not (name.startswith("_") or isinstance(value, list))
                },
                "libraries": [diffusers.__version__, transformers.__version__],
                "dtype": str(dtype),
                "quantize": quantize,
                "options": {name: self.options[name] for name in sorted(self.options)},
                **{name: value for name, value in looked_at.items() if not name.startswith("_")},
            }
        )

    def open_encoders(self, device: torch.device, dtype: torch.dtype, **options: Any) -> FlowModel:
        """Open the text encoders, without the network where the family's pipeline can do without."""
        unused = () if self.shape.opens_whole else (*_NETWORKS, "vae", "safety_checker")
        absent = {name: None for name in read_index(self.folder) if name in unused}
        options = {**absent, **options, "dtype": dtype, "variant": self.variant}
        model = FlowModel.from_pretrained(self.folder, self.options, **options)
        for part in model.pipeline.components.values():
            if isinstance(part, nn.Module) and getattr(part, "hf_quantizer", None) is None:
                part.to(device)
        return model

    def open_autoencoder(self) -> Any:
        """Open the autoencoder, in float32: some overflow in float16."""
        folder = Path(self.folder) / "vae"
        variant = self.variant if weight_files(folder, None) is None else None
        vae: Any = load_module(type(self.shape.vae), folder, use_safetensors=True, variant=variant)
        return vae.float().requires_grad_(False)

    def open_network(self, vae: Any, dtype: torch.dtype, **options: Any) -> PretrainedModel:
        """Open the network, frozen, and the settings of the pipeline, with this autoencoder."""
        unused = {name: None for name in read_index(self.folder) if name.startswith(_UNUSED)}
        absent = {} if self.shape.opens_whole else unused
        options = {**absent, **options, "vae": vae, "dtype": dtype, "variant": self.variant}
        model = FlowModel.from_pretrained(self.folder, self.options, **options)
        assert isinstance(model, PretrainedModel)
        for name in unused:
            setattr(model.pipeline, name, None)
        model.network.requires_grad_(False)
        model.pipeline.register_to_config(_name_or_path=self.name)  # not the cache's folder
        return model


def drawing_precision(model: PretrainedModel, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model draws: weights in float32 compute in bfloat16 where the network bears it."""
    lower = model.dtype == torch.float32 and model.bears_autocast and has_fast_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)


def drop(model: FlowModel) -> None:
    """Take all modules out of a model's pipeline, so that nobody who holds the model holds their memory."""
    for name, part in [*model.pipeline.components.items()]:
        if isinstance(part, nn.Module):
            setattr(model.pipeline, name, None)
    gc.collect()
    release_memory()


# ---------------------------------------------------------------- data


def load_pretrained_data(config: RunConfig, base: PretrainedBase, given: Collection[str]) -> DataSplits:
    """Find and split the images, with a caption each where the model draws from prompts.

    Args:
        given: keys of the settings that no default may change.

    Raises:
        UserError: there are none; or they lack what the model draws from.
    """
    data, shape = config.data, base.shape
    source = readable(find_source(data.data, **data.wanted()))
    if source.precomputed:
        raise UserError(
            f"{data.data} holds latents, and a pretrained model encodes images itself",
            "Give the folder of images: their latents are cached.",
        )
    source = _conditioned(source, base, asked=data.condition)
    if config.adapter.lora_text_encoder and shape.takes_text and source.kind != "text":
        raise UserError(
            f"--lora-text-encoder: {source.name} is used without captions, from which a text encoder would learn",
            "Leave it out, or --condition none.",
        )
    data = replace(data, validation=held_out_share(given, data.validation, len(source)))
    if "resolution" not in given:
        data = replace(data, resolution=usual_side(shape))
    if data.resolution % (multiple := shape.size_multiple):
        nearest = max(1, round(data.resolution / multiple)) * multiple
        raise UserError(
            f"--resolution {data.resolution} is not a multiple of {multiple}, as {base.name} needs",
            f"Use --resolution {nearest}.",
        )
    rows = split(source, data.validation, config.loop.seed, stratify=data.stratify)
    training, validation = map(source.subset, rows)
    return DataSplits(source, training, validation, data, base.folder)


def usual_side(shape: FlowModel) -> int:
    """Return the side in pixels of the squares that a model is fine-tuned on by default."""
    side = _USUAL_SIDE if shape.native_size is None else math.sqrt(math.prod(shape.native_size))
    multiple = shape.size_multiple
    return max(1, int(min(side, _USUAL_SIDE)) // multiple) * multiple


def _conditioned(source: Source, base: PretrainedBase, *, asked: str) -> Source:
    """Return the images with their classes as the model spells them.

    Raises:
        UserError: they lack what the model draws from.
    """
    shape, name = base.shape, base.name
    if shape.takes_text:
        if source.kind != "text" and asked != "none":
            raise UserError(
                f"{source.name} has no captions, and {name} draws from prompts",
                "Write one beside each image (cat.txt beside cat.png), or give all of them one: "
                '--caption "a photo of sks dog". --condition none trains without.',
            )
        if source.kind == "text" and not any(any(captions) for captions in source.all_captions()):
            raise UserError(
                f"all captions of {source.name} are empty",
                'Write some, or give all images one: --caption "a photo of sks dog". --condition none trains without.',
            )
        return source
    if source.kind == "text" or (source.kind != "class" and asked != "none"):
        raise UserError(
            f"{name} draws classes, and {source.name} has {'captions' if source.kind == 'text' else 'none'}",
            "Sort the images into folders named as its classes (--condition class).",
        )
    known = {**dict.fromkeys(shape.classes), **shape.labels}  # a class may have several names
    classes = tuple(as_spelled(label, known) for label in source.classes)
    if unknown := [label for label in classes if label not in known]:
        raise UserError(
            f"{name} has no classes named {few(unknown)}",
            f"It knows {few([*shape.classes], 12)}. Classes cannot be added to a pretrained model.",
        )
    return replace(source, classes=classes)


# ---------------------------------------------------------------- settings


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
    rate = defaults.learning_rate if adapter.lora_rank else defaults.full_learning_rate
    return replace(tuned, network=network, loop=_fitted(config.loop, given, images, rate, adapter, own_share))


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
        if "optimizer" in given:
            raise UserError(
                "--optimizer muon with an adapter: it orthogonalises whole matrices, of which an adapter has factors",
                "Leave it out: adapters are trained with AdamW.",
            )
        loop = replace(loop, optimizer="adamw")
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
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * int(process_state().num_processes)
    steps = math.ceil(_USES * images ** (1 / 3) / (own_share * batch))
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
        (config.flow, FlowConfig(), _FREE),
        (network, NetworkConfig(), ()),
        (config.autoencoder, AutoencoderConfig(), ()),
        (config.text, type(config.text)(), ()),
        (config.routing, type(config.routing)(), ()),
        (config.alignment, type(config.alignment)(), ()),
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
        flags = " ".join(f"--{name.replace('_', '-')}" for name in found)
        raise UserError(
            f"{base.name}, a pretrained model, takes no {flags}",
            f"Leave {'it' if len(found) == 1 else 'them'} out.",
        )


def base_dtype(loop: LoopConfig, adapter: AdapterConfig, device: torch.device) -> torch.dtype:
    """Return the precision of the network's weights: what it computes in where they are frozen, else float32."""
    return compute_dtype(loop.mixed_precision, device) if adapter.lora_rank else torch.float32


def _checkpointed(quantize: str | None) -> str:
    return (
        f"gradient checkpointing: on, as a step would keep a copy of each {quantize} weight in 16 bits without "
        "(--no-gradient-checkpointing)"
    )


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
