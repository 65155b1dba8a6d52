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

from ..errors import UserError, few
from ..utils.components import library_reads
from ..utils.single_files import check_single_file, is_original
from ..utils.weight_files import weight_files
from . import FAMILIES, SIBLINGS, family_of
from .index import hub_options, pipeline_class, read_index
from .left_out import what_to_do
from .model import FlowModel
from .original import import_pipeline, kind_of, read_weights

_CONFIG = "Give its pipeline's folder or hub id: --checkpoint-config FOLDER; in Python, config=FOLDER."
_FOLDER = "Give its pipeline folder, as diffusers saves it: --checkpoint FOLDER."
#: beginnings of names in files that hold more than the network
_OTHERS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
_T5 = "text_encoders.t5xxl.transformer.shared.weight"


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
    source = recognised(path, shapes) if config is None else str(config)
    kind = str(pipeline_class(source, **options))
    family = family_of(kind)
    if kind.startswith("LatentFlow"):
        raise UserError(
            f"{source} is a checkpoint of latentflow", "Its folder is the checkpoint: give it alone."
        )
    if family is None:
        raise UserError(f"{path} belongs to a {kind}, which has no family", what_to_do(kind))
    if any(name.startswith(_OTHERS) for name in shapes):
        pipeline = _whole(kind, path, source, shapes, options)
    else:
        pipeline = family.open_pipeline(source, **options, **_network(kind, path, source, options))
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


def _whole(
    kind: str, file: Path, source: str, shapes: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]
) -> Any:
    """Open a file that holds the autoencoder or text encoders beside the network."""
    stock = getattr(diffusers, SIBLINGS.get(kind, kind))
    if not hasattr(stock, "from_single_file"):
        raise UserError(f"{file}: diffusers opens no single file of a whole {kind}", _FOLDER)
    given = _with_dtype(options)
    # Stable Diffusion 3 draws without its third text encoder, which most files leave out.
    needed = "text_encoder_3" in read_index(source, **options) and "text_encoder_3" not in options
    if needed and _T5 not in shapes and weight_files(Path(source, "text_encoder_3"), None) is None:
        warnings.warn(f"{file} has no third text encoder (T5): prompts are encoded without it.", stacklevel=4)
        given |= {"text_encoder_3": None, "tokenizer_3": None}
    with weights_that_fit(file):
        return stock.from_single_file(str(file), config=source, **given)


def _network(kind: str, file: Path, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Open a file that holds the network alone; return it by the name that it has in its pipeline."""
    index = read_index(source, **options)
    name = next((name for name in ("transformer", "unet") if name in index), None)
    network = None if name is None else getattr(diffusers, str(index[name][1]), None)
    if name is None or network is None or network.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(f"{file}: diffusers opens no single file of a {kind}", _FOLDER)
    given = _with_dtype({**hub_options(options), **_dtype(options)})
    if file.suffix.lower() == ".gguf":
        given |= {"torch_dtype": torch.bfloat16, **_dtype(options)}
        given["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=given["torch_dtype"])
    with weights_that_fit(file):
        return {name: network.from_single_file(str(file), config=source, subfolder=name, **given)}


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
            yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    if unused:
        raise UserError(f"{file}: its pipeline has no place for weights: {few(sorted(unused), 3)}", _CONFIG)
