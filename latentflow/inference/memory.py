"""The flags for less memory: as options with which a checkpoint is loaded, and as the place where its weights wait."""

from __future__ import annotations

from typing import Any

from ..config import MemoryConfig
from ..errors import UserError
from ..utils.single_files import is_single_file


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
    if memory.quantize is not None:
        from ..families.quantization import check_quantization

        check_quantization(memory.quantize, device)


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
    from ..families.quantization import quantization

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


def kept_whole(pipe: Any) -> list[str]:
    """Return the components that diffusers does not offload in groups, such as a VQModel: they stay on the device."""
    return [
        name
        for name, part in pipe.components.items()
        if not getattr(part, "_supports_group_offloading", True)
    ]


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
            options = {
                "offload_type": "leaf_level",
                "use_stream": stream,
                "exclude_modules": kept_whole(pipe),
            }
            pipe.enable_group_offload(torch.device(device), **options)
    return pipe
