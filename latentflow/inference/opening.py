"""Opening the checkpoint that a program draws with, and its adapters."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import AdapterChoice, MemoryConfig
from ..errors import UserError, reason
from ..utils.components import quiet_libraries
from ..utils.files import (
    SHIPPED_CHECKPOINTS,
    pipeline_folder,
    result_of,
    unfinished_run,
)
from ..utils.flags import parse_options
from ..utils.single_files import check_single_file, is_single_file
from .memory import check_memory_flags, decoder_options, loading_options, place

if TYPE_CHECKING:
    from ..pipeline.base import FlowPipeline
    from ..training.adapted_run import AdaptedRun

P = TypeVar("P", bound="FlowPipeline")
SHIPPED = SHIPPED_CHECKPOINTS / "pictograms-128"


def check_checkpoint(checkpoint: str | None, config: str | None = None) -> None:
    """Refuse a path that holds no checkpoint, without importing what opens one (but for a run that is not finished).

    Args:
        config: pipeline that a checkpoint in one file belongs to.

    Raises:
        UserError: see `pipeline_folder` and `check_single_file`; the shipped checkpoint is missing; a run has saved
            nothing yet; ``config`` is no pipeline, or is given beside a folder.
    """
    source = resolve(checkpoint)
    if is_single_file(source):
        check_single_file(Path(source), config)
        if config is not None:
            pipeline_folder(config)
        return
    if config is not None:
        raise UserError(
            "--checkpoint-config is given, but --checkpoint is no file",
            "Leave it out: a folder has its own configuration.",
        )
    settings_folder(source)


def local_folder(checkpoint: str | None) -> Path | None:
    """Return the pipeline folder that a checkpoint is opened from, or None for a hub id or a single file.

    Raises:
        UserError: see `check_checkpoint`.
    """
    source = resolve(checkpoint)
    return None if is_single_file(source) else pipeline_folder(source)


def open_pipeline(
    kind: type[P],
    checkpoint: str | None = None,
    device: str = "auto",
    adapters: AdapterChoice | None = None,
    memory: MemoryConfig | None = None,
) -> P:
    """Load a pipeline onto its device.

    Args:
        kind: its class.
        checkpoint: pipeline folder, run folder, hub id or single file; None: the shipped checkpoint. A run that is
            not finished is opened at its newest checkpoint, and a line on stderr says so. The run of a pretrained
            model's adapter is opened as that model, with the adapter.
        device: "auto" (a GPU if there is one) or torch's name of one.
        adapters: adapters to merge into its weights.
        memory: precision of its weights, and where they wait.

    Raises:
        UserError: there is no such checkpoint, or the shipped one is missing; an adapter does not fit; torch knows no
            such device, or this machine has none; see `check_memory_flags`.
        OutOfMemory: it does not fit into the memory of the device.
    """
    checkpoint, adapters = with_run_adapter(checkpoint, adapters)
    source, memory = resolve(checkpoint), memory or MemoryConfig()
    target = fastest_device() if device == "auto" else check_device(device)
    check_memory_flags(memory, target)
    quiet_libraries()
    decoder = None
    if adapters is not None and adapters.vae is not None:
        from ..autoencoder import load_autoencoder

        decoder = load_autoencoder(adapters.vae, **decoder_options(memory))  # a wrong one is noticed at once
    pipeline: P
    if unfinished_run(source):
        if memory != replace(memory, dtype="auto", quantize=None, variant=None):
            raise UserError(
                f"{source} is a run that is not finished, whose weights are read in float32",
                "Leave --dtype, --quantize and --variant out.",
            )
        from ..training.unfinished import unfinished_pipeline

        as_trained, line = unfinished_pipeline(Path(source))
        print(line, file=sys.stderr)
        pipeline = kind.from_pipe(as_trained)
    else:
        given = parse_options(adapters.family_options) if adapters else {}
        options = {"family_options": given} if given else {}
        options |= loading_options(memory, source, target)
        if is_single_file(source):
            config = adapters.checkpoint_config if adapters else None
            pipeline = kind.from_single_file(source, config, **options)
        else:
            pipeline = kind.from_pretrained(source, **options)
    if adapters is not None:
        add_adapters(pipeline, adapters, source)
    pipeline = place(pipeline, target, memory)
    if decoder is not None:
        from ..autoencoder import check_latent_space, use_decoder, use_tiles

        check_latent_space(pipeline.vae, decoder.to(target))
        if memory.vae_tiling:
            use_tiles(decoder, encodes=False)
        use_decoder(pipeline.vae, decoder)
    return pipeline


def resolve(checkpoint: str | None) -> str:
    """Return the pipeline folder, or the hub id: of a run its pipeline where it is finished, or the pretrained model
    of which it trains an adapter.

    Raises:
        UserError: the shipped checkpoint is missing; the model of a run is.
    """
    if checkpoint is None and not (SHIPPED / "model_index.json").is_file():
        raise UserError(
            f"the shipped checkpoint is missing: {SHIPPED}",
            "Give --checkpoint DIR, or train one: latentflow train FOLDER -o runs/mine, then "
            "--checkpoint runs/mine",
        )
    source = str(SHIPPED) if checkpoint is None else result_of(checkpoint)
    adapted = _adapted_run(source)
    return adapted.base if adapted else source


def with_run_adapter(
    checkpoint: str | None, adapters: AdapterChoice | None
) -> tuple[str | None, AdapterChoice | None]:
    """Return the model of a run that trains an adapter of it, and the adapters with the run's own before them; any
    other checkpoint and its adapters as they are.

    Where the run is not finished, a line on stderr says so.

    Raises:
        UserError: the run has saved nothing yet; or its model is missing.
    """
    adapted = None if checkpoint is None else _adapted_run(result_of(checkpoint))
    if adapted is None:
        return checkpoint, adapters
    folder, line = adapted.adapter()
    if line:
        print(line, file=sys.stderr)
    chosen = adapters or AdapterChoice()
    options = (*adapted.options, *chosen.family_options)
    return adapted.base, replace(chosen, lora=(str(folder), *chosen.lora), family_options=options)


def _adapted_run(source: str) -> AdaptedRun | None:
    if not unfinished_run(source):
        return None
    from ..training.adapted_run import adapted_run

    return adapted_run(source)


def settings_folder(source: str) -> Path | None:
    """Return the folder with a checkpoint's configs, or None for a hub id.

    Raises:
        UserError: see `pipeline_folder`; a run has saved nothing yet.
    """
    if unfinished_run(source):
        from ..training.unfinished import initial_folder

        return initial_folder(Path(source))
    return pipeline_folder(source)


def check_device(name: str) -> str:
    """Return ``name`` if tensors can be put on the device that torch calls so.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    import torch

    try:
        torch.empty(1, device=name)
        if torch.device(name).type == "meta":
            raise ValueError("it holds no numbers")
    # torch raises all of these; AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        raise UserError(
            f"--device {name} cannot be used: {reason(error)}", f"auto takes {fastest_device()} here."
        ) from error
    return name


def fastest_device() -> str:
    """Return "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_adapters(pipe: Any, choice: AdapterChoice, checkpoint: str) -> None:
    """Merge the adapters into the pipeline's weights, each times its weight.

    Args:
        checkpoint: folder or hub id that the pipeline was loaded from.

    Raises:
        UserError: an adapter cannot be loaded, see ``load_lora_weights``; its weight is not a finite number; or the
            checkpoint has no adapter for ``fast``.
    """
    ours = hasattr(
        pipe, "merge_lora_weights"
    )  # else a pretrained model, whose adapters stay beside its weights
    if choice.fast and not ours:
        raise UserError(
            f"--fast: {checkpoint} has no few-step adapter of latentflow",
            "Leave --fast out, or give a LoRA that was made for this model: --lora FILE.",
        )
    if choice.fast:
        if Path(checkpoint).is_dir() and not (Path(checkpoint) / "fast").is_dir():
            raise UserError(
                f"--fast: {checkpoint} has no few-step adapter (a folder `fast`)",
                "Train one: latentflow distill CHECKPOINT DATA -o runs/fast --lora-rank 32, and sample with "
                "--lora runs/fast. Without --lora-rank the student is a checkpoint of its own: --checkpoint runs/fast.",
            )
        pipe.merge_lora_weights(checkpoint, any_base=choice.lora_any_base, subfolder="fast")
    if not choice.lora:
        return
    adapters = {f"adapter-{number}": split_adapter(text) for number, text in enumerate(choice.lora)}
    for name, (source, _) in adapters.items():
        pipe.load_lora_weights(source, adapter_name=name, any_base=choice.lora_any_base)
    pipe.set_adapters(list(adapters), [weight for _, weight in adapters.values()])
    if ours:
        pipe.fuse_lora()
        pipe.unload_lora_weights()


def split_adapter(text: str) -> tuple[str, float]:
    """Split ``runs/hats=0.8`` or ``runs/hats:0.8`` into the adapter's path or hub id and 0.8; the default weight is 1.

    A path that exists is taken as it is, whatever signs it holds.

    Raises:
        UserError: there is no such folder or file, or the weight is no finite number.
    """
    source, weight = text, 1.0
    parts = re.fullmatch(r"(.+)[=:]([^=:/\\]*)", text, re.DOTALL)
    if parts and not Path(text).exists():
        try:
            source, weight = parts[1], float(parts[2])
        except ValueError:
            source, weight = (parts[1], math.nan) if Path(parts[1]).exists() else (text, 1.0)
        if not math.isfinite(weight):
            raise UserError(f"--lora {text}: the weight is '{parts[2]}'", "It must be a number such as 0.8.")
    inside_run = Path(source) / "adapter"
    if inside_run.is_dir():
        return str(inside_run), weight
    if unfinished_run(source):
        raise UserError(
            f"--lora {source}: the run is not finished, and its adapter is written at the end",
            f"--checkpoint {source} generates with what it has learnt so far.",
        )
    if not Path(source).exists() and len(Path(source).parts) != 2:
        raise UserError(f"--lora {source}: no such folder or file", "A run's adapter is in RUN/adapter.")
    return source, weight
