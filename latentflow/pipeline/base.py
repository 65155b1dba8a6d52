"""The common part of latentflow's pipelines: components, saving and loading, and images from latents.

Checkpoints are safetensors only, whole and fitting, and no code of a checkpoint's is executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, SchedulerMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoder import downscale_factor
from ..autoencoder.latents import check_statistics
from ..errors import UserError, reason
from ..families import FAMILIES
from ..families.few_steps import FewSteps
from ..families.latentflow import LatentFlowModel
from ..families.model import Generators, Size
from ..models import MODELS, check_vocabulary, load_tokenizer
from ..utils.components import (
    about,
    component_class,
    library_reads,
    load_module,
    weight_files,
    without_reports,
)
from ..utils.files import (
    MEND,
    check_settings,
    check_types,
    near_folder,
    pipeline_folder,
    read_settings,
    restore_permissions,
)
from .adapters import AdapterMixin
from .arguments import CALLBACK_TENSORS, output_kind
from .sampling import SamplingMixin
from .scheduler import set_grid

#: the pipelines that share one kind of folder
FAMILY = tuple(name for name in FAMILIES if name.startswith("LatentFlow"))
_BASES: dict[str, type] = {
    "vae": ModelMixin,
    "transformer": ModelMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
    "scheduler": SchedulerMixin,
}
# Options of from_pretrained with which diffusers places the networks itself, and so reads them once more.
_PLACING = {"device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config"}


def from_model(name: str) -> Any:
    """Return a property that asks the pipeline's flow model for its attribute ``name``."""
    return property(lambda pipe: getattr(pipe.model, name))


class FlowPipeline(SamplingMixin, AdapterMixin, DiffusionPipeline):  # type: ignore[misc]
    """The common part of the pipelines; not called itself.

    What a checkpoint is conditioned on, and how it is sampled, is asked of its `model`.

    Args:
        vae: autoencoder between images and latents; the statistics of its latents are in its own config.
        transformer: the velocity network, a ``DiT`` or a ``UNet``.
        text_encoder, tokenizer: for captions; None elsewhere, or where embeddings are passed instead.
        scheduler: None means our own solvers. A diffusers flow scheduler steps in their place, unless a call
            names a ``solver``.
        id2label: class id -> name.
        path: the probability path that the network was trained on, a key of ``latentflow.flow.PATHS``. It is sampled
            on the straight path all the same.
        path_options: settings of that path, such as {"beta_max": 12.0}.
        prediction: what the network predicts: "velocity", "data", "noise" or "score".
        coupling: the coupling that it was trained with, a key of ``latentflow.flow.COUPLINGS``. "data-dependent" means
            that inpainting starts from the known latents, with noise in the hole only (arXiv:2310.03725).
        average: the network predicts average velocities (arXiv:2505.13447): by default they lead from time to time of
            the grid, one evaluation a step. A solver that is named integrates its velocities.
        consistency: those average velocities lead to the data only: between steps noise is added again.
        folded_guidance: scale of the guidance that is distilled into the weights; where it is not 1, none is added.
        guidance_channels: guide only so many channels of the latents, the first; None: all.
        step_counts: the numbers of steps, of one evaluation each, that the network was made for, in increasing order;
            by default the last is taken, and another is warned of. Empty: 4 steps of average velocities, and no
            few-step sampling of other networks.

    Raises:
        UserError: components that do not belong together, or settings that are none.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
    _optional_components: ClassVar[Any] = ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"]
    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    takes_text = from_model("takes_text")
    takes_classes = from_model("takes_classes")
    takes_masks = from_model("takes_masks")
    labels = from_model("labels")
    path = from_model("path")
    few_steps = from_model("few_steps")
    usual_guidance = from_model("usual_guidance")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny | VQModel,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scheduler: Any | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON makes the ids strings
        path: str = "condot",
        path_options: dict[str, float] | None = None,
        prediction: str = "velocity",
        coupling: str = "independent",
        average: bool = False,
        consistency: bool = False,
        folded_guidance: float = 1.0,
        step_counts: list[int] | None = None,
        guidance_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_components(vae, transformer, text_encoder, tokenizer, id2label)
        components = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        self.register_modules(vae=vae, transformer=transformer, **components)
        few = FewSteps(
            average=average,
            consistency=consistency,
            folded_guidance=folded_guidance,
            step_counts=tuple(step_counts or ()),
        )
        # Keys as JSON has them, so that the config is the same before and after saving.
        names = None if id2label is None else {str(key): name for key, name in id2label.items()}
        self.register_to_config(
            id2label=names,
            path=path,
            path_options=dict(path_options or {}),
            prediction=prediction,
            coupling=coupling,
            guidance_channels=guidance_channels,
            **few.plain(),
        )
        self.vae_scale_factor = downscale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        _ = self.model  # refuses settings that are none

    @property
    def model(self) -> LatentFlowModel:  # type: ignore[override]
        """The flow model in this pipeline."""
        return LatentFlowModel(self)

    # ---------------------------------------------------------------- images and latents

    def prepare_noise(
        self, count: int, height: int, width: int, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Return the noise (B, C, h, w) of ``count`` images, float32, or ``latents``; `check_noise` has seen both."""
        if latents is not None:
            return latents.to(self._execution_device, torch.float32)
        return self.model.noise(count, height, width, generator)

    def image_size(
        self, height: int | None = None, width: int | None = None, latents: Tensor | None = None
    ) -> Size:
        """Return height and width in pixels: as asked for, else of the given latents, else as in training.

        Raises:
            UserError: none of these is known.
        """
        native = self.model.native_size
        if latents is not None:
            native = latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        if native is None:
            if height is None or width is None:
                raise UserError("this checkpoint does not say its size", "Pass height and width.")
            return height, width
        return native[0] if height is None else height, native[1] if width is None else width

    def canvas_size(self, size: Size) -> Size:
        """Return ``size`` in pixels, rounded up to what the autoencoder and the network's patches divide."""
        unit = self.model.size_multiple
        return -(-size[0] // unit) * unit, -(-size[1] // unit) * unit

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents; see `FlowModel.encode`."""
        return self.model.encode(images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W); see `FlowModel.decode`."""
        return self.model.decode(latents)

    def to_images(self, latents: Tensor, output_type: str = "pil", size: Size | None = None) -> Any:
        """Return latents as a caller wants to have them: "pil", "np", "pt" or "latent"; images cropped to ``size``.

        In a callback that asks for "prediction", ``pipe.to_images(tensors["prediction"])`` is a preview: the images
        that the flow is heading for.
        """
        output_kind("output_type", output_type)
        if output_type == "latent":
            return latents
        images = (self.decode_latents(latents) / 2.0 + 0.5).clamp(0.0, 1.0)
        height, width = size or images.shape[2:]
        return self.to_output(images[:, :, :height, :width], output_type)

    def to_output(self, images: Tensor, output_type: str) -> Any:
        """Return images (B, 3, H, W) in [0, 1] as a caller wants to have them: "pil", "np" or "pt"."""
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))

    def finish_call(self, images: Any, return_dict: bool) -> Any:
        """Return what a call returns, and let go of the components that were brought to the device."""
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ---------------------------------------------------------------- saving and loading

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
        restore_permissions(Path(save_directory))

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
        return pipeline_folder(name_or_path) or Path(cls.download(name_or_path, **kwargs))

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
            raise UserError(
                f"no folder '{name}', and no hub repository of that name could be fetched: {reason(error)}",
                f"{near_folder(Path(name))}Check the spelling and the network; offline, pass a folder that you have "
                "downloaded before.",
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
