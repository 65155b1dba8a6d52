"""A pretrained model that a fine-tune starts from: its parts, one at a time, and the data that suit it."""

from __future__ import annotations

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

from ...config import RunConfig
from ...data import Source, find_source, readable, split
from ...data.control import with_control_checked
from ...data.labels import read_label_file
from ...errors import UserError, check_resolution, few, with_article
from ...families import FlowModel
from ...families.from_configs import model_from_configs
from ...families.index import pipeline_class, read_index
from ...families.pretrained import PretrainedModel
from ...families.stored_weights import parameter_count
from ...families.text_encoders import TEXT_ENCODERS
from ...pipeline.stock_adapters import adapted_part
from ...utils.components import library_reads, load_module, quiet_libraries
from ...utils.files import pipeline_folder, result_of
from ...utils.flags import parse_options
from ...utils.memory import release_memory
from ...utils.names import as_spelled
from ...utils.weight_files import variants, weight_files
from ..data import DataSplits
from ..loop.distributed import has_fast_bfloat16, process_state
from .defaults import held_out_share
from .prompts import EncodedPrompts

_USUAL_SIDE = 1024  # pixels, of models that do not say which, and at most, by default
# components that training never needs
_UNUSED = (*TEXT_ENCODERS, "safety_checker", "image_encoder", "prior")
_NETWORKS = ("transformer", "unet", "unconditional_transformer")


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
            UserError: they cannot be read; or the model edits images or follows plans, which training does not give it,
                or has no velocity.
        """
        quiet_libraries()
        folder = result_of(checkpoint)
        options = parse_options(family_options)
        shape = model_from_configs(folder, options)
        kind = f"{checkpoint}, {with_article(type(shape.pipeline).__name__)}, cannot be fine-tuned"
        if shape.needs_images or (shape.extra and not shape.learns_with_images):
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
    def draws_from(self) -> str:
        """The images beside noise that its network takes: "mask" (with an image), "control" or "none"."""
        return self.shape.image_input

    @property
    def size(self) -> int:
        """Number of parameters of the network."""
        return parameter_count(self.shape.network)

    @property
    def network_name(self) -> str:
        """Name of the component that is the network."""
        components: dict[str, Any] = self.shape.pipeline.components
        return next(name for name, part in components.items() if part is self.shape.network)

    @property
    def loads_adapters(self) -> bool:
        """True where diffusers loads adapters into this pipeline."""
        return adapted_part(self.shape.pipeline) is not None

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
    if "labels" in config.control.control and base.draws_from == "control":
        raise UserError(
            f"--control {' '.join(config.control.control)}: {base.name} draws under control images, not label maps",
            "Save the label maps as images in their labels' colours, and use --control image.",
        )
    if data.masks == "alpha" and not config.flow.inpainting:
        raise UserError(
            f"--masks alpha: masks weight the loss of {base.name}, and these are of what is transparent",
            "Leave it out, or put masks beside the images that are white where it should learn (cat-mask.png); with "
            "--inpainting they are holes, and it learns to fill them.",
        )
    source = readable(find_source(data.data, **data.wanted(), **config.control.wanted()))
    if source.precomputed:
        raise UserError(
            f"{data.data} holds latents, and a pretrained model encodes images itself",
            "Give the folder of images: their latents are cached.",
        )
    labels = (
        read_label_file(config.control.control_labels) if config.control.control_labels else source.labels
    )
    source = with_control_checked(_conditioned(source, base, asked=data.condition), labels)
    if config.adapter.lora_text_encoder and shape.takes_text and source.kind != "text":
        raise UserError(
            f"--lora-text-encoder: {source.name} is used without captions, from which a text encoder would learn",
            "Leave it out, or --condition none.",
        )
    data = replace(data, validation=held_out_share(given, data.validation, len(source)))
    if "resolution" not in given:
        data = replace(data, resolution=usual_side(shape))
    check_resolution(data.resolution, shape.size_multiple, f"{base.name} needs")
    rows = split(source, data.validation, config.loop.seed, stratify=data.stratify)
    training, validation = map(source.subset, rows)
    training = training.with_balanced_classes() if data.balance_classes else training
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
                '--caption "a photo of sks dog". --condition text takes the names of classes (subfolders); '
                "--condition none trains without.",
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
