"""A model in one file: ``.safetensors`` or ``.gguf``, opened by diffusers' own ``from_single_file``.

Which pipeline a file belongs to is in ``config``, a pipeline folder or hub id; without it, diffusers recognises the
weights and names a hub repository. Components that the file lacks come from there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, few, with_article
from ..utils.components import library_reads
from ..utils.single_files import DOWNLOAD, check_single_file, is_original
from ..utils.weight_files import weight_files
from . import FAMILIES, SIBLINGS, family_of
from .index import hub_options, pipeline_class, read_index
from .left_out import what_to_do
from .model import FlowModel
from .original import import_pipeline, kind_of, read_weights
from .weights import single_file_options

_CONFIG = "Give its pipeline's folder or hub id: --checkpoint-config FOLDER; in Python, config=FOLDER."
_FOLDER = "Give its pipeline folder, as diffusers saves it: --checkpoint FOLDER."


def open_single_file(
    file: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    family_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> FlowModel:
    """Open a pretrained model; see `FlowModel.from_single_file`."""
    path = Path(file)
    if options.get("vae") is not None and is_original(path):
        return FAMILIES["LatentFlowPipeline"](_original(path, **options), **(family_options or {}))
    shapes = check_single_file(path, config)
    options = single_file_options(path, options)
    source = recognised(path, shapes) if config is None else str(config)
    kind = str(pipeline_class(source, **options))
    family = family_of(kind)
    if kind.startswith("LatentFlow"):
        raise UserError(
            f"{source} is a checkpoint of latentflow", "Its folder is the checkpoint: give it alone."
        )
    if family is None:
        raise UserError(f"{path} belongs to {with_article(kind)}, which has no family", what_to_do(kind))
    index = read_index(source, **options)
    network = next((name for name in ("transformer", "unet") if name in index), None)
    if network is None:
        raise UserError(f"{source} names no network in its index", _CONFIG)
    inside = {network, *_others_inside(index, shapes)}
    if inside == {network}:
        parts = {network: _network(path, source, network, str(index[network][1]), options)}
        pipeline = family.open_pipeline(source, **options, **parts)
    else:
        absent = _components_outside(family, path, source, index, inside, options)
        pipeline = _whole(kind, path, source, absent, options)
    return family(pipeline, **(family_options or {}))


def recognised(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the hub id of the pipeline that diffusers takes the weights for.

    Raises:
        UserError: it takes them for none, or its index cannot be fetched.
    """
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        model = single_file_utils.infer_diffusers_model_type(weights)
    except (LookupError, RuntimeError, ValueError, UnboundLocalError):  # it reads weights that are not there
        model = "v1"
    # Its answer for all that it does not know.
    if model == "v1" and single_file_utils.CHECKPOINT_KEY_NAMES["v1"] not in weights:
        raise UserError(f"{file}: diffusers does not say of which model these weights are", _CONFIG)
    repository: str = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[model][
        "pretrained_model_name_or_path"
    ]
    try:
        pipeline_class(repository)
    except UserError as error:
        raise UserError(
            f"{file} is a model like {repository}, whose configuration cannot be fetched from the hub",
            _CONFIG,
        ) from error
    return repository


def _original(
    file: Path, vae: str, kind: str = "auto", class_names: Sequence[str] | None = None, **other: Any
) -> Any:
    """Return the pipeline of original weights of SiT and the like; see `import_pipeline`."""
    if other:
        raise UserError(
            f"{file} holds original weights, which take no {next(iter(other))}",
            "Give vae, kind and class_names.",
        )
    weights = read_weights(file)
    return import_pipeline(
        weights, kind_of(weights, file.name) if kind == "auto" else kind, str(vae), class_names
    )


def _others_inside(index: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield the names of the components beside the network whose weights a file has."""
    if any(name.startswith(tuple(single_file_utils.LDM_VAE_KEYS)) for name in shapes):
        yield "vae"
    kinds = {
        "text_encoder": ("clip", "clip_sdxl", "clip_sd3", "open_clip", "open_clip_sdxl_refiner"),
        "text_encoder_2": ("open_clip_sdxl", "open_clip_sd3"),
    }
    for name, (_, kind) in _components(index).items():
        if kind == "T5EncoderModel":
            found = single_file_utils.is_t5_in_single_file(shapes)
        else:
            names = single_file_utils.CHECKPOINT_KEY_NAMES
            found = "CLIP" in kind and any(names[layout] in shapes for layout in kinds.get(name, ()))
        if found:
            yield name


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return name -> (module, class) of the components in a pipeline's index."""
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: (str(module), str(kind)) for name, (module, kind) in pairs.items() if module}


def _components_outside(
    family: type[FlowModel],
    file: Path,
    source: str,
    index: Mapping[str, Any],
    inside: set[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the autoencoder and text encoders that a file lacks, from its pipeline.

    diffusers would take none from there: it looks for files of weights by the names of its own networks.
    """
    lacking = [name for name in _components(index) if name == "vae" or name.startswith("text_encoder")]
    lacking = [name for name in lacking if name not in inside and name not in options]
    absent: dict[str, Any] = {}
    # Stable Diffusion 3 draws without its third text encoder, which most files leave out.
    local = Path(source).is_dir()
    if local and "text_encoder_3" in lacking and weight_files(Path(source, "text_encoder_3"), None) is None:
        warnings.warn(f"{file} has no third text encoder (T5): prompts are encoded without it.", stacklevel=4)
        lacking.remove("text_encoder_3")
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    if lacking:
        rest = family.open_pipeline(source, **{**options, **dict.fromkeys(inside), **absent})
        absent |= {name: getattr(rest, name) for name in lacking}
    return absent


def _whole(kind: str, file: Path, source: str, absent: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Open a file that holds the autoencoder or text encoders beside the network.

    Args:
        absent: the components that it lacks.
    """
    stock = getattr(diffusers, SIBLINGS.get(kind, kind), None)
    if stock is None or not hasattr(stock, "from_single_file"):
        raise UserError(f"{file}: diffusers opens no single file of a whole {kind}", _FOLDER)
    with weights_that_fit(file):
        pipeline = stock.from_single_file(str(file), config=source, **{**_with_dtype(options), **absent})
    parts: dict[str, Any] = pipeline.components
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part.eval()  # diffusers leaves a T5 encoder with its dropout, and embeddings that are tied without values
            if isinstance(part, PreTrainedModel):
                part.tie_weights()
            if lacking := [weight for weight, value in part.named_parameters() if value.is_meta]:
                raise UserError(f"{file}: {name} lacks weights: {few(lacking, 3)}", DOWNLOAD)
    return pipeline


def _network(file: Path, source: str, name: str, kind: str, options: Mapping[str, Any]) -> Any:
    """Open a file that holds the network alone, of the class ``kind`` of diffusers."""
    network = getattr(diffusers, kind, None)
    if network is None or kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(f"{file}: diffusers opens no single file of {with_article(kind)}", _FOLDER)
    given = _with_dtype({**hub_options(options), **_dtype(options)})
    if file.suffix.lower() == ".gguf":
        given |= {"torch_dtype": torch.bfloat16, **_dtype(options)}
        given["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=given["torch_dtype"])
    with weights_that_fit(file):
        return network.from_single_file(str(file), config=source, subfolder=name, **given)


def _dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the precision that is asked for, by the name that ``from_single_file`` has always had."""
    given = options.get("dtype", options.get("torch_dtype"))
    return {} if given is None else {"torch_dtype": given}


def _with_dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with a precision: float32 where none is asked for, as folders are opened."""
    plain = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
    return {"torch_dtype": torch.float32, **plain, **_dtype(options)}


@contextmanager
def weights_that_fit(file: Path) -> Iterator[None]:
    """Refuse, within the context, weights that do not fit: diffusers leaves out those for which there is no place.

    Raises:
        UserError: weights are left over or missing, or the file cannot be read.
    """
    unused: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _, found, names = record.getMessage().partition("were not used when initializing")
            if found:
                unused.extend(names.partition("['")[2].rstrip("\n ]'").split(", "))

    logger, listener = logging.getLogger("diffusers.loaders.single_file_model"), Listener()
    before = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with library_reads(file, fix=f"Is it of this pipeline? {_CONFIG}"):
            try:
                yield
            except NotImplementedError as error:  # of weights that have no values
                if "meta tensor" not in str(error):
                    raise
                raise UserError(f"{file} lacks weights that its pipeline's network has", _CONFIG) from error
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    if unused:
        raise UserError(f"{file}: its pipeline has no place for weights: {few(sorted(unused), 3)}", _CONFIG)
