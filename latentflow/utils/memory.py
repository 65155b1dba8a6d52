"""Errors for running out of memory, with the phase, the amount used and advice. Imports only `errors` of ours."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb

import psutil
import torch

from ..errors import RunError, UserError

# Less memory for a large checkpoint.
_LESS = (
    "A large checkpoint needs less with --dtype bfloat16, --quantize nf4 (or int8), and on a GPU with --offload model "
    "or, least of all, --offload sequential (docs/guide/pretrained.md)."
)
# Advice for less memory in each phase of a program.
ADVICE = {
    "encode": "Lower --resolution, or free memory that other programs use.",
    "train": "Add --auto-micro-batch (splits batches as far as needed; what is learned stays the same), "
    "--gradient-checkpointing or --mixed-precision bf16; or halve --train-batch-size and double "
    "--gradient-accumulation-steps. A fine-tune (--init-from) needs least with --lora-rank 16.",
    "train the autoencoder": "Add --auto-micro-batch, or lower --autoencoder-batch-size, --autoencoder-widths or "
    "--resolution.",
    "preview": "--preview-steps 0 leaves out previews.",
    "validate": "--validation-steps 0 leaves out validations.",
    "draw prior samples": "Free memory that other programs use, or leave them out: --prior-samples 0.",
    "draw pairs": "Free memory that other programs use.",
    "draw": "Ask for smaller images, or free memory that other programs use.",
    "decode": "Ask for smaller images, or free memory that other programs use; or decode in tiles: --vae-tiling, from "
    "Python pipe.vae.enable_tiling().",
    "encode images": "Ask for smaller images, or free memory that other programs use; or encode in tiles: "
    "--vae-tiling, from Python pipe.vae.enable_tiling().",
    "load": f"Free memory that other programs use. {_LESS}",
    "encode prompts": f"Free memory that other programs use. {_LESS}",
    "run the network": f"Ask for smaller images. {_LESS}",
}


# glibc's numbers (malloc.h) of the sizes from which memory is fetched from the system by itself, and given back to it
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1

# Messages of torch's plain RuntimeErrors: main memory, CUDA outside torch's own allocator, cuBLAS.
_SAID = (
    "DefaultCPUAllocator: can't allocate",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(RunError):  # noqa: N818 (named as torch's)
    """Too little memory in a phase; ``what`` names it, the peak of memory used and what was asked for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory, of a GPU or the machine, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def out_of_memory(phase: str, error: BaseException, part: str = "") -> OutOfMemory:
    """Return the error for users.

    Args:
        phase: a key of `ADVICE`.
        error: the exception that was raised.
        part: the part of a checkpoint that there was no memory for.
    """
    if isinstance(error, OutOfMemory):
        return error
    phase = next((note for note in getattr(error, "__notes__", ()) if note in ADVICE), phase)
    words = str(error).strip().splitlines() or ["MemoryError"]
    return OutOfMemory(
        f"out of memory (phase: {phase}{part and f' {part}'}) after a peak of {peak_gib():.2f} GiB: {words[0][:200]}",
        ADVICE[phase],
    )


def component_that_loads(error: BaseException) -> str:
    """Return the name of the component that diffusers was loading when an exception was raised, or "".

    Its pipelines load one after the other, and do not say which.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_name == "load_sub_model":
            return str(frame.f_locals.get("name", ""))
    return ""


@contextmanager
def memory_phase(phase: str) -> Iterator[None]:
    """Raise `OutOfMemory`, which names the phase, where memory runs out within the context."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(phase, error) from error


@contextmanager
def inner_phase(phase: str) -> Iterator[None]:
    """Mark exceptions of memory that runs out within the context, so that `out_of_memory` names this phase."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(phase)
        raise


def require_memory(what: str, size: int) -> None:
    """Refuse a request that cannot fit into this machine's main memory, whatever else runs.

    Args:
        what: the request, as a plural noun.
        size: least number of bytes that it needs.

    Raises:
        UserError: it does not fit; the message says how much is needed and how much there is.
    """
    total = psutil.virtual_memory().total
    if size > total:
        least = size_text(min(size, 2**70))  # a float holds it
        raise UserError(
            f"{what} need {least} of memory at least, more than the {size_text(total)} of this machine",
            "Ask for fewer or smaller ones, or in several calls.",
        )


def release_memory() -> None:
    """Release the memory of what is gone, such as what a failure left behind, for the next attempt."""
    gc.collect()
    _give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let this process use memory again that it frees from now on, instead of fetching it anew from the system; glibc
    only.

    A training step on a CPU frees tensors of some megabytes that the next one needs again. The system clears each page
    of memory that it hands out: that took a tenth of a step.
    """
    _give_back()  # what was freed before
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
        mallopt(_TRIM_THRESHOLD, 2**30)


def _give_back() -> None:
    """Give memory that is free back to the system."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None where it is another one than glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_gib() -> float:
    """Return the peak of memory used in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / (2**30 if sys.platform == "darwin" else 2**20))


def size_text(size: int) -> str:
    """Return bytes in words: ``1.2 GiB``."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
