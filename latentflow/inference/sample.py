"""Opening the checkpoint that a program samples from, with its adapters, and sampling one image for each seed."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import AdapterChoice, MemoryConfig, SamplingConfig
from ..errors import UserError, finite, printable, reason, whole
from ..utils.components import quiet_libraries
from ..utils.files import (
    SHIPPED_CHECKPOINTS,
    check_types,
    pipeline_folder,
    read_settings,
    result_of,
    unfinished_run,
)
from ..utils.flags import parse_options
from ..utils.single_files import check_single_file, is_single_file
from .images import check_format, check_writable
from .memory import check_memory_flags, loading_options, place, tile

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families import FlowModel
    from ..pipeline.base import FlowPipeline

P = TypeVar("P", bound="FlowPipeline")
#: Condition of one image, as keywords of a pipeline's call.
Condition = dict[str, Any]
# Images per call of the pipeline. Each has its own generator, so the batch size changes an image by rounding only:
# matrix products round differently in a batch of another size, by at most one level of 255.
BATCH = 16
LARGEST_SEED = 2**64 - 1
SHIPPED = SHIPPED_CHECKPOINTS / "emoji-64"


def check_sampling(config: SamplingConfig) -> None:
    """Refuse at once what would fail after the images are generated, or once torch is imported.

    Raises:
        UserError: a number below 1, out of range or not finite; a file name without an image format, or where nothing
            can be written; no checkpoint there.
    """
    check_checkpoint(config.checkpoint, config.checkpoint_config)
    for flag, value in (("-n", config.n), ("--steps", config.steps), ("--scale", config.scale)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    whole("--seed", config.seed, 0, LARGEST_SEED)
    if config.guidance is not None:
        finite("--guidance", config.guidance)
    check_format(config.output)
    check_writable(config.output)


# ---------------------------------------------------------------- opening


def check_checkpoint(checkpoint: str | None, config: str | None = None) -> None:
    """Refuse a path that holds no checkpoint, without importing what opens one (but for a run that is not finished).

    Args:
        config: pipeline that a checkpoint in one file belongs to.

    Raises:
        UserError: see `pipeline_folder` and `check_single_file`; the shipped checkpoint is missing; a run has saved
            nothing yet; ``config`` is no pipeline, or is given beside a folder.
    """
    source = _resolve(checkpoint)
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
    _settings_folder(source)


def local_folder(checkpoint: str | None) -> Path | None:
    """Return the pipeline folder that a checkpoint is opened from, or None for a hub id or a single file.

    Raises:
        UserError: see `check_checkpoint`.
    """
    source = _resolve(checkpoint)
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
            not finished is opened at its newest checkpoint, and a line on stderr says so.
        device: "auto" (a GPU if there is one) or torch's name of one.
        adapters: adapters to merge into its weights.
        memory: precision of its weights, and where they wait.

    Raises:
        UserError: there is no such checkpoint, or the shipped one is missing; an adapter does not fit; torch knows no
            such device, or this machine has none; see `check_memory_flags`.
        OutOfMemory: it does not fit into the memory of the device.
    """
    source, memory = _resolve(checkpoint), memory or MemoryConfig()
    target = fastest_device() if device == "auto" else check_device(device)
    check_memory_flags(memory, target)
    quiet_libraries()
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
    if adapters is not None and adapters.vae is not None:
        from ..autoencoder import open_decoder, use_decoder

        decoder = open_decoder(adapters.vae, pipeline.vae, target)
        if memory.vae_tiling:
            tile(decoder)
        use_decoder(pipeline.vae, decoder)
    return pipeline


def _resolve(checkpoint: str | None) -> str:
    """Return the pipeline folder, that of a run where it is finished, or the hub id."""
    if checkpoint is None and not (SHIPPED / "model_index.json").is_file():
        raise UserError(
            f"the shipped checkpoint is missing: {SHIPPED}",
            "Give --checkpoint DIR, or train one: latentflow train FOLDER -o runs/mine, then "
            "--checkpoint runs/mine",
        )
    return str(SHIPPED) if checkpoint is None else result_of(checkpoint)


def _settings_folder(source: str) -> Path | None:
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
    if not hasattr(pipe, "merge_lora_weights"):  # a pretrained model of another family
        if choice.fast:
            raise UserError(
                f"--fast: {checkpoint} has no few-step adapter of latentflow",
                "Leave --fast out, or give a LoRA that was made for this model: --lora FILE.",
            )
        if choice.lora:
            _load_adapters(pipe, choice.lora)
        return
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
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _load_adapters(pipe: Any, texts: Sequence[str]) -> None:
    """Load the adapters by the loader of a pretrained model's family.

    Raises:
        UserError: it has none, or an adapter cannot be loaded.
    """
    weights = {}
    for number, text in enumerate(texts):
        source, weight = split_adapter(text)
        pipe.load_lora_weights(source, adapter_name=f"adapter-{number}")
        weights[f"adapter-{number}"] = weight
    pipe.set_adapters(list(weights), list(weights.values()))


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


# ---------------------------------------------------------------- what a checkpoint takes

# Types of the settings that `read_capabilities` reads.
_TYPES: dict[str, Any] = {
    "id2label": dict[str, str] | None,
    "num_classes": int | None,
    "text_dim": int | None,
    "condition_channels": int,
    "step_counts": list[int] | None,
    "average": bool,
    "folded_guidance": float,
}


@dataclass(frozen=True)
class Capabilities:
    """Conditions that a checkpoint takes, and the settings that it is usually sampled with.

    Attributes:
        text: it takes prompts.
        labels: names of its classes, or their numbers where they have no names.
        masks: it was trained to inpaint.
        steps: usual number of steps.
        distilled_guidance: the network takes no guidance scale: it draws without, or has learned one.
        negative: it takes negative prompts.
        guidance: usual guidance scale of an image without a source.
        edit_guidance, edit_strength: usual ones of an edit.
    """

    text: bool
    labels: tuple[str, ...]
    masks: bool
    steps: int = 20
    distilled_guidance: bool = False
    negative: bool = True
    guidance: float = 4.0
    edit_guidance: float = 2.0
    edit_strength: float = 0.9

    @property
    def condition(self) -> bool:
        """Return whether there is a condition to guide by."""
        return self.text or bool(self.labels)


def read_capabilities(checkpoint: str | None = None) -> Capabilities | None:
    """Read a pipeline folder's capabilities from its JSON files, without loading it; None for a hub id, and for
    checkpoints of other families than ours.

    Args:
        checkpoint: as for ``open_pipeline``.

    Raises:
        UserError: the JSON cannot be read, or a setting has the wrong type; a run has saved nothing yet.
    """
    source = _resolve(checkpoint)
    folder = _settings_folder(source) if unfinished_run(source) else Path(source)
    assert folder is not None
    files = [folder / "model_index.json", folder / "transformer" / "config.json"]
    if not all(file.is_file() for file in files):
        return None
    pipe, network = settings = [read_settings(file) for file in files]
    if not str(pipe.get("_class_name", "LatentFlowPipeline")).startswith("LatentFlow"):
        return None  # of another family, which is asked once it is open
    for file, config in zip(files, settings, strict=True):
        check_types(file, config, _TYPES)
    names = (pipe.get("id2label") or {}).values()
    return Capabilities(
        text=network.get("text_dim") is not None,
        labels=tuple(names) or tuple(str(number) for number in range(network.get("num_classes") or 0)),
        masks=bool(network.get("condition_channels")),
        steps=(pipe.get("step_counts") or [4 if pipe.get("average") else 20])[-1],
        distilled_guidance=pipe.get("folded_guidance", 1.0) != 1.0,
    )


def model_capabilities(model: FlowModel) -> Capabilities:
    """Return the capabilities of an open checkpoint, of any family."""
    leads_away = model.true_guidance(model.guidance(2.0)) != 1.0
    return Capabilities(
        text=model.takes_text,
        labels=model.classes,
        masks=model.takes_masks,
        steps=model.usual_steps,
        distilled_guidance=not (model.embeds_guidance or leads_away),
        negative=leads_away,
        guidance=Capabilities.guidance if model.few_steps else model.usual_guidance,
        edit_guidance=model.edit_defaults.guidance,
        edit_strength=model.edit_defaults.strength,
    )


# ---------------------------------------------------------------- sampling


def conditions(
    pipe: Any,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    negative: str | None = None,
    *,
    optional: bool = False,
) -> list[Condition]:
    """Return one condition for each prompt or class.

    Args:
        classes: names, or numbers written out.
        negative: negative prompt, the same for every prompt.
        optional: use the empty prompt where nothing is given and the checkpoint takes prompts.

    Raises:
        UserError: the checkpoint does not take these; the message names the flags that it takes.
    """
    if prompts and classes:
        raise UserError("a prompt and --class are both given", "Give one of them.")
    if prompts and not pipe.takes_text:
        raise UserError(f"this checkpoint takes no prompt such as '{prompts[0]}'", _instead(pipe))
    if classes and not pipe.takes_classes:
        raise UserError("this checkpoint takes no --class", _instead(pipe))
    if optional and pipe.takes_text and not prompts and not classes:
        prompts = ("",)
    if not prompts and not classes and (pipe.takes_text or pipe.takes_classes):
        raise UserError(f"a {'prompt' if pipe.takes_text else 'class'} is needed", _instead(pipe))
    if prompts:
        extra: Condition = {} if negative is None else {"negative_prompt": negative}
        return [{"prompt": prompt} | extra for prompt in prompts]
    numbers_or_names = [
        int(name) if name.isdecimal() and name not in pipe.labels else name for name in classes
    ]
    ids = pipe.class_ids(numbers_or_names) if classes else []
    return [{"class_labels": number} for number in ids] or [{}]


def note_unquoted(prompts: Sequence[str]) -> None:
    """Print on stderr that several prompts of one word each are drawn apart: quotes may have been forgotten."""
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        print(
            f"{len(prompts)} prompts of one word each. If they are one prompt, put it in quotes: "
            f'"{printable(" ".join(prompts))}"',
            file=sys.stderr,
        )


def warn_unknown_words(pipe: Any, *texts: str | None) -> None:
    """Print once, on stderr, the words that the checkpoint's vocabulary lacks."""
    from ..models.text import UnknownWords
    from ..pipeline.sampling import unknown_words_text

    if words := pipe.unknown_words([text for text in texts if text]):
        print(f"Warning: {unknown_words_text(pipe.tokenizer, words)}.", file=sys.stderr)
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again


def _instead(pipe: Any) -> str:
    """Return what this checkpoint takes, as flags."""
    if pipe.takes_text:
        return 'It takes a prompt, such as "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {', '.join(pipe.labels) or 'a number'}"
    return "It is unconditional: leave it out."


def check_memory(count: int, size: tuple[int, int], scale: int = 1) -> None:
    """Refuse more images, or larger ones, than fit into the machine's memory.

    Args:
        size: (height, width) of each image, which is then enlarged ``scale`` times.

    Raises:
        UserError: says how much memory would be needed.
    """
    from ..utils.memory import require_memory

    height, width = (side * scale for side in size)
    bytes_of_pillow = 4 * count * height * width
    require_memory(f"{count} images of {width} x {height} pixels", bytes_of_pillow)


def generators(seed: int, count: int) -> list[Any]:
    """Return generators for ``seed``, ``seed + 1``, ..., on the CPU: a seed gives the same noise on every device.

    Raises:
        UserError: a seed is negative, or larger than torch takes.
    """
    import torch

    whole("--seed", seed, 0, LARGEST_SEED - count + 1)
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def sample_images(pipe: Any, rows: list[Condition], seed: int, **settings: Any) -> list[Image]:
    """Sample one image for each row; image i uses ``seed + i``, whatever else is sampled with it.

    In a batch of another size it differs by rounding, at most one level of 255.

    Args:
        settings: further arguments of the pipeline's call.

    Raises:
        UserError: a seed is out of range, or the pipeline refuses its arguments.
    """
    from ..utils.memory import memory_phase

    whole("--seed", seed, 0, LARGEST_SEED - len(rows) + 1)  # so that the last image's seed is in range too
    images: list[Image] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        condition: dict[str, Any] = {name: [row[name] for row in batch] for name in batch[0]}
        if not condition:
            condition = {"num_images_per_prompt": len(batch)}
        with memory_phase("draw"):
            images += pipe(**condition, generator=generators(seed + start, len(batch)), **settings).images
    return images
