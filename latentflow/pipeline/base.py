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
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoder import codebook, downscale_factor, latent_channels
from ..autoencoder.latents import check_statistics
from ..errors import UserError, reason, with_article
from ..families import FAMILIES, FlowModel, family_of
from ..families.few_steps import FewSteps
from ..families.index import hub_options, pipeline_class
from ..families.latentflow import LatentFlowModel
from ..families.left_out import what_to_do
from ..models import MODELS, TokenDiT, check_vocabulary, load_tokenizer, settings_of
from ..utils.components import (
    about,
    component_class,
    library_reads,
    load_module,
    without_reports,
)
from ..utils.files import (
    MEND,
    check_settings,
    check_types,
    pipeline_folder,
    read_settings,
    restore_permissions,
)
from ..utils.libraries import DISTRIBUTION
from ..utils.names import near_path
from ..utils.weight_files import check_variant, stored_dtype, variants, weight_files
from .adapters import AdapterMixin
from .arguments import CALLBACK_TENSORS
from .calls import CallMixin
from .over_model import ModelPipeline, over_model
from .prompts import PromptMixin
from .scheduler import set_grid

#: the pipelines that share one kind of folder
FAMILY = tuple(name for name in FAMILIES if name.startswith("LatentFlow"))
_NETWORKS: tuple[type, ...] = (*MODELS.values(), TokenDiT)
_BASES: dict[str, type] = {
    "vae": ModelMixin,
    "transformer": ModelMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
    "scheduler": SchedulerMixin,
}
# Options of from_pretrained with which diffusers places the networks itself, and so reads them once more.
_PLACING = {"device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config"}


class FlowPipeline(PromptMixin, AdapterMixin, DiffusionPipeline):  # type: ignore[misc]
    """The common part of the pipelines; not called itself.

    What a checkpoint is conditioned on, and how it is sampled, is asked of its `model`.

    Args:
        vae: autoencoder between images and latents; the statistics of its latents are in its own config.
        transformer: the velocity network, a ``DiT`` or a ``UNet``; or a ``TokenDiT``, from tokens to logits.
        text_encoder, tokenizer: for captions; None elsewhere, or where embeddings are passed instead.
        scheduler: None means our own solvers. A diffusers flow scheduler steps in their place, unless a call
            names a ``solver``.
        id2label: class id -> name.
        path: the probability path that the network was trained on, a key of ``latentflow.flow.PATHS``. It is sampled
            on the straight path all the same.
        path_options: settings of that path, such as {"beta_max": 12.0}.
        prediction: what the network predicts: "velocity", "data", "noise" or "score"; or "codes", logits of the
            autoencoder's codes.
        coupling: the coupling that it was trained with, a key of ``latentflow.flow.COUPLINGS``. "data-dependent" means
            that inpainting starts from the known latents, with noise in the hole only (arXiv:2310.03725).
        average: the network predicts average velocities (arXiv:2505.13447): by default they lead from time to time of
            the grid, one evaluation a step. A solver that is named integrates its velocities.
        consistency: those average velocities lead to the data only: between steps noise is added again.
        folded_guidance: scale of the guidance that is distilled into the weights; where it is not 1, none is added.
        guidance_channels: guide only so many channels of the latents, the first; None: all.
        usual_guidance: guidance scale of calls that give none; None: 4, of tokens 2.
        trained_null: it has learnt to draw without its condition, from which guidance leads away.
        time_density, time_options: the density of the times that it was trained at, a key of
            ``latentflow.flow.TIME_DENSITIES``, and its settings; a fine-tune keeps them. None: the default ones.
        step_counts: the numbers of steps, of one evaluation each, that the network was made for, in increasing order;
            by default the last is taken, and another is warned of. Empty: 4 steps of average velocities, and no
            few-step sampling of other networks.
        token_path: of a ``TokenDiT``, the path of its tokens: ``source`` and ``kappa``, keys of
            ``latentflow.flow.discrete.SOURCES`` and ``KAPPAS``, and ``kappa_options``.

    Raises:
        UserError: components that do not belong together, or settings that are none.
    """

    #: the class of its calls
    call: ClassVar[type[CallMixin]]
    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = CALLBACK_TENSORS
    _optional_components: ClassVar[Any] = ["vae", "transformer", "text_encoder", "tokenizer", "scheduler"]
    vae: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

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
        usual_guidance: float | None = None,
        time_density: str | None = None,
        time_options: dict[str, float] | None = None,
        token_path: dict[str, Any] | None = None,
        trained_null: bool = True,
    ) -> None:
        super().__init__()
        check_components(vae, transformer, text_encoder, tokenizer, id2label)
        of_tokens = "vocabulary" in settings_of(transformer)
        if transformer is not None and of_tokens != (token_path is not None):
            raise UserError(
                f"a {type(transformer).__name__} with token_path {token_path}",
                "A network of tokens has one, another has none. Restore model_index.json.",
            )
        has_logits = isinstance(transformer, MODELS["dit"]) and transformer.config["out_channels"] is not None
        if prediction == "codes" and not (transformer is None or has_logits):
            raise UserError(
                f"a {type(transformer).__name__} without logits, and prediction 'codes'",
                "Restore model_index.json, or the network's config.json.",
            )
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
            usual_guidance=usual_guidance,
            **({} if token_path is None else {"token_path": dict(token_path)}),
            **({} if trained_null is True else {"trained_null": trained_null}),
            **({} if time_density is None else {"time_density": time_density}),
            **({"time_options": dict(time_options)} if time_options else {}),
            **few.plain(),
        )
        self.vae_scale_factor = downscale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        _ = self.model  # refuses settings that are none

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a pipeline over a flow model of another family, if the first argument is one."""
        if args and isinstance(args[0], LatentFlowModel):
            raise UserError(
                f"{cls.__name__} is given the flow model of a pipeline of latentflow",
                f"Pass that pipeline: {cls.__name__}.from_pipe(model.pipeline).",
            )
        if args and isinstance(args[0], FlowModel):
            return over_model(cls, args[0])
        return super().__new__(cls)

    @property
    def model(self) -> LatentFlowModel:  # type: ignore[override]
        """The flow model in this pipeline."""
        return LatentFlowModel(self)

    # ---------------------------------------------------------------- saving and loading

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # from_pipe hands over a component only if its very class is named: name every network there is.
        return {**super()._get_signature_types(), "transformer": _NETWORKS}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline folder; see ``diffusers.DiffusionPipeline.save_pretrained``."""
        # diffusers forgets a component that took the place of None (pipe.scheduler = ...): register it now.
        self.register_modules(**self.components)
        super().save_pretrained(save_directory, *args, **kwargs)
        self._forget_origins(Path(save_directory))
        restore_permissions(Path(save_directory))

    def _forget_origins(self, folder: Path) -> None:
        for file in [folder / self.config_name, *folder.glob("*/config.json")]:
            _forget_origin(file)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Upload a folder for diffusers' ``push_to_hub``, whose card names our library instead of `diffusers`: for that
        the hub would show a snippet that fails."""
        from huggingface_hub import ModelCard

        self._forget_origins(Path(working_dir))
        card = Path(working_dir, "README.md")
        if card.is_file():
            read = ModelCard.load(card)
            read.data.library_name = DISTRIBUTION
            read.save(card)
        return super()._upload_folder(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline folder or hub id, safetensors only; see ``DiffusionPipeline.from_pretrained``.

        Every weight of every component is from its file, fits the config and is finite. Without ``dtype`` they are
        float32; with a ``variant``, such as "fp16", each component has the type of its file. A component without a file
        of that variant is read from its plain one.

        Raises:
            UserError: the folder holds no pipeline (one found inside it is named), or one of another kind; there is
                neither a folder nor a reachable hub repository of this name; a file is missing or cannot be read; no
                component is of the variant; weights and configs do not belong together.
        """
        if cls._is_foreign(pretrained_model_name_or_path, **kwargs):
            model = FlowModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
            return over_model(cls, model)
        if kwargs.pop("family_options", None):
            raise UserError(
                "family options are given", "latentflow's own checkpoints have none: leave them out."
            )
        folder = cls.local_folder(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("use_safetensors", True)
        index = cls.read_index(folder)
        if kwargs.get("variant") is not None:
            check_variant(folder, [name for name in index if name in _BASES], kwargs["variant"])
        elif kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            # diffusers' models widen half-precision files to float32 by default; transformers' do not.
            kwargs["dtype"] = torch.float32
        with without_reports():
            parts = {
                name: cls._load_part(folder, name, entry, kwargs)
                for name, entry in index.items()
                if name in _BASES and name not in kwargs and entry != [None, None]
            }
        if "transformer" not in parts and "transformer" not in kwargs:
            raise UserError(f"{folder / cls.config_name} names no transformer", MEND)
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if _PLACING & kwargs.keys():
            if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
                kwargs["dtype"] = {name: part.dtype for name, part in networks.items()}
            parts = {name: part for name, part in parts.items() if name not in networks}
        else:
            kwargs.pop("variant", None)  # all that has one is loaded
        with about(folder):
            pipe = super().from_pretrained(str(folder), **parts, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def from_single_file(
        cls, file: str | os.PathLike[str], config: str | os.PathLike[str] | None = None, **options: Any
    ) -> Any:
        """Open a pretrained model in one file; see ``FlowModel.from_single_file``.

        Raises:
            UserError: as that does.
        """
        model = FlowModel.from_single_file(file, config, **options)
        if isinstance(model, LatentFlowModel):  # of original weights of SiT and the like
            return cls.from_pipe(model.pipeline)
        return over_model(cls, model)

    @classmethod
    def _is_foreign(cls, name_or_path: str | os.PathLike[str], **options: Any) -> bool:
        """Return whether a folder or hub repository holds a pipeline of another class than ours."""
        try:
            kind = pipeline_class(name_or_path, **options)
        except UserError:
            if pipeline_folder(name_or_path) is not None:
                raise
            return False  # `download` says why the hub cannot be read
        return isinstance(kind, str) and kind not in (*FAMILY, cls.__name__)

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
                f"{folder} is {with_article(kind)}, no checkpoint of latentflow"
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
        if variant is not None and weight_files(part, variant) is None:
            variant = None
        if variant is None and weight_files(part, None) is None:
            there = variants(part)
            if len(there) > 1:
                fix = f"Pass one, such as variant={there[0]!r}."
                raise UserError(f"{part} holds weights of several variants: {', '.join(there)}", fix)
            variant = there[0] if there else None  # its only weights
        if dtype is None:
            dtype = stored_dtype(part, variant)
        return load_module(
            kind, part, dtype=dtype, variant=variant, use_safetensors=options["use_safetensors"]
        )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build a pipeline of this class with the components of another, each in the precision that it has.

        diffusers' own would bring them, and with them the other pipeline, to one precision.

        Args:
            kwargs: components or settings in the place of the other's; ``dtype``, for all components.
        """
        model: FlowModel | None = None
        if isinstance(pipeline, ModelPipeline):
            model = pipeline.model
        elif not isinstance(pipeline, FlowPipeline) and (family := _family_of_class(type(pipeline))):
            model = family(pipeline)
        if model is not None:
            if kwargs:
                raise UserError(
                    f"{next(iter(kwargs))} is given beside {with_article(type(model.pipeline).__name__)}",
                    "Change that pipeline itself, and pass it alone.",
                )
            return over_model(cls, model)
        network = kwargs.get("transformer", getattr(pipeline, "transformer", None))
        if not isinstance(pipeline, FlowPipeline) and not isinstance(network, _NETWORKS):
            kind = type(pipeline).__name__
            raise UserError(
                f"{with_article(kind)} is none of the {len(FAMILIES)} pipelines that open",
                what_to_do(kind),
            )
        if not isinstance(pipeline, FlowPipeline) and "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        if {"dtype", "torch_dtype"} & kwargs.keys():
            return super().from_pipe(pipeline, **kwargs)
        settings = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
        pipe = cls(**{**settings, **pipeline.components, **kwargs})
        if "_name_or_path" in pipeline.config:
            pipe.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """Fetch a hub repository's configs, tokenizer files and safetensors; return their local folder.

        diffusers' own download refuses repositories with components that are not its own. No code is fetched.

        Raises:
            UserError: the repository cannot be reached and is not in the local cache.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        name = str(pretrained_model_name)
        try:
            return str(
                snapshot_download(
                    name,
                    allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
                    **hub_options(kwargs),
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
            raise UserError(
                f"no folder '{name}', and no hub repository of that name could be fetched: {reason(error)}",
                f"{near_path(name)}Check the spelling and the network; offline, pass a folder that you have "
                "downloaded before.",
            ) from error


def check_components(vae: Any, transformer: Any, text_encoder: Any, tokenizer: Any, names: Any) -> None:
    """Refuse components that cannot work together; any of them may be None.

    Args:
        names: class id -> name.

    Raises:
        UserError: says which two differ, and in what.
    """
    network = settings_of(transformer)
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
            None if vae is None else latent_channels(vae),
        ),
        ("text_dim", network.get("text_dim"), "the text encoder's features", text),
        (
            "vocabulary",
            vocabulary := network.get("vocabulary"),
            "the codes of the autoencoder",
            None if None in (vae, vocabulary) else len(codebook(vae)),
        ),
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


def _family_of_class(kind: type) -> type[FlowModel] | None:
    """Return the family of a pipeline's class, or of the class of diffusers that it derives from."""
    for each in kind.__mro__:
        family = family_of(each.__name__)
        if family is not None or each.__module__.startswith("diffusers."):
            return family
    return None


def _forget_origin(file: Path) -> None:
    """Remove the path that a component was loaded from: it says something of this machine only."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
