"""The flags for less memory: as options with which a checkpoint is loaded, and as the place where its weights wait."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ..config import MemoryConfig
from ..errors import UserError
from ..utils.files import pipeline_folder, read_settings
from ..utils.libraries import missing
from ..utils.single_files import is_single_file

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig

# Value of --quantize -> the library that computes with such weights.
_LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
# Components that are quantised: networks and language models. CLIP's text encoders are small.
_LARGE = ("transformer", "unconditional_transformer", "unet", "text_encoder", "vision_language_encoder")


def check_memory_flags(memory: MemoryConfig, device: str) -> None:
    """Refuse flags that cannot work on ``device``, torch's name of one.

    Raises:
        UserError: weights are to wait in main memory, but there is no GPU that they would wait for; a library is
            missing; a variant has no name.
    """
    if memory.variant == "":
        raise UserError("--variant is empty", "Name the variant, such as fp16, or leave it out.")
    if memory.offload is not None and device == "cpu":
        raise UserError(
            f"--offload {memory.offload} needs a GPU: without one, all weights are in main memory already",
            "Leave it out. --dtype bfloat16 and --quantize int8 take less of that memory.",
        )
    if memory.quantize is None:
        return
    if memory.quantize == "nf4" and device == "cpu":
        raise UserError("--quantize nf4 needs a GPU", "Give --quantize int8, with which a CPU computes too.")
    library = _LIBRARIES[memory.quantize]
    if importlib.util.find_spec(library) is None:
        raise missing(f"--quantize {memory.quantize} needs", library)


def loading_options(memory: MemoryConfig, source: str, device: str) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that the flags ask for.

    Args:
        memory: the flags.
        source: pipeline folder, hub id or single file.
        device: torch's name of the device that computes.

    Raises:
        UserError: the index of the pipeline cannot be read; a single file has no variants, and is not quantised here.
    """
    import torch

    from ..families.index import pipeline_class

    options: dict[str, Any] = {}
    single = is_single_file(source)
    if single and (memory.variant or memory.quantize):
        raise UserError(
            f"--{'variant' if memory.variant else 'quantize'} is given, but {source} is a single file",
            "Leave it out, or give the pipeline's folder. GGUF files hold weights that are quantised.",
        )
    if memory.dtype != "auto":
        options["dtype"] = getattr(torch, memory.dtype)
    elif single:
        options |= {} if device == "cpu" else {"dtype": "auto"}
    elif device != "cpu" and not str(pipeline_class(source)).startswith("LatentFlow"):
        options["dtype"] = "auto"
    if memory.variant is not None:
        options["variant"] = memory.variant
    if memory.quantize is not None:
        options["quantization_config"] = quantization(memory.quantize, source)
    return options


def decoder_options(memory: MemoryConfig) -> dict[str, Any]:
    """Return the options of ``load_autoencoder`` that the flags ask for, of an autoencoder beside the checkpoint's."""
    import torch

    return {} if memory.dtype == "auto" else {"torch_dtype": getattr(torch, memory.dtype)}


def quantization(kind: str, source: str) -> PipelineQuantizationConfig:
    """Return the settings that quantise the large components of a pipeline folder or hub id.

    Args:
        kind: a value of --quantize.
        source: the folder or hub id.
    """
    import diffusers
    import torch
    import transformers

    folder = pipeline_folder(source)
    index = (
        diffusers.DiffusionPipeline.load_config(source)
        if folder is None
        else read_settings(folder / "model_index.json")
    )

    def settings(library: Any) -> Any:
        if kind == "nf4":
            return library.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        torchao = importlib.import_module("torchao.quantization")

        names = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
        return library.TorchAoConfig(getattr(torchao, names[kind])())

    components = {
        name: settings(transformers if entry[0] == "transformers" else diffusers)
        for name, entry in index.items()
        if name.startswith(_LARGE)
        and isinstance(entry, list)
        and entry[0]
        and not entry[1].startswith("CLIP")
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=components)


def place(pipe: Any, device: str, memory: MemoryConfig) -> Any:
    """Return the pipeline on its device, or with weights that wait in main memory until they are needed.

    Raises:
        UserError: its autoencoder cannot work in tiles.
        OutOfMemory: its weights do not fit into the memory of the device.
    """
    import torch

    from ..autoencoder import use_tiles
    from ..utils.memory import memory_phase

    if memory.vae_tiling:
        use_tiles(pipe.vae)
    with memory_phase("load"):
        if memory.offload is None:
            pipe.to(device)
        elif memory.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif memory.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            stream = torch.device(device).type == "cuda"  # the next layers are fetched while these compute
            pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=stream)
    return pipe
