"""Saving and loading pipelines: safetensors only, whole and fitting, and no code of a checkpoint's is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoder.latents import check_statistics
from ..errors import UserError
from ..families import FAMILIES
from ..families.latentflow import LatentFlowModel
from ..models import MODELS, check_vocabulary, load_tokenizer
from ..utils.components import (
    about,
    component_class,
    library_reads,
    load_module,
    weight_files,
    without_reports,
)
from ..utils.files import MEND, check_settings, check_types, read_settings
from .scheduler import set_grid

#: the pipelines that share one kind of folder
FAMILY = tuple(name for name, family in FAMILIES.items() if family is LatentFlowModel)
_BASES: dict[str, type] = {
    "vae": ModelMixin,
    "transformer": ModelMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
    "scheduler": SchedulerMixin,
}
# Options of from_pretrained with which diffusers places the networks itself, and so reads them once more.
_PLACING = {"device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config"}


class CheckpointPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A diffusers pipeline that reads and writes our folders."""

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # from_pipe hands over a component only if its very class is named: name every network there is.
        return {**super()._get_signature_types(), "transformer": tuple(MODELS.values())}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline folder; see ``diffusers.DiffusionPipeline.save_pretrained``."""
        # diffusers forgets a component that took the place of None (pipe.scheduler = ...): register it now.
        self.register_modules(**self.components)
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in [Path(save_directory, self.config_name), *Path(save_directory).glob("*/config.json")]:
            _forget_origin(file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline folder or hub id, safetensors only; see ``DiffusionPipeline.from_pretrained``.

        Every weight of every component is from its file, fits the config and is finite.

        Raises:
            UserError: the folder holds no pipeline (one found inside it is named), or one of another kind; there is
                neither a folder nor a reachable hub repository of this name; a file is missing or cannot be read;
                weights and configs do not belong together.
        """
        folder = cls.local_folder(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("use_safetensors", True)
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            # diffusers' models widen half-precision files to float32 by default; transformers' do not.
            kwargs["dtype"] = torch.float32
        index = cls.read_index(folder)
        with without_reports():
            parts = {
                name: cls._load_part(folder, name, entry, kwargs)
                for name, entry in index.items()
                if name in _BASES and name not in kwargs and entry != [None, None]
            }
        if "transformer" not in parts and "transformer" not in kwargs:
            raise UserError(f"{folder / cls.config_name} names no transformer", MEND)
        if _PLACING & kwargs.keys():
            parts = {name: part for name, part in parts.items() if not isinstance(part, nn.Module)}
        with about(folder):
            pipe = super().from_pretrained(str(folder), **parts, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def local_folder(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> Path:
        """Return where the files of a pipeline folder or hub id are; those of the hub are fetched.

        Args:
            name_or_path: folder or hub id.
            kwargs: see `download`.

        Raises:
            UserError: the folder holds no pipeline (one found inside it is named), or there is neither a folder nor a
                reachable hub repository of this name.
        """
        folder = Path(name_or_path)
        if folder.is_dir() and not (folder / cls.config_name).is_file():
            inside = sorted(folder.glob(f"*/{cls.config_name}"))
            fix = f"Did you mean '{inside[0].parent}'?" if inside else "A run's pipeline is in RUN/pipeline."
            raise UserError(f"'{folder}' is not a pipeline folder: it holds no {cls.config_name}", fix)
        if not folder.is_dir() and (len(folder.parts) != 2 or folder.is_absolute()):
            raise UserError(f"no folder '{folder}'", "Check the path; a hub id has the form 'owner/name'.")
        return folder if folder.is_dir() else Path(cls.download(name_or_path, **kwargs))

    @classmethod
    def read_index(cls, folder: Path) -> dict[str, Any]:
        """Return what ``folder``'s model_index.json says: components and settings.

        Raises:
            UserError: it cannot be read, is of another kind of pipeline, or its settings are none of this one's.
        """
        file = folder / cls.config_name
        index = read_settings(file)
        kind = index.get("_class_name")
        if kind not in (*FAMILY, cls.__name__):
            raise UserError(
                f"{folder} is a {kind}, no checkpoint of latentflow"
                if isinstance(kind, str)
                else f"{file} does not say of which class the pipeline is",
                "Give a folder that latentflow has written, such as RUN/pipeline.",
            )
        check_settings(file, index, cls)
        return index

    @classmethod
    def _load_part(cls, folder: Path, name: str, entry: Any, options: dict[str, Any]) -> Any:
        kind = component_class(folder / cls.config_name, name, entry, _BASES[name])
        part = folder / name
        if not part.is_dir():
            raise UserError(f"{folder} lacks the folder of its {name}, '{name}'", MEND)
        if name == "tokenizer":
            return load_tokenizer(kind, part)
        if name == "scheduler":
            file = part / kind.config_name
            check_types(file, read_settings(file), {"num_train_timesteps": int})
            with library_reads(part):
                scheduler = kind.from_pretrained(part)
            with about(part):
                set_grid(scheduler, 4)  # fails where its settings cannot step a flow
            return scheduler
        dtype = options.get("dtype", options.get("torch_dtype"))
        if isinstance(dtype, dict):
            dtype = dtype.get(name, dtype.get("default", torch.float32))
        variant = options.get("variant")
        if variant is not None and not any(part.glob(f"*.{variant}*")):
            variant = None
        if variant is None and weight_files(part, None) is None:
            there = {file.name.split(".")[1].partition("-")[0] for file in part.glob("*.*.safetensors")}
            variant = there.pop() if len(there) == 1 else None  # its only weights
        return load_module(
            kind, part, dtype=dtype, variant=variant, use_safetensors=options["use_safetensors"]
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build a pipeline of this class with the components of another, in the precision that they have.

        diffusers' own would bring them, and with them the other pipeline, to float32.
        """
        if {"dtype", "torch_dtype"} & kwargs.keys():
            return super().from_pipe(pipeline, **kwargs)
        with without_reports():  # diffusers warns of a change of precision, also where there is none
            return super().from_pipe(pipeline, dtype=pipeline.dtype, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """Fetch a hub repository's configs, tokenizer files and safetensors; return their local folder.

        diffusers' own download refuses repositories with components that are not its own. No code is fetched.

        Raises:
            UserError: the repository cannot be reached and is not in the local cache.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        handed_on = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        name = str(pretrained_model_name)
        try:
            return str(
                snapshot_download(
                    name,
                    allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
                    **{key: kwargs[key] for key in handed_on if kwargs.get(key) is not None},
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"no folder '{name}', and no hub repository of that name could be fetched: {reason}",
                "Check the spelling and the network; offline, pass a folder that you have downloaded before.",
            ) from error


def check_components(vae: Any, transformer: Any, text_encoder: Any, tokenizer: Any, names: Any) -> None:
    """Refuse components that cannot work together; any of them may be None.

    Args:
        names: class id -> name.

    Raises:
        UserError: says which two differ, and in what.
    """
    network, autoencoder = (getattr(part, "config", {}) for part in (transformer, vae))
    text = getattr(getattr(text_encoder, "config", None), "hidden_size", None)
    if vae is not None:
        check_statistics(vae)
    if tokenizer is not None and text_encoder is not None:
        check_vocabulary(tokenizer, text_encoder)
    for name, here, other, there in (
        (
            "in_channels",
            network.get("in_channels"),
            "the autoencoder's latents",
            autoencoder.get("latent_channels"),
        ),
        ("text_dim", network.get("text_dim"), "the text encoder's features", text),
    ):
        if None not in (here, there) and here != there:
            raise UserError(
                f"the components do not belong together: the transformer's {name} is {here}, {other} are {there}",
                "Take all folders from one and the same checkpoint.",
            )
    count = network.get("num_classes")
    wrong = [key for key in names or {} if not str(key).isdecimal() or not int(key) < (count or 0)]
    if wrong and transformer is not None:
        raise UserError(
            f"id2label names the class {str(wrong[0])[:60]!r}, but the transformer's num_classes is {count}",
            "Restore model_index.json.",
        )


def register_with_diffusers() -> None:
    """Let stock ``DiffusionPipeline.from_pretrained(folder)`` and the ``AutoPipelineFor...`` Text2Image,
    Image2Image and Inpainting open our checkpoints.

    diffusers looks a pipeline's class up among its own attributes, and a component's class in modules that
    are already imported; this puts ours there. Nothing in the checkpoint's folder is executed. Calling it
    again changes nothing.
    """
    import diffusers
    from diffusers.pipelines import auto_pipeline

    import latentflow  # whose pipelines lie above this file

    for mapping, pipeline in (
        (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, latentflow.LatentFlowPipeline),
        (auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, latentflow.LatentFlowImg2ImgPipeline),
        (auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, latentflow.LatentFlowInpaintPipeline),
    ):
        mapping["latentflow"] = pipeline
        setattr(diffusers, pipeline.__name__, pipeline)


def _forget_origin(file: Path) -> None:
    """Remove the path that a component was loaded from: it says something of this machine only."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
